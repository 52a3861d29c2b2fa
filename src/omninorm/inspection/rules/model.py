"""Rules for the whole model: unusual blocks, and zero, duplicate or missing tensors."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from omninorm.inspection.blocks import same_role
from omninorm.inspection.findings import Finding
from omninorm.inspection.measure import TensorStats
from omninorm.inspection.rules.tensor import about
from omninorm.inspection.settings import count_of_blocks, norm_eps, ties_embeddings

DEPTH = 10.0
"""RMS of a matrix / median RMS of the same matrix in all blocks."""
LARGE_EPS = 1e-3
EPS_SHARE = 0.2


def model_findings(
    tensors: Sequence[TensorStats], config: Mapping[str, Any], pairs: Sequence[tuple[TensorStats, TensorStats]]
) -> Iterator[Finding]:
    """Yield findings about all tensors together.

    Args:
        tensors: the statistics of all tensors.
        config: the model's settings, or {}.
        pairs: matrices with the same values.
    """
    yield from _depth(tensors)
    yield from _zero(tensors)
    yield from _twins(pairs)
    yield from _untied(tensors, config, pairs)
    yield from _missing_blocks(tensors, config)
    yield from _eps(tensors, config)


def _depth(tensors: Sequence[TensorStats]) -> Iterator[Finding]:
    for group in same_role(tensors):
        values = [each.rms for each in group if math.isfinite(each.rms)]
        median = statistics.median(values) if values else 0.0
        for each in group if median > 0 else ():
            if not each.rms > 0 or 1 / DEPTH < each.rms / median < DEPTH:
                continue
            factor = each.rms / median
            evidence = (
                f"its RMS of {each.rms:.3g} is {factor:.3g} × the median {median:.3g} of the same matrix in"
                f" {len(group)} blocks (thresholds {1 / DEPTH:g} and {DEPTH:g})"
            )
            remedy = "check whether this block was scaled, merged or initialized differently from the others"
            yield about(each, "warn", "depth-outlier", evidence, remedy, max(factor, 1 / factor))


def _zero(tensors: Sequence[TensorStats]) -> Iterator[Finding]:
    peers: dict[str, list[TensorStats]] = {}
    for each in tensors:
        if each.is_matrix and each.nan + each.inf == 0:
            peers.setdefault(each.place.role, []).append(each)
    for group in peers.values():
        alive = sum(each.max_abs > 0 for each in group)
        for each in group:
            if each.max_abs == 0:
                yield _zero_finding(each, alive, len(group))


def _zero_finding(tensor: TensorStats, alive: int, siblings: int) -> Finding:
    if tensor.place.kind in ("embedding", "head") and "pos" not in tensor.name and "type" not in tensor.name:
        remedy = (
            "all tokens look the same to this model: the weights were not saved or not loaded; use another checkpoint"
        )
        return about(tensor, "fail", "zero-tensor", f"all {tensor.numel} values are 0", remedy, tensor.numel)
    if alive:
        evidence = f"all {tensor.numel} values are 0, while {alive} of {siblings} tensors of this role are not"
        remedy = "this branch has no effect: check that the block was trained and saved, or remove it"
        return about(tensor, "warn", "zero-tensor", evidence, remedy, tensor.numel)
    evidence = f"all {tensor.numel} values are 0, as in every tensor of this role"
    return about(
        tensor, "note", "zero-tensor", evidence, "normal for weights that are initialized to zero and not trained yet"
    )


def _twins(pairs: Sequence[tuple[TensorStats, TensorStats]]) -> Iterator[Finding]:
    for first, second in pairs:
        evidence = f"it has the same {first.numel} values as {first.name}"
        if first.place.kind in ("embedding", "head") and second.place.kind in ("embedding", "head"):
            remedy = f"they are tied: storing only one of them saves {second.nbytes} bytes"
            yield about(second, "note", "tied", evidence, remedy, second.nbytes)
        else:
            remedy = "duplicate layers: check how the checkpoint was assembled"
            yield about(second, "warn", "duplicate", evidence, remedy, second.nbytes)


def _untied(
    tensors: Sequence[TensorStats], config: Mapping[str, Any], pairs: Sequence[tuple[TensorStats, TensorStats]]
) -> Iterator[Finding]:
    heads = [each for each in tensors if each.place.kind == "head" and each.name.endswith("lm_head.weight")]
    if not heads or not ties_embeddings(config) or any(heads[0] in pair for pair in pairs):
        return
    remedy = "set tie_word_embeddings to false to use this head; otherwise it is ignored on loading"
    yield about(heads[0], "warn", "untied-head", "it differs from the embedding, to which config.json ties it", remedy)


def _missing_blocks(tensors: Sequence[TensorStats], config: Mapping[str, Any]) -> Iterator[Finding]:
    stacks: dict[str, set[int]] = {}
    for each in tensors:
        if each.place.stack is not None and each.place.block is not None:
            stacks.setdefault(each.place.stack, set()).add(each.place.block)
    expected = count_of_blocks(config) if len(stacks) == 1 else None
    for stack, blocks in stacks.items():
        count = max(max(blocks) + 1, expected or 0)
        missing = [block for block in range(min(count, 100_000)) if block not in blocks]
        if missing:
            some = ", ".join(map(str, missing[:8])) + (" …" if len(missing) > 8 else "")
            evidence = f"{stack} has {len(blocks)} of {count} blocks; missing: {some}"
            remedy = "part of the model is missing: find the other files, or correct config.json"
            yield Finding("warn", "missing-blocks", None, stack, evidence, remedy, len(missing), role=stack)


def _eps(tensors: Sequence[TensorStats], config: Mapping[str, Any]) -> Iterator[Finding]:
    eps = norm_eps(config)
    if eps is None:
        return
    if not 0 <= eps < LARGE_EPS:
        remedy = "common values are 1e-12 to 1e-5: check config.json"
        yield Finding("warn", "norm-eps", None, None, f"ε of the norms is {eps:g}", remedy, eps)
    for each in tensors:
        if each.place.kind != "embedding" or each.rows is None or "pos" in each.name or "type" in each.name:
            continue
        square = each.rows.median**2
        if square > 0 and eps > 0 and (share := eps / (eps + square)) > EPS_SHARE:
            evidence = (
                f"the median token's RMS is {each.rows.median:.2g}, so ε = {eps:g} is {share:.0%} of the first norm's"
                " denominator (mean square + ε)"
            )
            yield about(each, "warn", "eps-share", evidence, "reduce ε, or scale up the embedding", share)
