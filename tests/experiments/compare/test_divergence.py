"""The rule for a diverged ramp, on curves that show one sign each."""

import math
import random

import pytest

from omninorm.experiments.compare.divergence import find_divergence

STEPS, UNIGRAM = 200, 4.0


def healthy(noise: float = 0.05) -> list[float]:
    """5 → 2, as exp(−t), with noise."""
    draw = random.Random(1)
    return [2 + 3 * math.exp(-4 * step / STEPS) + draw.gauss(0, noise) for step in range(STEPS)]


def test_a_healthy_run_has_no_sign_of_divergence() -> None:
    assert find_divergence(healthy(), STEPS, UNIGRAM) == (None, STEPS)


def test_a_spike_that_recovers_is_no_sign_of_divergence() -> None:
    losses = healthy()
    losses[100:105] = [8.0] * 5
    assert find_divergence(losses, STEPS, UNIGRAM).sign is None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_divergence(bad: float) -> None:
    losses = [*healthy()[:120], bad]
    sign, step = find_divergence(losses, STEPS, UNIGRAM)
    assert sign == "not finite"
    assert 100 < step <= 120


def test_a_run_that_ended_early_has_diverged() -> None:
    assert find_divergence(healthy()[:50], STEPS, UNIGRAM).sign == "not finite"
    assert find_divergence([math.nan], STEPS, UNIGRAM) == ("not finite", 0)


def test_an_unrecovered_spike_is_divergence_at_the_lowest_loss() -> None:
    losses = healthy(0.0)
    losses[130:] = [5.0] * 70
    sign, step = find_divergence(losses, STEPS, UNIGRAM)
    assert sign == "spike"
    assert 120 < step <= 130


def test_a_loss_that_stops_falling_is_stagnation() -> None:
    losses = healthy(0.0)[:100] + [healthy(0.0)[100] + 0.02] * 100
    sign, step = find_divergence(losses, STEPS, UNIGRAM)
    assert sign == "stagnation"
    assert step == pytest.approx(100, abs=10)


def test_a_run_that_stays_near_the_unigram_baseline_is_slow() -> None:
    losses = [5.5 - 1.6 * step / STEPS for step in range(STEPS)]
    assert find_divergence(losses, STEPS, UNIGRAM).sign == "slow"
    assert find_divergence(losses, STEPS, unigram=5.0).sign is None


def test_a_dip_on_the_plateau_of_the_unigram_baseline_is_no_progress() -> None:
    """Down to the unigram baseline of 4.0 in 40 steps, then flat, with a temporary dip of 3 %."""
    losses = [max(4.02, 6.0 - step / 20) for step in range(STEPS)]
    losses[150:170] = [3.9] * 20
    sign, step = find_divergence(losses, STEPS, UNIGRAM)
    assert sign == "stagnation"
    assert 35 <= step <= 55


def test_progress_through_the_plateau_counts() -> None:
    losses = [6 - 3 * step / STEPS for step in range(STEPS)]  # through the plateau, and on
    assert find_divergence(losses, STEPS, UNIGRAM) == (None, STEPS)
