"""router-collapse: a router sends all tokens to the same few experts.

Signal: the share of all choices that the most loaded experts get, as many as each token chooses. It is choices/experts
if the load is balanced. Threshold: above 95 % is a warning, above 99 % a "fail" [ours]. Only blocks with at least twice
as many experts as choices are judged, and samples of 16 tokens or more. Persistence, with the same experts: 4 samples
over 30 steps for a warning and 6 over 100 for a "fail". With SGD, routers of healthy models collapsed for 20 of the
first 40 steps and recovered, and some sent each batch to other experts.
Source: Shazeer et al. describe the collapse, which reinforces itself: experts that are chosen train faster.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from omninorm.monitor.history import History, Load, Sample
from omninorm.monitor.rules.base import Rule
from omninorm.monitor.rules.expert_load import BALANCE, fair_share, largest, listed, load_at, router_of, share_of
from omninorm.monitor.rules.numbers import Streaks
from omninorm.record.alarm import Alarm
from omninorm.record.signals import Limit

WARN, FAIL = 0.95, 0.99
FEWEST_TOKENS = 16
SAMPLES, STEPS = 4, 30
FAIL_SAMPLES, FAIL_STEPS = 6, 100


class RouterCollapse(Rule):
    """Reports the router."""

    name = "router-collapse"
    source = "Shazeer et al., arXiv 1701.06538, section 4; the limits of 95 % and 99 % are omninorm's own"
    explains = ("dead-experts", "odd-block", "branch-silent", "no-gradient", "gradient-underflow")

    def __init__(self) -> None:
        self._streaks = Streaks()
        self._chosen: dict[int, list[int]] = {}

    def limits(self) -> Sequence[Limit]:
        return (Limit("expert_load", self.name, WARN, FAIL, condition="of at least twice as many experts as choices"),)

    def on_sample(self, history: History, sample: Sample) -> Iterable[Alarm]:
        for block in range(len(history.facts.blocks)):
            load = load_at(sample, block)
            if load is None:
                continue
            share, chosen = collapsed_share(load), largest(load)
            if self._chosen.get(block) != chosen:
                self._streaks.end((block, WARN))
                self._streaks.end((block, FAIL))
            self._chosen[block] = chosen
            warned = self._streaks.lasts((block, WARN), share > WARN, sample.step, SAMPLES, STEPS)
            failed = self._streaks.lasts((block, FAIL), share > FAIL, sample.step, FAIL_SAMPLES, FAIL_STEPS)
            if warned:
                yield self._explain(history, sample, block, load, "fail" if failed else "warn")

    def _explain(self, history: History, sample: Sample, block: int, load: Load, severity: str) -> Alarm:
        router, chosen = router_of(history.facts, block), largest(load)
        evidence = (
            f"The router {router} has collapsed: {100 * collapsed_share(load):.3g} % of its choices are "
            f"{listed(chosen)} of {len(load.shares)}, where a balanced load would be {100 * fair_share(load):.3g} % "
            "of the tokens for each expert."
        )
        first = next((each for each in history.samples if load_at(each, block)), sample)
        before = load_at(first, block)
        if before is not None and first.step != sample.step:
            evidence += f" At step {first.step} it was {100 * share_of(before, chosen):.3g} %."
        remedy = f"{BALANCE} If it collapsed suddenly, also add a router z-loss or lower the router's learning rate."
        return self.alarm(sample.step, severity, router, evidence, remedy)


def collapsed_share(load: Load) -> float:
    """Return the share of the choices that the most loaded experts get; 0 if it means nothing."""
    if load.tokens < FEWEST_TOKENS or len(load.shares) < 2 * load.choices:
        return 0.0
    return share_of(load, largest(load))
