"""The timing loop: each round times all contestants in random order, and ratios are computed within a round.

A machine's speed drifts: another process takes a core, a clock frequency changes. If each contestant were timed in one
piece, this drift would look like a difference. So each round times every contestant once, and the ratio of two
contestants is the *median of the rounds' ratios*, everywhere in the benchmark.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

OURS = "omninorm"
# If one call is shorter than this, a sample has several calls, so that the cost of reading the clock is negligible.
_SHORTEST_SAMPLE_NS = 200_000
_MIN_ROUNDS, _MAX_ROUNDS = 7, 400
_MAX_CALLS = 1000


class Contestant(NamedTuple):
    """An implementation to time.

    Args:
        name: its name in results.
        call: a function of an index that does the work on the inputs with this index and returns the result.
        role: "ours", "peer" (computes the same), "other" (an alternative that computes something else), or "limit" (the
            memory traffic alone).
        bytes: the minimum memory traffic of the work; 0 if its bandwidth is meaningless.
    """

    name: str
    call: Callable[[int], Any]
    role: str
    bytes: int = 0


class Case(NamedTuple):
    """The contestants for one job, and the number of inputs that they use in turn."""

    name: str
    contestants: Sequence[Contestant]
    inputs: int
    grad: bool


Samples = dict[str, list[float]]


def time_case(case: Case, seconds: float, min_rounds: int = _MIN_ROUNDS, warm_up: int = 3, seed: int = 0) -> Samples:
    """Return the nanoseconds per call of every contestant in every round, after `warm_up` calls of each.

    Rounds continue for `seconds`, but there are at least `min_rounds`. The result of a call stays alive until its
    inputs are used again, so that outputs rotate through memory like inputs.
    """
    loop = _Loop(case)
    order = list(case.contestants)
    samples: Samples = {each.name: [] for each in order}
    shuffle = random.Random(seed).shuffle
    with torch.set_grad_enabled(case.grad), _no_garbage_collection():
        calls = loop.calls_per_sample(warm_up)
        end = time.perf_counter() + seconds
        rounds = 0
        while rounds < min_rounds or (time.perf_counter() < end and rounds < _MAX_ROUNDS):
            shuffle(order)
            for each in order:
                samples[each.name].append(loop.sample(each, calls))
            rounds += 1
    return samples


class _Loop:
    """Calls contestants on inputs in turn and keeps their results."""

    def __init__(self, case: Case) -> None:
        self._case = case
        self._kept: list[Any] = [None] * case.inputs
        self._turn = 0

    def sample(self, contestant: Contestant, calls: int) -> float:
        """Return the nanoseconds per call, over `calls` calls.

        If inputs rotate, an untimed call comes first. Its result gets the memory that the previous contestant has just
        freed, which may still be in the cache. The timed calls get memory that was last used a whole rotation ago.
        """
        kept, call, count, turn = self._kept, contestant.call, self._case.inputs, self._turn
        if count > 1:
            kept[turn] = call(turn)
            turn = (turn + 1) % count
        start = time.perf_counter_ns()
        for _ in range(calls):
            kept[turn] = call(turn)
            turn = (turn + 1) % count
        elapsed = time.perf_counter_ns() - start
        self._turn = turn
        return elapsed / calls

    def calls_per_sample(self, warm_up: int) -> int:
        """Warm up every contestant; return the number of calls in a sample, which the fastest contestant determines."""
        fastest = math.inf
        for each in self._case.contestants:
            for _ in range(warm_up):
                elapsed = self.sample(each, 1)
            fastest = min(fastest, elapsed)
        return max(1, min(_MAX_CALLS, math.ceil(_SHORTEST_SAMPLE_NS / fastest)))


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def summarize(values: Sequence[float]) -> dict[str, float]:
    """Return the median and the quartiles.

    Example:
        >>> summarize([3.0, 1.0, 2.0])
        {'median': 2.0, 'q1': 1.5, 'q3': 2.5}
    """
    if len(values) == 1:
        return dict.fromkeys(("median", "q1", "q3"), values[0])
    q1, _, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": statistics.median(values), "q1": q1, "q3": q3}


def paired_ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Return our time divided by theirs, round by round.

    Example:
        >>> paired_ratios([1.0, 4.0], [2.0, 2.0])
        [0.5, 2.0]
    """
    return [a / b for a, b in zip(ours, theirs, strict=True)]


def report_samples(case: Case, samples: Samples) -> dict[str, Any]:
    """Return a case's results: each contestant's median, quartiles and GB/s, and the ratios of ours to the others."""
    contestants = {}
    for each in case.contestants:
        times = summarize(samples[each.name])
        rate = each.bytes / times["median"] if each.bytes else None
        contestants[each.name] = {"role": each.role, "ns": times, "gb_per_s": rate}
    ours = samples[OURS]
    ratios = {name: summarize(paired_ratios(ours, theirs)) for name, theirs in samples.items() if name != OURS}
    return {"case": case.name, "rounds": len(ours), "contestants": contestants, "ratios": ratios}
