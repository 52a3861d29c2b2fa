"""dead-experts: no token chooses some experts of a block.

Signal: the share of the tokens that choose an expert. Threshold: below 1 % of its fair share, choices/experts. It is a
warning: the model trains without these experts, and in a pretrained model they may serve other data. Persistence: 4
samples over 30 steps, in which a balanced load would have given the expert 50 tokens or more: an expert with a tenth of
its fair share is then missed by all of them in 0.7 % of the cases. [ours] Unequal load early in training is normal.
Blocks whose router has collapsed are left to router-collapse.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from omninorm.monitor.history import History, Load, Sample
from omninorm.monitor.rules.base import Rule
from omninorm.monitor.rules.expert_load import BALANCE, fair_share, listed, load_at, router_of
from omninorm.monitor.rules.numbers import Streaks
from omninorm.monitor.rules.router_collapse import WARN, collapsed_share
from omninorm.record.alarm import Alarm
from omninorm.record.signals import Limit

DEAD = 0.01
EXPECTED = 50.0
SAMPLES, STEPS = 4, 30


class DeadExperts(Rule):
    """Reports the router, with the numbers of the experts."""

    name = "dead-experts"
    source = "the limits, 1 % of the fair share and 50 expected tokens, are omninorm's own"
    explains = ("gradient-underflow",)

    def __init__(self) -> None:
        self._streaks = Streaks()
        self._expected: dict[tuple[int, int], float] = {}  # tokens of a balanced load since an expert has been dead

    def limits(self) -> Sequence[Limit]:
        return (Limit("expert_least", self.name, DEAD, below=True, condition="unless its router has collapsed"),)

    def on_sample(self, history: History, sample: Sample) -> Iterable[Alarm]:
        for block in range(len(history.facts.blocks)):
            load = load_at(sample, block)
            if load is None:
                continue
            dead = [expert for expert in range(len(load.shares)) if self._is_dead(sample, block, expert, load)]
            if dead and collapsed_share(load) <= WARN:
                yield self._explain(history, sample, block, dead, load)

    def _is_dead(self, sample: Sample, block: int, expert: int, load: Load) -> bool:
        key, fair = (block, expert), fair_share(load)
        holds = load.shares[expert] < DEAD * fair
        self._expected[key] = self._expected.get(key, 0.0) + load.tokens * fair if holds else 0.0
        lasting = self._streaks.lasts(key, holds, sample.step, SAMPLES, STEPS)
        return lasting and self._expected[key] >= EXPECTED

    def _explain(self, history: History, sample: Sample, block: int, dead: list[int], load: Load) -> Alarm:
        router, count = router_of(history.facts, block), len(load.shares)
        tokens = min(self._expected[block, expert] for expert in dead)
        verb = "gets" if len(dead) == 1 else "get"
        evidence = (
            f"{listed(dead).capitalize()} of the {count} that {router} chooses from {verb} no tokens: with a balanced "
            f"load, about {tokens:.3g} of the measured tokens would have gone to each."
        )
        remedy = (
            f"{BALANCE} Check as well that nothing masks these experts, such as a grouped choice or a bias of −∞. "
            "If the model is pretrained, they may serve data that this run does not have."
        )
        return self.alarm(sample.step, "warn", router, evidence, remedy)
