"""judge: the verdict's status, sentence and heading, from alarms, non-finite values and the loss."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from helpers.stories import alarm, of_losses, story_of

from omninorm.record.signals import SIGNALS
from omninorm.report import judge, render
from omninorm.report.story import Bad, Ending, RunStory
from omninorm.report.text import escape


@pytest.fixture(scope="module")
def faulty(tmp_path_factory) -> RunStory:
    return story_of(tmp_path_factory.mktemp("faulty"), scene="logits", kinds="both")


@pytest.mark.parametrize(
    ("scene", "status", "sentence"),
    [
        (
            "healthy",
            "healthy",
            "No alarm in 200 steps; the loss fell from 7.008 to 3.322 (means of the first and last 20 steps).",
        ),
        (
            "warnings",
            "warnings",
            "2 warnings, no failures: the loss rose to 5.31, 6.8 σ above its mean of 128 steps (step 120).",
        ),
        (
            "logits",
            "failing",
            "Failing: the attention logits of blocks.8 passed 1e4 and went on growing for 5 samples (step 120).",
        ),
        ("nan", "failing", "Failing: blocks.6.feed_forward: a NaN came out of the forward pass (step 120)."),
    ],
)
def test_verdict_follows_from_the_alarms(tmp_path, scene, status, sentence):
    verdict = judge(story_of(tmp_path, scene=scene, samples=20))
    assert (verdict.status, verdict.sentence) == (status, sentence)
    assert (verdict.alarm is None) == (scene == "healthy")


def test_verdict_without_alarms_says_what_was_checked(tmp_path):
    calm = replace(story_of(tmp_path, scene="healthy", samples=20), not_seen={})
    assert judge(calm).more == f"Checked: all {len(SIGNALS)} signals in 20 samples."
    missing = dict.fromkeys(("logz", "saturation", "angle"), "no reason")
    checked = f"Checked: {len(SIGNALS) - 3} of {len(SIGNALS)} signals in 20 samples."
    assert judge(replace(calm, not_seen=missing)).more == (
        f"{checked} Not checked: angular distance, saturation, output normalizer."
    )
    missing |= dict.fromkeys(("logz_mean", "gain_max"), "no reason")
    assert judge(replace(calm, not_seen=missing)).more.endswith("saturation, output normalizer and 2 more.")


def test_first_failure_leads(faulty):
    alarms = [alarm(3, "warn"), alarm(5, layer="blocks.4"), alarm(5, layer=None), alarm(9)]
    verdict = judge(replace(faulty, alarms=alarms))
    assert verdict.sentence == "Failing: blocks.4: it was too large (step 5)."
    assert verdict.remedy == "less"
    assert verdict.more == "2 further failures and 1 further warning in 600 steps."
    assert verdict.alarm == alarms[1]


def test_cause_of_the_first_failure_leads(faulty):
    root = alarm(7, "warn", "blocks.4", rule="root")
    alarms = [alarm(5, cause=root.ref), root, alarm(9)]
    verdict = judge(replace(faulty, alarms=alarms))
    assert (verdict.status, verdict.alarm) == ("failing", root)
    assert verdict.sentence == "Failing: blocks.4: it was too large (step 7)."
    assert verdict.more == "1 further failure in 600 steps."


def test_consequences_are_not_counted_as_further_alarms(faulty):
    root = alarm(5, rule="root")
    others = [alarm(step, "warn", f"blocks.{step}", cause=root.ref) for step in (6, 7)]
    last = alarm(8, "warn", "blocks.8", cause=others[0].ref)
    verdict = judge(replace(faulty, alarms=[root, *others, last]))
    assert (verdict.alarm, verdict.more) == (root, "")
    other = alarm(9, "warn", rule="other")
    verdict = judge(replace(faulty, alarms=[root, *others, last, other, alarm(10, "warn", cause=other.ref)]))
    assert verdict.more == "1 further warning in 600 steps."


def test_consequences_are_not_counted_among_warnings(faulty):
    root = alarm(5, "warn", rule="root")
    verdict = judge(replace(faulty, alarms=[root, alarm(6, "warn", cause=root.ref)]))
    assert verdict.sentence.startswith("1 warning, no failures: ")
    assert verdict.more == ""


def test_warning_that_follows_from_another_does_not_lead(faulty):
    root = alarm(7, "warn", rule="root")
    verdict = judge(replace(faulty, alarms=[alarm(5, "warn", cause=root.ref), root]))
    assert (verdict.status, verdict.alarm) == ("warnings", root)


def test_verdict_without_alarms_follows_from_the_end_of_the_run(faulty):
    calm = replace(faulty, alarms=[], ending=Ending(600, "done"))
    bad = replace(calm, bad=[Bad(4, "backward", "blocks.3.attention", "inf", 2)])
    assert (
        judge(bad).sentence
        == "Failing: the first infinity appeared in blocks.3.attention, in the backward pass of step 4 on rank 2."
    )
    after = judge(replace(calm, bad=[Bad(4, "forward", "blocks.0.attention", "nan", after="embedding")]))
    assert after.sentence == (
        "Failing: the first NaN appeared in blocks.0.attention, in the forward pass of step 4, "
        "after a finite output of embedding."
    )
    diverged = judge(replace(calm, ending=Ending(7, "diverged")))
    assert diverged.sentence == "Failing: the run diverged at step 7."
    stopped = judge(replace(calm, ending=Ending(600, "error", "ValueError: \x1b[31mno")))
    assert stopped.status == "quiet"
    assert stopped.more.endswith(" The run was stopped by an error at step 600: ValueError: ␛[31mno.")
    assert judge(replace(calm, watched=None)).status == "unjudged"
    assert judge(replace(calm, columns=[], samples=0)).status == "unjudged"


@pytest.mark.parametrize(
    ("losses", "status", "sentence"),
    [
        ([5.0], "quiet", "No alarm in 10 steps."),
        ([3.0] * 60, "quiet", "No alarm in 60 steps. The loss has not fallen: 3 initially, 3 at the end{means}"),
        ([3.0] * 30 + [3.5] * 30, "quiet", "No alarm in 60 steps. The loss has not fallen: 3 initially, 3.5 at the end{means}"),
        ([3.0] * 30 + [2.98] * 30, "quiet", "No alarm in 60 steps. The loss has barely fallen: 3 initially, 2.98 at the end{means}"),
        ([3.0] * 30 + [2.96] * 30, "healthy", "No alarm in 60 steps; the loss fell from 3 to 2.96{means}"),
        ([3.0] * 20 + [2.0] * 20, "quiet", "No alarm in 40 steps. The loss fell from 3 to 2{means}"),
        ([3.0] * 30 + [math.nan] * 30, "quiet", "No alarm in 60 steps. The loss has not fallen: 3 initially, NaN at the end{means}"),
        ([-2.0] * 30 + [-3.0] * 30, "healthy", "No alarm in 60 steps; the loss fell from -2 to -3{means}"),
        ([], "quiet", "No alarm in 10 steps."),
    ],
)  # fmt: skip
def test_run_without_alarms_is_healthy_only_if_its_loss_falls(faulty, losses, status, sentence):
    verdict = judge(of_losses(faulty, *losses))
    means = f" (means of the first and last {len(losses) // 10} steps)."
    assert (verdict.status, verdict.sentence) == (status, sentence.format(means=means))
    assert f'<div class="verdict {status}">' in render(of_losses(faulty, *losses))


@pytest.mark.parametrize(
    ("given", "title", "evidence"),
    [
        ({"evidence": "No warm-up: the learning rate began at 0.3."}, "No warm-up", "blocks.1: the learning rate began at 0.3 (step 4)."),
        ({"evidence": "blocks.1 grows: a stream of 9 at step 4"}, "blocks.1 grows", "A stream of 9 at step 4."),
        ({"evidence": "blocks.1: too large", "rule": "layer-jump"}, "layer jump in blocks.1", "blocks.1: too large (step 4)."),
        ({"evidence": f"{'long ' * 13}: more", "rule": "adam-eps", "layer": None}, "Adam's ε", f"Long {'long ' * 12}: more (step 4)."),
        ({"evidence": "at 12:30 it rose", "rule": "loss-spike", "layer": None}, "loss spike", "At 12:30 it rose (step 4)."),
    ],
)  # fmt: skip
def test_heading_is_the_cause_in_a_few_words(faulty, given, title, evidence):
    verdict = judge(replace(faulty, alarms=[alarm(4, **given)]))
    assert (verdict.title, verdict.evidence) == (f"Failing: {title}", evidence)
    page = render(replace(faulty, alarms=[alarm(4, **given)]))
    assert f"<h1>{escape(verdict.title)}</h1>" in page
    assert f'<p class="evidence">{escape(evidence)}</p>' in page


def test_heading_of_a_nonfinite_value_names_its_place(faulty):
    verdict = judge(replace(faulty, alarms=[], bad=[Bad(4, "loss", None, "nan")]))
    assert (verdict.title, verdict.evidence) == (
        "Failing: a NaN in the loss",
        "The first NaN appeared in the loss of step 4.",
    )
