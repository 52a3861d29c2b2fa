"""Detects updates of 16-bit weights that are lost to rounding."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from omninorm.monitor.checks.facts import Lost
from omninorm.monitor.probes.optimizer import has_gradient, some

# Steps after which the weights are compared with newer ones.
WINDOW = 50
# State of optimizers that is no more precise copy of the weights, nor a correction of their rounding.
MOMENTS = frozenset(
    [
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
        self._half = [at for at, p in enumerate(parameters) if p.dtype in (torch.bfloat16, torch.float16)]
        self._reference: tuple[int, list[int], Tensor] | None = None
        self._found: tuple[int, Tensor, Tensor] | None = None
        self._segments: tuple[list[int], Tensor] | None = None

    def after_step(self, optimizer: torch.optim.Optimizer, held: Collection[int], step: int) -> None:
        """Compare the weights of a sampled step after the optimizer's step, while the gradients are still there."""
        mine = [at for at in self._half if id(self._parameters[at]) in held]
        mine = [at for at in mine if has_gradient(self._parameters[at]) and self._parameters[at].numel() > 0]
        if not mine or any(_has_copy(optimizer, self._parameters[at]) for at in mine):
            return
        few = [some(self._parameters[at]) for at in mine]
        now = torch.cat(few)
        if self._reference is not None and self._reference[1] == mine:
            live = torch.cat([some(self._parameters[at].grad) for at in mine]) != 0  # type: ignore[arg-type]
            still = live & (now == self._reference[2])
            index = self._index(mine, few)
            both = torch.zeros(2, len(self._parameters), dtype=torch.float64, device=now.device)
            both.index_add_(1, index, torch.stack([still, live]).to(torch.float64))
            self._found = self._reference[0], both[0], both[1]
        if self._reference is None or self._reference[1] != mine or step - self._reference[0] >= WINDOW:
            self._reference = step, mine, now

    def _index(self, places: list[int], few: Sequence[Tensor]) -> Tensor:
        """Return each element's parameter, cached because a copy to the device would synchronize."""
        if self._segments is None or self._segments[0] != places:
            counts = torch.tensor([part.numel() for part in few])
            index = torch.tensor(places).repeat_interleave(counts)
            self._segments = places, index.to(few[0].device)
        return self._segments[1]

    def take(self) -> dict[str, Tensor]:
        """Return how many of the compared elements stayed, and how many have a gradient, by parameter."""
        return {} if self._found is None else {"stayed": self._found[1], "live": self._found[2]}

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
