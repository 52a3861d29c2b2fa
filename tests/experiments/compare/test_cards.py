"""Conditions and verdicts from samples with a clear answer."""

import math

import pytest

from omninorm.experiments.compare.cards import Question, decide, verdict
from omninorm.report.comparison.wording import not_enough_evidence


def question(*samples: float, above: bool = True, label: str = "a") -> Question:
    return Question(label, samples, 1.0, above, "metres")


CLEAR, BELOW, TORN = (2.0, 2.1, 1.9, 2.05), (0.1, 0.2, 0.15, 0.12), (0.5, 1.6, 0.9, 1.2)


@pytest.mark.parametrize(
    ("samples", "above", "outcome"),
    [(CLEAR, True, "yes"), (BELOW, True, "no"), (CLEAR, False, "no"), (BELOW, False, "yes"), (TORN, True, "unclear")],
)
def test_a_clear_mean_answers_its_question(samples, above, outcome) -> None:
    (found,) = decide([question(*samples, above=above)])
    assert found.outcome == outcome
    assert found.mean == pytest.approx(sum(samples) / 4)
    assert found.low < found.mean < found.high
    assert (found.more > 0) == (outcome == "unclear")


def test_the_interval_is_centred_on_the_mean() -> None:
    """Samples 1, 2, 3 with standard deviation 1: t(0.975, 2) = 4.303."""
    (found,) = decide([Question("a", (1.0, 2.0, 3.0), 0.5, True, "metres")])
    assert found.high == pytest.approx(2 + 4.303 / math.sqrt(3), rel=1e-3)


def test_the_p_values_of_many_questions_are_corrected_together() -> None:
    """p = 0.01 is significant alone, but not among twenty equal questions (Holm: 20 × 0.01)."""
    borderline = (1.2, 1.55, 1.42, 1.62, 1.28)
    (alone,) = decide([question(*borderline)])
    assert alone.outcome == "yes"
    assert {each.outcome for each in decide([question(*borderline)] * 20)} == {"unclear"}


@pytest.mark.parametrize(("samples", "more"), [((), 2), ((7.0,), 1)])
def test_fewer_than_two_seeds_decide_nothing(samples, more) -> None:
    (found,) = decide([question(*samples)])
    assert (found.outcome, found.more) == ("unclear", more)
    assert found.low is None
    assert verdict([found]) == f"not enough evidence (about {more} more seed{'s' if more > 1 else ''} needed)"


def test_samples_without_spread_give_an_answer() -> None:
    assert [each.outcome for each in decide([question(2.0, 2.0), question(0.5, 0.5)])] == ["yes", "no"]


def test_conditions_decide_the_verdict() -> None:
    yes, no, unclear = decide(
        [question(*CLEAR, label="at 4"), question(*BELOW, label="at 8"), question(*TORN, label="at 12")]
    )
    assert verdict([yes, yes]) == "holds"
    assert verdict([no, no]) == "does not hold here"
    assert verdict([yes, no]) == "holds in part (1 of 2 conditions)"
    assert verdict([yes, no, unclear, yes]) == "holds in part (2 of 4 conditions)"
    needed = not_enough_evidence(unclear.more)
    assert verdict([yes, unclear]) == verdict([no, unclear]) == needed
