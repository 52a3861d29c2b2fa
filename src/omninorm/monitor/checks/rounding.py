"""Detects updates of 16-bit weights that are lost to rounding."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from omninorm.monitor.checks.facts import Lost
from omninorm.monitor.probes.elements import some
from omninorm.monitor.probes.optimizer import has_gradient

# Steps after which the weights are compared with newer ones.
WINDOW = 50
# Sets of parameters whose earlier weights are kept.
MOST_REFERENCES = 8
HALF = (torch.bfloat16, torch.float16)
# State of optimizers that is no more precise copy of the weights, nor a correction of their rounding.
MOMENTS = frozenset(
    [
        "step",
        "exp_avg",
        "exp_avg_sq",
        "max_exp_avg_sq",
        "momentum_buffer",
        "square_avg",
        "grad_avg",
        "acc_delta",
        "sum",
        "exp_inf",
        "prev",
        "step_size",
        "ax",
        "previous_grad",
        "exp_avg_slow",
        "exp_avg_diff",
    ]
)


class Rounding:
    """Compares some 16-bit weights of every parameter with those of an earlier sample.

    Weights that move by less than half of the distance to the next number stay where they are. If a more precise copy
    is kept, the weights follow it after some steps. Optimizers that keep such a copy in their state are left out.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = parameters
        # A single weight says little, and tensors of one element in an optimizer's state may be anything.
        self._half = [at for at, p in enumerate(parameters) if p.dtype in HALF and p.numel() > 1]
        # By the parameters that were compared: several optimizers, or different experts, take turns.
        self._references: dict[tuple[int, ...], tuple[int, Tensor]] = {}
        self._segments: dict[tuple[int, ...], Tensor] = {}
        self._found: tuple[int, list[Tensor]] | None = None

    def after_step(self, optimizer: torch.optim.Optimizer, held: Collection[int], step: int) -> None:
        """Compare the weights of a sampled step after the optimizer's step, while the gradients are still there."""
        mine = [at for at in self._half if id(self._parameters[at]) in held and has_gradient(self._parameters[at])]
        by_device: dict[torch.device, list[int]] = {}
        for at in mine:
            if not _has_copy(optimizer, self._parameters[at]):
                by_device.setdefault(self._parameters[at].device, []).append(at)
        for places in by_device.values():
            self._compare(tuple(places), step)

    def _compare(self, places: tuple[int, ...], step: int) -> None:
        """Compare the weights of these parameters, on one device, with the reference; renew it if it is old."""
        few = [some(self._parameters[at]) for at in places]
        now = torch.cat(few)
        since, before = self._references.get(places, (step, None))
        if before is not None:
            live = torch.cat([some(self._parameters[at].grad) for at in places]) != 0  # type: ignore[arg-type]
            still = live & (now == before)
            both = torch.zeros(2, len(self._parameters), dtype=torch.float64, device=now.device)
            both.index_add_(1, self._index(places, few), torch.stack([still, live]).to(torch.float64))
            last, found = self._found or (since, [])
            self._found = max(last, since), [*found, both]
        if before is None or step - since >= WINDOW:
            self._references.pop(places, None)
            self._references[places] = step, now
            if len(self._references) > MOST_REFERENCES:
                oldest = next(iter(self._references))
                del self._references[oldest]
                self._segments.pop(oldest, None)

    def _index(self, places: tuple[int, ...], few: Sequence[Tensor]) -> Tensor:
        """Return each element's parameter, cached because a copy to the device would synchronize."""
        if places not in self._segments:
            counts = torch.tensor([part.numel() for part in few])
            self._segments[places] = torch.tensor(places).repeat_interleave(counts).to(few[0].device)
        return self._segments[places]

    def take(self) -> dict[str, Tensor]:
        """Return how many of the compared elements stayed, and how many have a gradient, by parameter."""
        if self._found is None:
            return {}
        first, *others = self._found[1]
        both = sum((other.to(first.device) for other in others), first)
        return {"stayed": both[0], "live": both[1]}

    def result(
        self,
        stayed: Sequence[float],
        live: Sequence[float],
        groups: Mapping[str, Sequence[int]],
        gains: Collection[int],
    ) -> Lost | None:
        """Return the facts, from the numbers of `take` on the host."""
        if self._found is None:
            return None
        since, self._found = self._found[0], None

        def share(places: Collection[int]) -> float | None:
            count = sum(live[at] for at in places)
            return sum(stayed[at] for at in places) / count if count else None

        dtype = str(self._parameters[self._half[0]].dtype).removeprefix("torch.")
        return Lost(since, dtype, tuple(share(places) for places in groups.values()), share(gains))


def _has_copy(optimizer: torch.optim.Optimizer, parameter: Tensor) -> bool:
    """Return whether the optimizer keeps a tensor of the parameter's shape that is none of the usual moments."""
    state = optimizer.state.get(parameter, {})
    return any(
        isinstance(value, Tensor) and value.shape == parameter.shape and key not in MOMENTS
        for key, value in state.items()
    )
