"""Checks the weights when a watch is opened: frozen before they were trained, or gains that are 1 too large."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from omninorm.kernels.distributed import is_distributed
from omninorm.monitor.checks.grids import grid_of, measure
from omninorm.monitor.model_map.structure import Structure
from omninorm.record.alarm import Alarm

MOST_MATRICES, LEAST, MOST = 8, 32, 256
# Rows and columns of independent elements differ by about 1 in these units. In the models of our tests, three quarters
# of the matrices are below 1.4 before training, and above 4 after 60 steps.
RANDOM, QUARTILE = 2.0, 0.75
FROZEN = 0.5


def matrices_of(structure: Structure) -> list[Tensor]:
    """Return the matrices of the blocks, or of the whole model if it has none."""
    blocks = {block.name for block in structure.blocks}
    groups = [group for name, group in structure.groups.items() if name in blocks or not blocks]
    return [tensor for group in groups for _, tensor in group if tensor.ndim >= 2]


def look_random(matrices: Sequence[Tensor]) -> bool | None:
    """Return whether up to 8 of the matrices look like independent random numbers; None if there are too few."""
    fitting = [
        tensor
        for tensor in matrices
        if tensor.ndim == 2 and min(tensor.shape) >= LEAST and tensor.is_floating_point() and not is_distributed(tensor)
    ]
    chosen = fitting[:: -(-len(fitting) // MOST_MATRICES) or 1]
    pairs = [measure(grid_of(tensor, min(MOST, *tensor.shape)).float().unsqueeze(0))[0].tolist() for tensor in chosen]
    found = [unevenness for zeros, unevenness in pairs if zeros < 1.0 and unevenness >= 0.0]
    return sorted(found)[min(int(QUARTILE * len(found)), len(found) - 1)] < RANDOM if found else None


def frozen(structure: Structure, step: int) -> list[Alarm]:
    """Return a warning if most matrices of the blocks are frozen although they look like a random initialization."""
    matrices = matrices_of(structure)
    still = [tensor for tensor in matrices if not tensor.requires_grad]
    share = _count(still) / max(1, _count(matrices))
    if share <= FROZEN or not look_random(still):
        return []
    everything = [parameter for group in structure.groups.values() for _, parameter in group]
    trained = [parameter for parameter in everything if parameter.requires_grad]
    where = "the blocks'" if structure.blocks else "the model's"
    evidence = (
        f"Frozen before training: {_percent(share)} of {where} weights have requires_grad=False, although they look "
        f"like a random initialization. {_percent(_count(trained) / max(1, _count(everything)))} of all parameters "
        f"are trained ({len(trained)} of {len(everything)} tensors)."
    )
    remedy = (
        "Set requires_grad=True on them, or load pretrained weights before freezing them. If random weights should "
        "stay as they are, ignore this warning."
    )
    source = "random weights are of no use unless they are trained; the limit of 50 % is omninorm's own"
    return [Alarm(step, "warn", "frozen-weights", None, evidence, remedy, source)]


def _all_one(gain: Tensor) -> bool:
    """Return whether all gains are 1; a process may hold none of them."""
    return gain.numel() > 0 and bool((gain == 1.0).all())


def shifted_gains(structure: Structure, step: int) -> list[Alarm]:
    """Return a warning about norms that add 1 to gains that are all 1 already."""
    names = [
        norm.facts.name
        for norm in structure.norms
        if norm.measured and norm.offset == 1.0 and norm.gain is not None and _all_one(norm.gain)
    ]
    if not names:
        return []
    count = "1 norm" if len(names) == 1 else f"{len(names)} norms"
    evidence = (
        f"Gains applied twice: {count} multiply by 1 + weight, and the weights are all 1, so the output is twice as "
        f"large as it should be (the first is {names[0]})."
    )
    remedy = "Initialize these weights to 0, or subtract 1 when converting them from a norm that multiplies by weight."
    return [Alarm(step, "warn", "gain-scale", names[0], evidence, remedy, "a new norm multiplies by 1")]


def _count(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share > 0.1 else f"{100 * share:.2g} %"
