"""Measures optimizer steps: their size relative to the weights, and how far Adam's second moment lags behind.

At most about a thousand evenly spaced elements of each tensor are read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from omninorm.monitor.hooks.training_pass import safely
from omninorm.monitor.probes.block import stride
from omninorm.monitor.probes.gradients import norms_of, spread
from omninorm.monitor.stats_buffer import UNSEEN, StatsBuffer
from omninorm.monitor.tensors import by_kind, constant, here, stack

# Elements per tensor: in sampled steps, and in every step to detect NaNs.
SAMPLED, EVERY_STEP = 1024, 64


def some(x: Tensor, most: int = SAMPLED) -> Tensor:
    """Return at most about `most` evenly spaced elements of x, 1-D; a view if x is contiguous. Of a DTensor, read the
    local shard: each process monitors its own part."""
    flat = here(x.detach()).reshape(-1)
    return flat[:: stride(flat.numel(), most)]


def any_some(x: Tensor, most: int = EVERY_STEP) -> Tensor:
    """Return a view of at most about `most` elements of x, evenly spaced in memory; of a DTensor, the local shard."""
    x = here(x.detach())
    step = memory_stride(tuple(x.shape), x.stride(), most)
    return some(x, most) if step is None else x.as_strided((-(-x.numel() // step),), (step,))


@lru_cache(maxsize=4096)
def memory_stride(shape: tuple[int, ...], strides: tuple[int, ...], most: int) -> int | None:
    """Return the stride that selects about `most` elements in memory; None if they are not next to each other."""
    count = 1
    for size, distance in sorted(zip(shape, strides, strict=True), key=lambda each: each[1]):
        if size != 1 and distance != count:
            return None
        count *= size
    return stride(count, most)


class OptimizerWatch:
    """Hooks on the optimizers; `take` returns the measurements of a sampled step.

    Args:
        parameters: all monitored parameters; results are in this order.
        failed: called with a monitoring error, which must not reach the training.
        announce: called before each optimizer step.
    """

    def __init__(
        self,
        buffer: StatsBuffer,
        parameters: Sequence[nn.Parameter],
        optimizers: Sequence[torch.optim.Optimizer],
        failed: Callable[[Exception], None],
        announce: Callable[[], None],
    ) -> None:
        self._buffer, self._parameters, self._optimizers, self._failed = buffer, parameters, optimizers, failed
        self._announce = announce
        self._places = {id(parameter): at for at, parameter in enumerate(parameters)}
        self._learning = [at for at, p in enumerate(parameters) if p.requires_grad and p.is_floating_point()]
        self._before: dict[int, Tensor] = {}
        self._found: dict[str, Tensor] = {}
        self._rates: list[float] = []
        self._stepped = False

    def attach(self) -> list[RemovableHandle]:
        """Register hooks before and after each optimizer step."""
        return [
            handle
            for optimizer in self._optimizers
            for handle in (
                optimizer.register_step_pre_hook(
                    lambda it, *_: safely(lambda: self._before_step(it), self._failed),
                ),
                optimizer.register_step_post_hook(
                    lambda it, *_: safely(lambda: self._after_step(it), self._failed),
                ),
            )
        ]

    def rate(self) -> float | None:
        """Return the largest learning rate of the last step; None if none is on the host.

        A scheduler may have changed it since. Without a step, as when a GradScaler skips it, return the current one.
        """
        noted, self._rates = self._rates, []
        return max(noted or [rate for optimizer in self._optimizers for rate in rates(optimizer)], default=None)

    def _note_rate(self, optimizer: torch.optim.Optimizer) -> None:
        self._rates += rates(optimizer)

    def take(self) -> dict[str, Tensor]:
        """Return update_ratio, adam_ratio, adam_eps_ratio of the last step, each (parameters,)."""
        found, self._found = self._found, {}
        return found

    def _watched(self, optimizer: torch.optim.Optimizer) -> list[tuple[int, Tensor, dict[str, Any]]]:
        """Return (place, parameter, group) of the model's floating-point parameters in this optimizer."""
        return [
            (self._places[id(parameter)], parameter, group)
            for group in optimizer.param_groups
            for parameter in group["params"]
            if id(parameter) in self._places and parameter.is_floating_point()
        ]

    def _some_weights(self) -> list[Tensor]:
        """Return views of some elements of every trainable parameter. They are not kept, because they would keep the
        memory of a model that is moved."""
        return [any_some(self._parameters[at]) for at in self._learning]

    def _before_step(self, optimizer: torch.optim.Optimizer) -> None:
        self._note_rate(optimizer)
        self._announce()
        # Including those without a gradient: a closure may compute gradients inside the step.
        if self._buffer.sampling:
            self._before = copies({place: some(parameter) for place, parameter, _ in self._watched(optimizer)})

    def see_weights(self) -> None:
        """Measure the weights' norms, to detect NaNs. Called after all optimizer steps."""
        stepped, self._stepped = self._stepped, False
        if stepped and self._learning:
            self._see_weights(stack(norms_of(self._some_weights()), self._buffer.device))

    def _after_step(self, optimizer: torch.optim.Optimizer) -> None:
        self._stepped = True
        if not self._buffer.sampling:
            return
        watched = [item for item in self._watched(optimizer) if item[0] in self._before and has_gradient(item[1])]
        if watched:
            self._measure_updates(watched)
            self._measure_adam(optimizer, watched)
        self._before = {}

    def _see_weights(self, norms: Tensor) -> None:
        if len(self._learning) < len(self._parameters):
            norms = spread(norms, constant(tuple(self._learning), norms.device), len(self._parameters))
        self._buffer.set_weights(norms)

    def _measure_updates(self, watched: Sequence[tuple[int, Tensor, dict[str, Any]]]) -> None:
        """Measure RMS(Δw)/RMS(w) of matrices."""
        matrices = [(place, parameter) for place, parameter, _ in watched if parameter.ndim >= 2]
        if not matrices:
            return
        before = [self._before[place] for place, _ in matrices]
        after = [some(parameter) for _, parameter in matrices]
        changes = stack(norms_of(torch._foreach_sub(after, before)), self._buffer.device)
        sizes = stack(norms_of(before), self._buffer.device)
        self._write("update_ratio", [place for place, _ in matrices], changes / sizes.clamp_min(1e-30))

    def _measure_adam(
        self, optimizer: torch.optim.Optimizer, watched: Sequence[tuple[int, Tensor, dict[str, Any]]]
    ) -> None:
        """Measure √mean(g²/max(v̂, ε²)) with the bias-corrected second moment, and RMS(g)/ε.

        The gradients are read after the step, because a fused optimizer unscales them inside it.
        """
        for group in optimizer.param_groups:
            eps = group_eps(group)
            if eps is None:
                continue
            places, gradients, moments, counts = [], [], [], []
            for place, parameter, its_group in watched:
                state = optimizer.state.get(parameter, {})
                second, count = state.get("exp_avg_sq"), state.get("step")
                if its_group is not group or second is None or count is None or second.shape != parameter.shape:
                    continue
                places.append(place)
                gradients.append(some(parameter.grad).float())  # type: ignore[arg-type]
                moments.append(some(second).to(gradients[-1].device, torch.float32))
                counts.append(torch.as_tensor(count, dtype=torch.float32))
            if places:
                # A parameter that was added later has made fewer steps.
                made = torch.stack(counts).to(gradients[0].device, non_blocking=True)
                corrections = 1 - group["betas"][1] ** made
                corrected = torch._foreach_div(moments, corrections.unbind())
                self._write_adam(places, gradients, corrected, max(eps, 1e-30))

    def _write_adam(
        self, places: Sequence[int], gradients: list[Tensor], moments: Sequence[Tensor], eps: float
    ) -> None:
        device = self._buffer.device
        roots = constant(tuple(g.numel() ** 0.5 for g in gradients), device, torch.float32)
        # √v̂ is clamped to ε instead of v̂ to ε², because ε² may underflow.
        floors = list(torch._foreach_sqrt(list(moments)))
        torch._foreach_clamp_min_(floors, eps)
        of_eps = stack(norms_of(gradients), device) / roots / eps
        ratios = stack(norms_of(torch._foreach_div(gradients, floors)), device) / roots
        for key, values in (("adam_eps_ratio", of_eps), ("adam_ratio", ratios)):
            # Not finite if a GradScaler skipped the step; other NaNs are detected elsewhere.
            self._write(key, places, torch.where(values.isfinite(), values, UNSEEN))

    def _write(self, key: str, places: Sequence[int], values: Tensor) -> None:
        device = self._buffer.device
        if key not in self._found:
            self._found[key] = torch.full((len(self._parameters),), UNSEEN, device=device, dtype=values.dtype)
        self._found[key][constant(tuple(places), device)] = values


