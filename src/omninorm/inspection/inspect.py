"""Reads a checkpoint, measures every tensor and runs the rules."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from omninorm.inspection.blocks import BlockStats, block_profile
from omninorm.inspection.findings import Finding, grouped
from omninorm.inspection.locate import open_checkpoint
from omninorm.inspection.measure import TensorStats, measure
from omninorm.inspection.names import is_norm_part, place
from omninorm.inspection.rules import channel_findings, model_findings, tensor_findings
from omninorm.inspection.settings import gain_offset, norm_eps
from omninorm.inspection.tensors import Checkpoint, StoredTensor
from omninorm.record.jsonl import json_values

_MOST_WORKERS = 8  # each needs about 60 MiB

Progress = Callable[[int, int, str], None]
"""A function that is called with the bytes done, the total bytes, and the name of the next tensor."""


@dataclass
class Inspection:
    """The result of inspecting one checkpoint.

    Args:
        path: the inspected file or folder.
        format: "safetensors" or "gguf".
        findings: the findings, the most severe first.
        tensors: the measurements of each tensor, in the model's order.
        blocks: the depth profile.
        eps: ε of the model's norms; None if the settings do not contain it.
    """

    path: Path
    format: str
    findings: list[Finding]
    tensors: list[TensorStats]
    blocks: list[BlockStats]
    eps: float | None

    @property
    def failed(self) -> bool:
        """Return whether a finding is a failure: the model cannot produce sensible outputs."""
        return any(finding.severity == "fail" for finding in self.findings)

    @property
    def verdict(self) -> str:
        """One sentence that summarizes the findings."""
        rules = Counter(finding.rule for finding in self.findings if finding.severity != "note")
        totals = self.totals()
        size = f"{totals['tensors']} tensors with {totals['parameters']:,} parameters"
        notes = sum(finding.severity == "note" for finding in self.findings)
        also = f", {notes} {_plural('note', notes)}" if notes else ""
        if not rules:
            return f"Healthy: no problems in {size}{also}."
        count, fails = rules.total(), sum(finding.severity == "fail" for finding in self.findings)
        failing = f" ({fails} {_plural('failure', fails)})" if fails else ""
        kinds = ", ".join(rule if times == 1 else f"{times} × {rule}" for rule, times in rules.items())
        return f"{count} {_plural('finding', count)}{failing} in {size}: {kinds}{also}."

    def totals(self) -> dict[str, Any]:
        """Return the numbers of tensors, gains of norms, parameters and bytes, and of tensors by dtype.

        parameters counts floating-point values outside of buffers; not_measured counts tensors of other types.
        """
        kept = [each for each in self.tensors if each.measured and each.place.kind != "buffer"]
        return {
            "tensors": len(self.tensors),
            "norms": sum(each.gains is not None for each in self.tensors),
            "parameters": sum(each.numel for each in kept),
            "bytes": sum(each.nbytes for each in self.tensors),
            "dtypes": dict(Counter(each.dtype for each in self.tensors).most_common()),
            "not_measured": sum(not each.measured for each in self.tensors),
            "norm_eps": self.eps,
        }

    def to_record(self) -> dict[str, Any]:
        """Return everything as JSON values; non-finite numbers become "nan", "inf" and "-inf"."""
        record = {
            "path": str(self.path),
            "format": self.format,
            "verdict": self.verdict,
            "failed": self.failed,
            "findings": [finding.to_record() for finding in self.findings],
            "blocks": [block.to_record() for block in self.blocks],
            "totals": self.totals(),
            "tensors": [tensor.to_record() for tensor in self.tensors],
        }
        encoded: dict[str, Any] = json_values(record)
        return encoded


def inspect_checkpoint(path: str | Path, progress: Progress | None = None) -> Inspection:
    """Measure every tensor of a checkpoint, a few rows at a time, and report problems.

    Tensors are read in parallel, one per torch thread.

    Args:
        path: a .safetensors or .gguf file, an index of shards, a folder with weights, or a run's folder.
        progress: called before each tensor and at the end.

    Raises:
        RunError: the path has no weights, or only a pickle, or its files are damaged.
        MissingExtraError: the package that reads the format is not installed.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import save_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     weights = {"norm.weight": torch.zeros(4), "head.weight": torch.randn(8, 4)}
        ...     save_file(weights, f"{folder}/model.safetensors")
        ...     inspection = inspect_checkpoint(folder)
        >>> inspection.failed, inspection.findings[0].rule, inspection.findings[0].tensor
        (True, 'silent-norm', 'norm.weight')
    """
    checkpoint = open_checkpoint(path)
    stats = _measure_all(checkpoint, progress or (lambda done, total, name: None))
    pairs = _twins(stats, {each.name: each for each in checkpoint.tensors})
    remedy = "check that the files belong to the same model"
    findings = [Finding("warn", "files", None, None, text, remedy) for text in checkpoint.notices]
    for each in stats:
        findings += [*tensor_findings(each), *channel_findings(each)]
    findings += model_findings(stats, checkpoint.config, pairs)
    eps = norm_eps(checkpoint.config)
    return Inspection(checkpoint.path, checkpoint.format, grouped(findings), stats, block_profile(stats), eps)


def _measure_all(checkpoint: Checkpoint, progress: Progress) -> list[TensorStats]:
    total, done, stats = sum(each.nbytes for each in checkpoint.tensors), 0, []
    norms_with_bias = {_owner(each.name) for each in checkpoint.tensors if each.name.endswith((".bias", ".beta"))}

    def run(tensor: StoredTensor) -> TensorStats:
        offset = 0.0
        if checkpoint.format != "gguf" and is_norm_part(
            tensor.name
        ):  # llama.cpp stores 1 + γ, so nothing has to be added
            offset = gain_offset(checkpoint.config, tensor.name, _owner(tensor.name) in norms_with_bias)
        return measure(tensor, place(tensor.name, tensor.shape), offset)

    with _workers() as pool:
        for tensor, future in [(each, pool.submit(run, each)) for each in checkpoint.tensors]:
            progress(done, total, tensor.name)
            stats.append(future.result())
            done += tensor.nbytes
    progress(total, total, "")
    return stats


@contextlib.contextmanager
def _workers() -> Iterator[ThreadPoolExecutor]:
    """Create as many threads as torch uses; each measures one tensor at a time.

    Torch's own threads would synchronize after every small operation. On a busy machine this took seven times as long
    as a single thread.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(min(threads, _MOST_WORKERS))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _twins(stats: Sequence[TensorStats], stored: Mapping[str, StoredTensor]) -> list[tuple[TensorStats, TensorStats]]:
    """Return pairs of matrices with the same values. Only matrices with equal statistics are compared by value."""
    seen: dict[tuple[object, ...], TensorStats] = {}
    pairs = []
    for each in stats:
        if (
            not each.is_matrix or each.max_abs == 0.0 or each.kurtosis == 1.0
        ):  # constant matrices may be initialized alike
            continue
        key = (each.shape, each.dtype, each.rms, each.max_abs, each.argmax, each.total, each.kurtosis)
        first = seen.setdefault(key, each)
        if first is not each and _equal(stored[first.name], stored[each.name]):
            pairs.append((first, each))
    return pairs


def _equal(first: StoredTensor, second: StoredTensor) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.chunks(), second.chunks(), strict=True))


def _plural(word: str, count: int) -> str:
    return word if count == 1 else f"{word}s"
