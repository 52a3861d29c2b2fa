"""Opens both checkpoints, and gives each tensor its common name and its layout."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from omninorm.inspection.against.convention import Convention
from omninorm.inspection.against.live import open_module
from omninorm.inspection.against.match import Parts
from omninorm.inspection.against.mlx import unpacked
from omninorm.inspection.against.parts import Part
from omninorm.inspection.against.roles import GgufName, canonical_names, role_of
from omninorm.inspection.locate import open_checkpoint
from omninorm.inspection.names import place
from omninorm.inspection.settings import model_types
from omninorm.inspection.tensors import Checkpoint, StoredTensor

Source = str | Path | nn.Module
# RoPE's tables, which models from a Hugging Face folder compute from their settings.
_TABLE = re.compile(r"rope_factors|rope_freqs|inv_freq")
_BUFFER = "it is a buffer, not a weight"
_SCALES = ("_scale_inv", "_scale")
_SCALE = re.compile(r"\.weight_scale(_inv)?$|\.(input|activation)_scale$")


@dataclass(frozen=True)
class NotCompared:
    """Tensors of one checkpoint that were not compared.

    Args:
        where: "A", "B" or "both".
        role: the common name of the tensors, with "*" for blocks.
        count: the number of tensors.
        reason: the reason why they were not compared.
    """

    where: str
    role: str
    count: int
    reason: str

    def to_record(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Prepared:
    """A checkpoint whose tensors have common names.

    Args:
        names: the common names of all tensors, by their stored names.
        parts: the comparable tensors, by their common names.
        skipped: the other tensors.
        unreadable: for each weight among these, its block and whether it is a vector.
    """

    names: Mapping[str, str]
    parts: Parts = field(default_factory=dict)
    skipped: list[NotCompared] = field(default_factory=list)
    unreadable: set[tuple[int | None, bool]] = field(default_factory=set)


def prepare(opened: Sequence[Checkpoint], sides: Sequence[Convention]) -> tuple[Prepared, Prepared]:
    """Return both checkpoints with common names."""
    names = _common_names(*opened)
    first, second = (_prepare(*each) for each in zip("AB", opened, sides, names, strict=True))
    return first, second


def _prepare(where: str, checkpoint: Checkpoint, side: Convention, names: Mapping[str, str]) -> Prepared:
    with_bias = {each.name.rpartition(".")[0] for each in checkpoint.tensors if each.name.endswith((".bias", ".beta"))}
    transposed = _conv1d(checkpoint.tensors)
    found = Prepared(names)
    skipped: Counter[tuple[str, str]] = Counter()
    for tensor in checkpoint.tensors:
        key, reason = names[tensor.name], _reason(tensor, names)
        if reason is None:
            offset = side.offset(tensor.name, tensor.name.rpartition(".")[0] in with_bias)
            found.parts[key] = Part(key, tensor, offset=offset, transposed=tensor.name in transposed)
            continue
        skipped[role_of(key), reason] += 1
        if reason != _BUFFER:
            found.unreadable.add((place(key, ()).block, len(tensor.shape) < 2))
    found.skipped = [NotCompared(where, role, count, reason) for (role, reason), count in skipped.items()]
    return found


def open_source(source: Source) -> Checkpoint:
    checkpoint = open_module(source) if isinstance(source, nn.Module) else open_checkpoint(source)
    checkpoint.tensors = unpacked(checkpoint.tensors, checkpoint.config)
    return checkpoint


def _common_names(a: Checkpoint, b: Checkpoint) -> tuple[dict[str, str], dict[str, str]]:
    """Return the common name of each tensor of both checkpoints; names that both have stay as they are."""
    tables = [_gguf_table(each) for each in (a, b)]
    table = tables[0] or tables[1]
    names = [[tensor.name for tensor in each.tensors] for each in (a, b)]
    common = [canonical_names(each, table) for each in names]
    return common[0], common[1]


def _gguf_table(checkpoint: Checkpoint) -> GgufName | None:
    """Return llama.cpp's table of names for the architecture of a GGUF file."""
    if checkpoint.format != "gguf":
        return None
    import gguf

    name = next(iter(model_types(checkpoint.config)), "")
    found = next((arch for arch, each in gguf.MODEL_ARCH_NAMES.items() if each == name), None)
    blocks = [block for each in checkpoint.tensors if (block := place(each.name, ()).block) is not None]
    if found is None or not blocks:
        return None
    return gguf.get_tensor_name_map(found, min(max(blocks) + 1, len(checkpoint.tensors))).get_name


def _reason(tensor: StoredTensor, names: Mapping[str, str]) -> str | None:
    """Return the reason why a tensor cannot be compared, or None."""
    if place(tensor.name, tensor.shape).kind == "buffer" or _TABLE.search(tensor.name):
        return _BUFFER
    if not tensor.measurable:
        return f"it is stored as {tensor.dtype}"
    if any(f"{tensor.name}{ending}" in names for ending in _SCALES) or _SCALE.search(tensor.name):
        return "its values are stored with a separate scale"
    return "it is empty" if not tensor.numel else None


def _conv1d(tensors: Sequence[StoredTensor]) -> set[str]:
    """Return the matrices that GPT-2's Conv1D stores as [in, out]; the shape of its fused qkv reveals this."""
    fused = [each for each in tensors if each.name.endswith("attn.c_attn.weight") and len(each.shape) == 2]
    if not fused or any(each.shape[1] != 3 * each.shape[0] for each in fused):
        return set()
    endings = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")
    return {each.name for each in tensors if each.name.endswith(endings) and len(each.shape) == 2}
