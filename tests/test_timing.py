"""The timing loop: who is called on what, and what is made of the samples. No test here depends on speed."""

from __future__ import annotations

import gc

import pytest
import torch

from omninorm import timing as measure
from omninorm.timing import OURS, Case, Contestant, paired_ratios, report_samples, summarize, time_case


def counted(names: list[str], inputs: int, grad: bool = False) -> tuple[Case, list[tuple[str, int]]]:
    calls: list[tuple[str, int]] = []
    contestants = [
        Contestant(n, lambda i, n=n: calls.append((n, i)), "ours" if n == OURS else "peer", 100) for n in names
    ]
    return Case("a case", contestants, inputs, grad), calls


def test_inputs_are_taken_in_turn_by_all_together() -> None:
    case, calls = counted([OURS, "a", "b"], 5)
    time_case(case, 0.0, min_rounds=4)
    assert len(calls) > 15
    assert [turn for _, turn in calls] == [number % 5 for number in range(len(calls))]


def test_every_round_has_everyone_once_in_changing_order(monkeypatch) -> None:
    monkeypatch.setattr(measure, "_SHORTEST_SAMPLE_NS", 0)
    case, calls = counted([OURS, "a", "b"], 2)
    samples = time_case(case, 0.0, min_rounds=20, warm_up=2)
    # A sample is a call that is not timed and one that is; two samples of each warm up.
    assert all(calls[at][0] == calls[at + 1][0] for at in range(0, len(calls), 2))
    names = [name for name, _ in calls[::2]]
    rounds = [tuple(names[start : start + 3]) for start in range(6, len(names), 3)]
    assert len(rounds) == 20
    assert all(sorted(each) == sorted([OURS, "a", "b"]) for each in rounds)
    assert len(set(rounds)) > 2, "the order is random in every round"
    assert {name: len(times) for name, times in samples.items()} == {OURS: 20, "a": 20, "b": 20}


def test_outputs_live_until_their_inputs_next_turn() -> None:
    alive: list[int] = []
    most = 0

    class Output:
        def __init__(self) -> None:
            nonlocal most
            alive.append(1)
            most = max(most, len(alive))

        def __del__(self) -> None:
            alive.pop()

    time_case(Case("a case", [Contestant(OURS, lambda i: Output(), "ours")], 4, False), 0.0, min_rounds=3)
    assert most == 5, "four kept and the newest, before it takes the place of one"


@pytest.mark.parametrize("grad", [True, False])
def test_grad_mode_is_the_cases_and_garbage_waits(grad: bool) -> None:
    seen: set[tuple[bool, bool]] = set()
    case = Case(
        "a case", [Contestant(OURS, lambda i: seen.add((torch.is_grad_enabled(), gc.isenabled())), "ours")], 1, grad
    )
    time_case(case, 0.0)
    assert seen == {(grad, False)}
    assert gc.isenabled()
    assert torch.is_grad_enabled()


def test_the_call_behind_another_contestants_is_not_timed(monkeypatch) -> None:
    """Its result takes memory that the other has just freed. The first call of three takes 1 ms, the others 0.1."""
    clock, number = [0], [0]

    def call(_: int) -> None:
        clock[0] += 1_000_000 if number[0] % 3 == 0 else 100_000
        number[0] += 1

    monkeypatch.setattr(measure.time, "perf_counter_ns", lambda: clock[0])
    for inputs, wanted in ((2, 100_000.0), (1, 550_000.0)):
        number[0] = 0
        loop = measure._Loop(Case("a case", [Contestant(OURS, call, "ours")], inputs, False))
        assert loop.sample(Contestant(OURS, call, "ours"), 2) == wanted


def test_a_slow_call_is_a_sample_by_itself_and_a_fast_one_is_not(monkeypatch) -> None:
    ticks = iter(range(0, 10**9, 50_000))  # 50 µs between any two looks at the clock
    monkeypatch.setattr(measure.time, "perf_counter_ns", lambda: next(ticks))
    case, calls = counted([OURS], 1)
    samples = time_case(case, 0.0, min_rounds=1, warm_up=1)
    assert len(calls) == 1 + 4, "four calls of 50 µs fill a sample of 200 µs"
    assert samples == {OURS: [50_000 / 4]}


def test_quartiles() -> None:
    assert summarize([5.0, 1.0, 3.0, 2.0, 4.0]) == {"median": 3.0, "q1": 2.0, "q3": 4.0}
    assert summarize([7.0]) == {"median": 7.0, "q1": 7.0, "q3": 7.0}


def test_a_ratio_is_the_median_of_the_rounds_and_not_of_the_medians() -> None:
    """The machine is ten times slower in two of three rounds, and our advantage of two stays two."""
    case, _ = counted([OURS, "a"], 1)
    report = report_samples(case, {OURS: [1.0, 10.0, 20.0], "a": [2.0, 20.0, 10.0]})
    assert paired_ratios([1.0, 10.0, 20.0], [2.0, 20.0, 10.0]) == [0.5, 0.5, 2.0]
    assert report["ratios"]["a"]["median"] == 0.5
    assert report["contestants"]["a"] == {
        "role": "peer",
        "ns": {"median": 10.0, "q1": 6.0, "q3": 15.0},
        "gb_per_s": 10.0,
    }
    assert report["rounds"] == 3
