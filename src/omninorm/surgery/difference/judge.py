"""Which pairs of calls are where two models part: the deepest modules with equal inputs and different outputs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from omninorm.surgery.difference.calls import Call
from omninorm.surgery.difference.run import Measured
from omninorm.surgery.verify import EXACT

# A difference that is so many times larger than that of everything inside the module does not come from there.
JUMP = 10.0
# Where a module agrees to at most this share of the difference of one inside of it, that one's has no effect.
_NO_EFFECT = 1e-2
# Models that are computed in float64 may still hold tables that were computed in float32, such as RoPE's.
_FROM_FLOAT32 = 1e-6
# Rounding errors of one module, in units of the dtype. Products are summed in float32, whose own errors add up.
_ROUNDINGS = {torch.float32: 32, torch.bfloat16: 2, torch.float16: 2}


@dataclass(frozen=True)
class Limits:
    """Relative differences of one module that count as none, and as rounding.

    Args:
        exact: at most this is no difference.
        rounding: at most this is rounding.
        same_class: at most this is rounding if both modules run the same code, on numbers of the same precision.
        fixed: whether a user set the limit, so that rounded weights do not raise it.
    """

    exact: float
    rounding: float
    same_class: float
    fixed: bool = False


def limits(a: nn.Module, b: nn.Module, dtype: torch.dtype | None, limit: float | None) -> Limits:
    """Return the limits for two models that are run in `dtype`, or as they are, which allows for the coarser dtype."""
    dtypes = {dtype} if dtype is not None else _float_dtypes(a) | _float_dtypes(b)
    coarsest = max(dtypes or {torch.float32}, key=lambda each: torch.finfo(each).eps)
    if limit is not None:
        return Limits(min(EXACT, limit), limit, limit, fixed=True)
    rounding = rounding_of(coarsest)
    return Limits(EXACT, rounding, EXACT if coarsest == torch.float64 else rounding)


def limit_of(a: nn.Module, b: nn.Module, allowed: Limits, rounded: torch.dtype | None) -> float:
    """Return what counts as rounding for a pair of modules whose weights were rounded to a dtype, if one is given."""
    usual = allowed.same_class if type(a) is type(b) else allowed.rounding
    return usual if rounded is None or allowed.fixed else max(usual, rounding_of(rounded))


def rounding_of(dtype: torch.dtype) -> float:
    """Return the relative difference of a module's outputs that its rounding to a dtype explains."""
    return _FROM_FLOAT32 if dtype == torch.float64 else _ROUNDINGS.get(dtype, 2) * torch.finfo(dtype).eps


def _float_dtypes(model: nn.Module) -> set[torch.dtype]:
    return {each.dtype for each in model.parameters() if each.is_floating_point()}


class Judgement:
    """The pairs of calls where two models part.

    Args:
        measured: every pair, in the order in which a's calls began.
        calls: all calls of a.
        allowed: what counts as rounding.
        own: what counts as rounding for each pair, by the index of a's call.
    """

    def __init__(
        self, measured: Sequence[Measured], calls: Sequence[Call], allowed: Limits, own: Mapping[int, float]
    ) -> None:
        self.measured, self.allowed, self.own = measured, allowed, own
        self.inside: dict[int, list[Measured]] = defaultdict(list)
        self.around: dict[int, list[Measured]] = defaultdict(list)
        by_index = {each.a.index: each for each in measured}
        for each in measured:
            parent = each.a.parent
            while parent >= 0:
                if (outer := by_index.get(parent)) is not None:
                    self.inside[parent].append(each)
                    self.around[each.a.index].append(outer)
                parent = calls[parent].parent

    def culprits(self) -> list[Measured]:
        """Return the pairs where the models part, in the order in which they do.

        A pair is one of them if b's module differs when it gets a's inputs, by more than rounding and by an order more
        than every matched module inside of it, no module inside of it is one, and it matters to the modules around it.
        Where b's module cannot get a's inputs, its outputs must differ by an order more than its inputs.
        """
        found: dict[int, Measured] = {}
        # A module's parts come before it.
        for each in sorted(self.measured, key=lambda each: -each.a.index):
            parts = self.inside[each.a.index]
            threshold = self._threshold(each)
            if each.fed is None:
                threshold = max(threshold, JUMP * each.inputs)
            if any(part.a.index in found for part in parts) or self.compensated(each):
                continue
            if size(each) > threshold:
                found[each.a.index] = each
        return sorted(found.values(), key=self.begins)

    def _threshold(self, each: Measured) -> float:
        """Return the difference of a pair that rounding, in it and in the pairs inside of it, explains."""
        parts = [part for part in self.inside[each.a.index] if part.fed is not None and not self.compensated(part)]
        inner = max((part.fed for part in parts if part.fed is not None), default=0.0)
        return max(self.own[each.a.index], JUMP * inner)

    def compensated(self, each: Measured) -> bool:
        """Return whether a module around a pair agrees although the pair differs: what it computes was rearranged."""

        def hidden(gap: float | None, around: float | None) -> bool:
            if gap is None or around is None:
                return False
            most = self.allowed.rounding
            return gap > self.own[each.a.index] and around <= min(most, min(most, _NO_EFFECT) * gap)

        around = self.around[each.a.index]
        return any(hidden(each.fed, outer.fed) or hidden(each.outputs, outer.outputs) for outer in around)

    def first_changed_part(self, each: Measured) -> Measured | None:
        """Return the first pair inside of a pair whose inputs differ, though those of the pair itself do not."""
        threshold = max(self._threshold(each), JUMP * each.inputs)
        parts = self.inside[each.a.index]
        return next((part for part in parts if part.inputs > threshold or (part.absent and not each.absent)), None)

    def begins(self, each: Measured) -> int:
        """Return where in a's order of calls a difference begins: at the first part that gets other inputs."""
        part = self.first_changed_part(each)
        return each.a.index if part is None else part.a.index


def size(each: Measured) -> float:
    """Return the difference for the same input where it is known, and that in the two runs otherwise."""
    return each.outputs if each.fed is None else each.fed
