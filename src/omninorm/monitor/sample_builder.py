"""Builds steps, samples and the first NaN from the raw numbers of the buffers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from omninorm.monitor.checks.facts import StepChecks
from omninorm.monitor.history import NonFinite, Sample, Step
from omninorm.monitor.model_map.structure import Structure
from omninorm.monitor.probes.optimizer import decays
from omninorm.monitor.stats_buffer import UNSEEN, Row

Numbers = Sequence[float | None]


def step_of(row: Row, step: int, rate: float | None, checks: StepChecks | None = None) -> Step:
    """Return the step's loss, total gradient norm and learning rate, NaN where unknown, and its checks."""
    seen = [norm for norm in row.gradients if norm != UNSEEN]
    total = math.hypot(*seen) if seen else math.nan
    return Step(step, math.nan if row.loss is None else row.loss, total, math.nan if rate is None else rate, checks)


def has_gradients(row: Row) -> bool:
    """Return whether a backward pass reached a parameter in this step."""
    return any(norm != UNSEEN for norm in row.gradients)


def first_nonfinite(
    row: Row, step: int, sentinels: Sequence[str], parameters: Sequence[str], order: Mapping[int, int]
) -> NonFinite | None:
    """Return the first non-finite value of this step: in forward, the loss, backward (from the loss), or the weights.

    Args:
        order: for each sentinel that has run, its place in the order of execution.
    """
    after = None
    for at in sorted(order, key=lambda index: order[index]):
        if not math.isfinite(row.sentinels[at]):
            return NonFinite(step, "forward", sentinels[at], kind(row.sentinels[at]), after)
        if row.sentinels[at] != UNSEEN:
            after = sentinels[at]
    if row.loss is not None and not math.isfinite(row.loss):
        return NonFinite(step, "loss", None, kind(row.loss))
    # Backward runs through the last layers first, and all earlier gradients are then non-finite as well.
    for name, value in reversed(list(zip(parameters, row.gradients, strict=True))):
        if not math.isfinite(value):
            return NonFinite(step, "backward", name, kind(value))
    for name, value in zip(parameters, row.weights, strict=True):
        if not math.isfinite(value):
            return NonFinite(step, "optimizer", name, kind(value))
    return None


def kind(value: float) -> str:
    return "nan" if math.isnan(value) else "inf"


def root(values: Numbers) -> list[float | None]:
    return [None if value is None else math.sqrt(value) if value >= 0 else math.nan for value in values]


def root_ratio(over: Numbers, under: Numbers) -> list[float | None]:
    """Return √(over/under), None where either is unknown."""
    return [
        None if a is None or b is None else math.sqrt(a / b) if b > 0 and a >= 0 else (math.nan if a != 0 else 0.0)
        for a, b in zip(over, under, strict=True)
    ]


class NoiseScale:
    """The gradient noise scale tr Σ/|G|² in examples, from the gradients of the norms' gains, smoothed over samples.

    For B examples with mean gradient G_B and single gradients G_1, |G|² ≈ (B|G_B|² − |G_1|²)/(B − 1) and
    tr Σ ≈ (|G_1|² − |G_B|²)/(1 − 1/B). Both are averaged before the division. McCandlish et al. 2018, arXiv
    1812.06162; from norm layers alone: Gray et al. 2024, arXiv 2411.00999.
    """

    KEEP = 0.9

    def __init__(self) -> None:
        self._signal = self._noise = 0.0

    def update(self, small: Numbers, big: Numbers, examples: Numbers) -> float | None:
        """Return the scale after this sample; None if no norm provided gradients per example, or noise dominates G."""
        count = next((value for value in examples if value is not None), None)
        if count is None or count < 2:
            return None
        one = math.fsum(value for value in small if value is not None)
        all_of_them = math.fsum(value for value in big if value is not None)
        if not (math.isfinite(one) and math.isfinite(all_of_them)):
            return None
        signal, noise = (count * all_of_them - one) / (count - 1), (one - all_of_them) / (1 - 1 / count)
        self._signal = self.KEEP * self._signal + signal
        self._noise = self.KEEP * self._noise + noise
        return self._noise / self._signal if self._signal > 0 else None


