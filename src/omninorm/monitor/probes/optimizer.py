"""Measures optimizer steps: their size relative to the weights, and how far Adam's second moment lags behind.

At most about a thousand elements of each tensor are read, in short runs (see `elements`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from omninorm.monitor.hooks.training_pass import safely
from omninorm.monitor.probes.elements import Together, Views, are_finite, packed, row_norms, stacked, together
from omninorm.monitor.probes.gradients import spread, stacked_norms
from omninorm.monitor.stats_buffer import UNSEEN, StatsBuffer
from omninorm.monitor.tensors import constant


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
        self._some_weights = Views([parameters[at] for at in self._learning])
        self._before: list[Together] = []
        self._members: list[tuple[int, Tensor, dict[str, Any]]] = []
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

    def _before_step(self, optimizer: torch.optim.Optimizer) -> None:
        self._note_rate(optimizer)
        self._announce()
        # Including those without a gradient: a closure may compute gradients inside the step.
        if self._buffer.sampling:
            self._members = self._watched(optimizer)
            self._before = together({at: weight for at, weight, _ in self._members if weight.ndim >= 2})

    def see_weights(self) -> None:
        """Measure the weights' norms, to detect NaNs. Called after all optimizer steps."""
        stepped, self._stepped = self._stepped, False
        if not stepped or not self._learning:
            return
        few = self._some_weights.take()
        if not are_finite(few):
            rows = packed(few)
            norms = row_norms(rows) if isinstance(rows, Tensor) else stacked_norms(rows, self._buffer.device)
            self._see_weights(norms)

    def _after_step(self, optimizer: torch.optim.Optimizer) -> None:
        self._stepped = True
        before, self._before = self._before, []
        members, self._members = self._members, []
        if not self._buffer.sampling:
            return
        watched = [item for item in members if has_gradient(item[1]) and item[1].numel() > 0]
        if watched:
            self._measure_updates(before, {place: parameter for place, parameter, _ in watched})
            self._measure_adam(optimizer, watched)

    def _see_weights(self, norms: Tensor) -> None:
        if len(self._learning) < len(self._parameters):
            norms = spread(norms, constant(tuple(self._learning), norms.device), len(self._parameters))
        self._buffer.set_weights(norms)

    def _measure_updates(self, groups: Sequence[Together], after: Mapping[int, Tensor]) -> None:
        """Measure RMS(Δw)/RMS(w) of matrices.

        Args:
            groups: some of their elements before the step.
            after: the parameters that have a gradient.
        """
        for group in groups:
            before, places = group.of(after), [place for place in group.places if place in after]
            if places:
                changes = row_norms(stacked([after[place] for place in places]) - before)
                self._write("update_ratio", places, changes / row_norms(before).clamp_min(1e-30))

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
            states = {}
            for place, parameter, its_group in watched:
                state = optimizer.state.get(parameter, {})
                second, count = state.get("exp_avg_sq"), state.get("step")
                if its_group is group and second is not None and count is not None and second.shape == parameter.shape:
                    states[place] = second, count
            for gradients in together({place: self._parameters[place].grad for place in states}):  # type: ignore[misc]
                self._write_adam(gradients, [states[place] for place in gradients.places], group["betas"][1], eps)

    def _write_adam(self, group: Together, states: Sequence[tuple[Tensor, Any]], beta: float, eps: float) -> None:
        gradients, eps = group.values.float(), max(eps, 1e-30)
        moments = stacked([second for second, _ in states]).to(gradients.device, torch.float32)
        # A parameter that was added later has made fewer steps.
        made = torch.stack([as_float(count) for _, count in states])
        corrections = 1 - beta ** made.to(gradients.device, non_blocking=True)
        # √v̂ is clamped to ε instead of v̂ to ε², because ε² may underflow.
        floors = (moments / corrections.unsqueeze(1)).sqrt_().clamp_min_(eps)
        root = gradients.shape[1] ** 0.5
        found = {
            "adam_eps_ratio": row_norms(gradients) / (root * eps),
            "adam_ratio": row_norms(gradients / floors) / root,
        }
        for key, values in found.items():
            # Not finite if a GradScaler skipped the step; other NaNs are detected elsewhere.
            self._write(key, group.places, torch.where(values.isfinite(), values, UNSEEN))

    def _write(self, key: str, places: Sequence[int], values: Tensor) -> None:
        device = self._buffer.device
        if key not in self._found:
            self._found[key] = torch.full((len(self._parameters),), UNSEEN, device=device, dtype=values.dtype)
        self._found[key][constant(tuple(places), device)] = values.to(device, self._found[key].dtype)


def as_float(count: Any) -> Tensor:
    """Return a number of steps in float32."""
    usual = type(count) is Tensor and count.dtype is torch.float32
    return count if usual else torch.as_tensor(count, dtype=torch.float32)


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
