"""Paired comparisons against published quantiles, verdicts, and the share of false positives."""

import math
import random

import pytest

from omninorm.experiments.compare.statistics import BETTER, EQUAL, WORSE, holm, judge, paired, seeds_needed
from omninorm.report.comparison.wording import not_enough_evidence


def test_the_interval_is_students() -> None:
    """Differences 1, 2, 3: mean 2, standard deviation 1, t(0.975, 2) = 4.303 (Student's table)."""
    found = paired([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert found.mean == pytest.approx(2.0)
    assert found.high - found.mean == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)
    assert found.low == pytest.approx(2 * found.mean - found.high)
    assert found.p == pytest.approx(0.0742, abs=1e-4)  # t = 2√3 with 2 degrees of freedom
    assert found.seeds == 3


def test_pairing_finds_a_difference_that_means_alone_do_not() -> None:
    """The seeds differ much more than the differences do."""
    baseline = [1.0, 2.0, 3.0, 4.0]
    found = paired(
        [value - 0.1 + wobble for value, wobble in zip(baseline, (0.01, -0.01, 0.0, 0.0), strict=True)], baseline
    )
    assert found.p < 0.001
    assert judge(found, found.p, 0.02) == BETTER
    assert judge(found, found.p, 0.02, lower_is_better=False) == WORSE


def test_one_seed_gets_no_verdict() -> None:
    found = paired([1.0], [5.0])
    assert math.isinf(found.high)
    assert "no verdict" in judge(found, found.p, 0.02)


def test_no_difference_needs_the_whole_interval_within_the_margin() -> None:
    close = paired([1.001, 0.999, 1.0, 1.0], [1.0] * 4)
    assert judge(close, 1.0, 0.02) == EQUAL
    assert judge(close, 1.0, 1e-4).startswith("not enough evidence (")
    assert judge(paired([1.0] * 3, [1.0] * 3), 1.0, 1e-9) == EQUAL
    for sign in (1, -1):  # the interval reaches beyond the margin on one side only
        found = paired([1 + 0.012 * sign, 1 + 0.002 * sign, 1 + 0.018 * sign], [1.0] * 3)
        assert min(abs(found.low), abs(found.high)) < 0.02 < max(abs(found.low), abs(found.high))
        assert judge(found, 0.2, 0.02).startswith("not enough evidence")


def test_holm_matches_values_computed_by_hand() -> None:
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_more_spread_needs_more_seeds() -> None:
    """For a difference of one standard deviation, p < 0.02 and 80 % power: (2.326 + 0.842)² = 10.04 by the normal distribution's
    quantiles, and some more by Student's."""
    assert 10.04 < seeds_needed(1.0, 1.0) <= 14
    assert seeds_needed(4.0, 1.0) > 100
    assert seeds_needed(0.0, 1.0) == 2


def test_equal_configurations_rarely_get_a_verdict() -> None:
    """200 comparisons of five seeds with five others from the same distribution: at most 5 % may end in a verdict.
    p < 0.02 gives 4 of 200 on average, and more than 10 once in 300 series."""
    draw = random.Random(0)
    false = 0
    for _ in range(200):
        ours, baseline = ([draw.gauss(3.0, 0.05) for _ in range(5)] for _ in range(2))
        found = paired(ours, baseline)
        false += judge(found, found.p, 0.02) in (BETTER, WORSE)
    assert 0 < false <= 10


FAR_APART = paired([3.0, 7.9, 3.1], [3.0, 3.1, 3.05])  # one of our three runs did not learn
BETTER_PAIRS, WORSE_PAIRS = paired([3.0, 3.01, 3.02], [4.4, 4.4, 4.41]), paired([4.4, 4.4, 4.41], [3.0, 3.01, 3.02])


@pytest.mark.parametrize(
    ("result", "p", "learned", "verdict"),
    [
        (BETTER_PAIRS, 0.001, (3, 3), "better"),
        (BETTER_PAIRS, 0.001, (3, 0), "better (no run of the baseline learned)"),
        (WORSE_PAIRS, 0.001, (0, 3), "worse (no run learned)"),
        (WORSE_PAIRS, 0.001, (1, 3), "worse"),
        (WORSE_PAIRS, 0.001, (0, 0), "no verdict (no run learned)"),
        (paired([4.4] * 3, [4.4] * 3), 1.0, (0, 0), "no verdict (no run learned)"),
        (FAR_APART, 0.5, (2, 3), "not enough evidence (1 of 6 runs did not learn)"),
        (FAR_APART, 0.5, (3, 3), "not enough evidence (more than 100 seeds needed)"),
        (FAR_APART, 0.5, None, "not enough evidence (more than 100 seeds needed)"),
        (paired([7.0], [3.0]), 1.0, (0, 1), "no verdict (at least two seeds needed)"),
    ],
)
def test_runs_that_did_not_learn_decide_the_wording_of_the_verdict(result, p, learned, verdict) -> None:
    assert judge(result, p, 0.02, learned=learned) == verdict


@pytest.mark.parametrize(
    ("more", "words"),
    [(1, "about 1 more seed "), (33, "about 33 more seeds "), (100, "about 100 "), (101, "more than 100 ")],
)
def test_an_absurd_number_of_seeds_is_not_named(more: int, words: str) -> None:
    assert not_enough_evidence(more).startswith(f"not enough evidence ({words}")
