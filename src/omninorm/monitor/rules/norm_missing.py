"""norm-missing: one block has fewer norms than its siblings.

Facts: the norm modules of each block, compared among blocks of the same class with the same matrices in one chain. A
norm that does not run in the first 3 samples does not count. Norms inside the attention do not count either: models
apply qk-norm in some blocks only (Llama 4). Threshold: one block of 4 or more, or less than a quarter of them, has
fewer norms than all the others, which have equally many; of 3 blocks, one that has none. [ours] The first and the last
block may differ by design (ModernBERT's first attention has no norm). Persistence: none, because it is the structure of
the model. It is a warning.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from omninorm.monitor.history import Facts, History, Sample
from omninorm.monitor.rules.base import Rule
from omninorm.monitor.rules.numbers import value_at
from omninorm.record.alarm import Alarm

SAMPLES, FEWEST, SHARE = 3, 4, 0.25
FEWEST_WITHOUT = 3  # siblings of a block without any norm


class NormMissing(Rule):
    """Reports each block without one of its norms."""

    name = "norm-missing"
    source = "the threshold, less than a quarter of the sibling blocks, is omninorm's own; see docs/watching.md"

    def __init__(self) -> None:
        self._ran: set[int] = set()
        self._blocks_ran: set[int] = set()

    def on_sample(self, history: History, sample: Sample) -> Iterable[Alarm]:
        facts = history.facts
        self._ran |= {at for at in range(len(facts.norms)) if value_at(sample, "norm_rms", at) is not None}
        self._blocks_ran |= {at for at in range(len(facts.blocks)) if value_at(sample, "stream_rms", at) is not None}
        known = self._ran if len(history.samples) >= SAMPLES else set(range(len(facts.norms)))
        counts = _count(facts, known)
        for siblings in _siblings(facts, self._blocks_ran):
            usual = max(counts[at] for at in siblings)
            fewer = [at for at in siblings if counts[at] < usual]
            if _are_few(fewer, siblings) or _is_without(fewer, siblings, counts):
                for at in sorted(set(fewer) - _ends(facts)):
                    yield self._explain(sample, facts.blocks[at], counts[at], usual, len(siblings) - len(fewer))

    def _explain(self, sample: Sample, block: str, count: int, usual: int, others: int) -> Alarm:
        has = "no norm" if count == 0 else "1 norm" if count == 1 else f"{count} norms"
        norms = "1 norm" if usual == 1 else f"{usual} norms"
        evidence = f"Norm missing: {block} has {has}, and {others} blocks of the same kind have {norms} each."
        remedy = f"Look for a norm of {block} that was removed, replaced by nn.Identity, or is not called."
        return self.alarm(sample.step, "warn", block, evidence, remedy)


def _count(facts: Facts, known: set[int]) -> Counter[int]:
    """Count the norms of each block outside its attention, among the known norms."""
    found: Counter[int] = Counter()
    for at, norm in enumerate(facts.norms):
        if norm.block is None or at not in known:
            continue
        attention = facts.attentions[norm.block] if norm.block < len(facts.attentions) else None
        inside = attention not in (None, facts.blocks[norm.block]) and norm.name.startswith(f"{attention}.")
        found[norm.block] += not inside
    return found


def _siblings(facts: Facts, ran: set[int]) -> Iterable[list[int]]:
    """Yield the blocks of each chain that are alike and ran."""
    for chain in _chains(facts):
        kinds: dict[int, list[int]] = {}
        for at in chain:
            if at in ran and at < len(facts.alike):
                kinds.setdefault(facts.alike[at], []).append(at)
        yield from kinds.values()


def _are_few(fewer: Sequence[int], siblings: Sequence[int]) -> bool:
    one = len(fewer) == 1 and len(siblings) >= FEWEST
    return bool(fewer) and (one or len(fewer) < SHARE * len(siblings))


def _is_without(fewer: Sequence[int], siblings: Sequence[int], counts: Counter[int]) -> bool:
    """Return whether a single block has no norm at all."""
    return len(fewer) == 1 and counts[fewer[0]] == 0 and len(siblings) >= FEWEST_WITHOUT


def _ends(facts: Facts) -> set[int]:
    return {at for chain in _chains(facts) if chain for at in (chain[0], chain[-1])}


def _chains(facts: Facts) -> Sequence[Sequence[int]]:
    return facts.chains or [range(len(facts.blocks))]