class SampleBuilder:
    """Builds a Sample from the numbers of a sampled step.

    Args:
        structure: the structure of the model.
        places: each group's parameters, as indices into all parameters.
    """

    def __init__(self, structure: Structure, places: dict[str, list[int]], names: Sequence[str]) -> None:
        self._places, self._names, self._norms = places, names, structure.norms
        self._noise = NoiseScale()
        matrices = {name for group in structure.groups.values() for name, tensor in group if tensor.ndim >= 2}
        self._matrices = {at for at, name in enumerate(names) if name in matrices}

    def build(
        self,
        step: int,
        cells: dict[str, list[float | None]],
        row: Row,
        gains: dict[str, list[float | None]],
        tensors: dict[str, list[float]],
    ) -> Sample:
        """Return the sample of `step`.

        Args:
            cells: the cells of the buffers.
            row: the row of this step.
            gains: gain_max, gain_ratio and gain_small of each norm.
            tensors: weight_rms, update_ratio, adam_ratio and adam_eps_ratio of each parameter.
        """
        noise = self._noise.update(cells["noise_small"], cells["noise_big"], cells["examples"])
        signals: dict[str, Numbers] = {
            "stream_rms": root(cells["stream_ms"]),
            "branch_ratio": root_ratio(cells["difference_ms"], cells["input_ms"]),
            "attention_ratio": root_ratio(cells["attention_ms"], cells["input_ms"]),
            "feed_forward_ratio": root_ratio(cells["feed_forward_ms"], cells["input_ms"]),
            "stream_grad": root(cells["stream_grad_ms"]),
            "norm_rms": root(cells["norm_ms"]),
            "noise_scale": [noise],
            "grad_norm": self._per_group(row.gradients, _norm),
            **gains,
        }
        same = ("stream_max", "stream_median", "angle", "attention_logit", "attention_entropy", "dead_units")
        for name in (*same, "eps_share", "mean_share", "saturation", "logz", "logz_mean"):
            signals[name] = cells[name]
        worst: dict[str, Sequence[str | None]] = {}
        for name, choose in (("weight_rms", _rms), ("update_ratio", _median)):
            if name in tensors:
                signals[name] = self._per_group(tensors[name], choose)
        for name, choice in (("adam_ratio", max), ("adam_eps_ratio", min)):
            if name in tensors:
                decisive = self._decisive(name, tensors[name])
                signals[name] = self._per_group(decisive, choice)
                worst[name] = [self._worst(places, decisive, choice) for places in self._places.values()]
        seen = {name: values for name, values in signals.items() if any(value is not None for value in values)}
        return Sample(
            step,
            seen,
            worst,
            probabilities=cells["probabilities"][0],
            next_tokens=cells["next_tokens"][0],
            shifted_tokens=cells["shifted_tokens"][0],
            same_tokens=cells["same_tokens"][0],
            visible_future=[None if hidden is None else 1.0 - hidden for hidden in cells["hidden_future"]],
        )

    def with_decay(
        self, sample: Sample, parameters: Sequence[nn.Parameter], optimizers: Sequence[torch.optim.Optimizer]
    ) -> Sample:
        """Return the sample with learning rate × weight decay of the groups' matrices and of the norms' gains."""
        shares = decays(parameters, optimizers)
        places = {id(parameter): at for at, parameter in enumerate(parameters)}
        gains = [shares.get(places.get(id(norm.gain), -1)) for norm in self._norms]
        return replace(sample, decay=self._decay(shares), gain_decay=gains)

    def _decay(self, shares: Mapping[int, float]) -> list[float | None]:
        """Return the largest learning rate × weight decay of each group's matrices, given those of the parameters."""
        matrices = {at: share for at, share in shares.items() if at in self._matrices}
        return [
            max((matrices[at] for at in places if at in matrices), default=None) for places in self._places.values()
        ]

    def _decisive(self, name: str, values: Sequence[float]) -> Sequence[float]:
        """Return the values to choose the worst from. For Adam's ε only the matrices of a group count, if it has any:
        the gradient of a key's bias, for example, is 0 up to rounding."""
        if name != "adam_eps_ratio":
            return values
        kept = list(values)
        for places in self._places.values():
            if self._matrices.intersection(places):
                for at in set(places) - self._matrices:
                    kept[at] = UNSEEN
        return kept

    def _per_group(self, values: Sequence[float], choose: Any) -> list[float | None]:
        result: list[float | None] = []
        for places in self._places.values():
            known = [values[at] for at in places if values[at] != UNSEEN]
            result.append(float(choose(known)) if known else None)
        return result

    def _worst(self, places: Sequence[int], values: Sequence[float], choice: Any) -> str | None:
        known = [at for at in places if values[at] != UNSEEN]
        return self._names[choice(known, key=lambda at: values[at])] if known else None


def _norm(values: Sequence[float]) -> float:
    return math.hypot(*values)


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) if all(math.isfinite(v) for v in values) else math.nan


def _rms(values: Sequence[float]) -> float:
    return math.hypot(*values) / math.sqrt(len(values))
