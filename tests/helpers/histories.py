"""Synthetic histories, and the alarms that a rule reports about them."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterable, Sequence

from omninorm.monitor import Alarm, Facts, History, NormFacts, Sample, Step
from omninorm.monitor.rules import Rule

BLOCKS = 4
Signals = dict[str, Sequence[float | None]]


def facts(blocks: int = BLOCKS, **changes: object) -> Facts:
    names = tuple(f"blocks.{index}" for index in range(blocks))
    known: dict[str, object] = {
        "blocks": names,
        "norms": tuple(NormFacts(f"{name}.norm", "RMSNorm", 1e-6, index) for index, name in enumerate(names)),
        "groups": (*names, "embedding"),
        "attentions": tuple(f"{name}.attention" for name in names),
        "feed_forwards": tuple(f"{name}.feed_forward" for name in names),
        "adam_eps": 1e-8,
        "every": 10,
    }
    return Facts(**{**known, **changes})  # type: ignore[arg-type]


def give_samples(
    rule: Rule, samples: Iterable[Signals], history: History | None = None, worst: bool = True
) -> list[list[Alarm]]:
    """Return what the rule reports at each sample. Samples are 10 steps apart, the first is at step 1."""
    history = history or History(facts=facts())
    names = {"adam_ratio": [f"{group}.w" for group in history.facts.groups]}
    names["adam_eps_ratio"] = names["adam_ratio"]
    reports = []
    for count, signals in enumerate(samples):
        history.samples.append(Sample(max(10 * count, 1), signals, names if worst else {}))
        reports.append(list(rule.on_sample(history, history.samples[-1])))
        assert {(alarm.step, alarm.source) for alarm in reports[-1]} <= {(history.samples[-1].step, rule.source)}
    return reports


def give_steps(
    rule: Rule, losses: Iterable[float], norms: Iterable[float] = (), lrs: Iterable[float] = (),
    history: History | None = None, start: int = 1,
) -> list[Alarm]:  # fmt: skip
    """Return what the rule reports about these steps. Missing norms are unknown, missing learning rates are 1e-3."""
    history, norms, lrs = history or History(facts=facts()), iter(norms), iter(lrs)
    found = []
    for number, loss in enumerate(losses, start):
        history.steps.append(Step(number, loss, next(norms, math.nan), next(lrs, 1e-3)))
        found += rule.on_step(history, history.steps[-1])
    return found


def last(rule: Rule, samples: list[Signals], history: History | None = None) -> list[tuple[str, str | None]]:
    """Return severity and layer of the alarms at the last sample."""
    return [(alarm.severity, alarm.layer) for alarm in give_samples(rule, samples, history)[-1]]


def first(reports: list[list[Alarm]]) -> int | None:
    """Return the index of the first sample with an alarm."""
    return next((index for index, alarms in enumerate(reports) if alarms), None)


def noise(count: int, mean: float = 3.0, spread: float = 0.05) -> list[float]:
    generator = random.Random(7)
    return [generator.gauss(mean, spread) for _ in range(count)]


def layers(value: float, other: float | None = None, at: int = 2, count: int = BLOCKS) -> list[float]:
    """Return a signal with the same value in all layers but one."""
    return [other if index == at and other is not None else value for index in range(count)]


def rates(ratio: float, weights: float, entropy: float = 0.9) -> Signals:
    return {"update_ratio": [ratio] * 5, "weight_rms": [weights] * 5, "attention_entropy": layers(entropy)}


def numbers_in(text: str) -> list[float]:
    """Return the numbers in an alarm's text. Digits that belong to a name, as in blocks.2 or fp16, are left out."""
    found = re.findall(r"(?<![\w.])\d+(?:,\d{3})*(?:\.\d+)?(?:e[+-]?\d+)?", text)
    return [float(number.replace(",", "")) for number in found]