def copies(tensors: dict[int, Tensor]) -> dict[int, Tensor]:
    """Copy one-dimensional tensors, with one operator for those of each device and dtype."""
    found: dict[int, Tensor] = {}
    for places in by_kind(tensors).values():
        together = torch.cat([tensors[place] for place in places])
        found |= zip(places, torch.split(together, [tensors[place].numel() for place in places]), strict=True)
    return found


def rates(optimizer: torch.optim.Optimizer) -> list[float]:
    """Return the learning rates of the optimizer's groups that can be read without synchronizing."""
    found = [group.get("lr") for group in optimizer.param_groups]
    return [float(rate) for rate in found if rate is not None and (isinstance(rate, (int, float)) or _is_on_host(rate))]


def decays(parameters: Sequence[nn.Parameter], optimizers: Sequence[torch.optim.Optimizer]) -> dict[int, float]:
    """Return learning rate × weight decay of the parameters, by place, where it can be read without synchronizing."""
    places = {id(parameter): place for place, parameter in enumerate(parameters)}
    found: dict[int, float] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            rate, decay = group.get("lr"), group.get("weight_decay", 0.0)
            if rate is None or not all(isinstance(x, (int, float)) or _is_on_host(x) for x in (rate, decay)):
                continue
            share = float(rate) * float(decay)
            found |= {places[id(p)]: share for p in group["params"] if id(p) in places}
    return found


def _is_on_host(rate: object) -> bool:
    return isinstance(rate, Tensor) and rate.device.type == "cpu" and rate.numel() == 1


def has_gradient(parameter: Tensor) -> bool:
    """Return whether there is a dense gradient."""
    return parameter.grad is not None and not parameter.grad.is_sparse


def adam_eps(optimizers: Sequence[torch.optim.Optimizer]) -> float | None:
    """Return the ε of the first optimizer that is a variant of Adam."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            eps = group_eps(group)
            if eps is not None:
                return eps
    return None


def group_eps(group: dict[str, Any]) -> float | None:
    """Return ε of a group of a variant of Adam; None if it is on a device, or not one number, as for CAME."""
    eps = group.get("eps")
    usable = isinstance(eps, (int, float)) or _is_on_host(eps)
    return float(eps) if usable and "betas" in group else None  # type: ignore[arg-type]
