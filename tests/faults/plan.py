"""The plan of the board: which faults are injected into which architectures, and which runs are healthy."""

from __future__ import annotations

import random
from collections import defaultdict

from faults.architectures import ARCHITECTURES, Architecture
from faults.faults import load_faults
from faults.run import Case
from faults.training import VARIANTS

SEEDS = {"calibration": (0, 1, 2, 3), "held-out": (100, 101, 102, 103)}
HEALTHY_ONLY = tuple(name for name in VARIANTS if name not in ("plain", "tiny learning rate"))


def faulty_cases(split: str | None = None, limit: int | None = None) -> list[Case]:
    """Return faulty runs, in rounds: each fault with its first architecture, then each with its second, and so on.

    The order is drawn once, so a limit of N always means the same N runs.
    """
    generator = random.Random(22)
    rounds: dict[int, list[Case]] = defaultdict(list)
    for fault in load_faults().values():
        found = [a for a in _architectures(split) if fault.applies(a)]
        generator.shuffle(found)
        for place, architecture in enumerate(found):
            seed = generator.choice(SEEDS[architecture.split])
            rounds[place].append(Case(architecture.name, seed, fault.variant, fault.name))
    for cases in rounds.values():
        generator.shuffle(cases)
    return [case for place in sorted(rounds) for case in rounds[place]][:limit]


def healthy_cases(split: str | None = None, limit: int | None = None) -> list[Case]:
    """Return healthy runs: four seeds of each architecture, and one run of each variant; in a fixed random order."""
    cases = [Case(a.name, seed) for a in _architectures(split) for seed in SEEDS[a.split]]
    for a in _architectures(split):
        seed = SEEDS[a.split][0]
        cases += [Case(a.name, seed, variant) for variant in HEALTHY_ONLY if variant != "padding" or a.masks]
    random.Random(22).shuffle(cases)
    return cases[:limit]


def selected(split: str | None, limit: int | None) -> list[Case]:
    """Return the runs of the board; a limit applies to the faulty runs, and half of it to the healthy ones.

    The healthy twins of all faulty runs are part of it.
    """
    faulty = faulty_cases(split, limit)
    healthy = healthy_cases(split, None if limit is None else limit // 2)
    return list(dict.fromkeys([*faulty, *healthy, *(case.twin for case in faulty)]))


def grouped(cases: list[Case]) -> list[list[Case]]:
    """Return the runs in groups that share a healthy twin, which is then trained only once."""
    groups: dict[Case, list[Case]] = defaultdict(list)
    for case in cases:
        groups[case.twin].append(case)
    return list(groups.values())


def _architectures(split: str | None) -> list[Architecture]:
    return [a for a in ARCHITECTURES.values() if split in (None, a.split)]
