"""The demo's plans, outcomes, verdicts and figure."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from matplotlib import image

from omninorm import NormConfig
from omninorm.errors import RunError
from omninorm.experiments import plotting
from omninorm.experiments.corpus import load_corpus
from omninorm.experiments.demo import (
    GRADIENT_STEP,
    VARIANTS,
    Baselines,
    Outcome,
    demo_plans,
    judge,
    measure_baselines,
    prepare,
    read_outcome,
    write_results,
)
from omninorm.experiments.demo_figure import draw
from omninorm.experiments.evaluate import unigram_bits_per_byte
from omninorm.experiments.runs import build_model, open_run
from omninorm.record import RECORD_FILE, read_history

LABELS = {name: label for name, (label, _) in VARIANTS.items()}


@pytest.fixture
def text(tmp_path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("And the evening and the morning were the first day.\n" * 100, encoding="utf-8")
    return str(path)


def test_plans_differ_only_in_their_norms(text) -> None:
    plans = demo_plans(3, 5, text)
    kinds = {name: (plan.model.norm.normalization, plan.model.norm.norm_placement) for name, plan in plans.items()}
    assert kinds == {
        "pre-rmsnorm": ("rmsnorm", "pre"),
        "pre-layernorm": ("layernorm", "pre"),
        "post-rmsnorm": ("rmsnorm", "post"),
        "no-norm": ("none", "none"),
    }
    alike = [
        dataclasses.replace(plan, model=dataclasses.replace(plan.model, norm=NormConfig())) for plan in plans.values()
    ]
    assert all(plan == alike[0] for plan in alike)
    weights = [build_model(plan.model, plan.train.seed).blocks[2].attention.out.weight for plan in plans.values()]
    assert all(torch.equal(weight, weights[0]) for weight in weights)


@pytest.mark.parametrize(
    ("status", "bits", "verdict"),
    [
        (None, math.nan, "unfinished"),
        ("diverged", math.nan, "diverged"),
        ("finished", 3.5, "learned"),
        ("finished", 3.6, "stagnated"),
        ("finished", 4.2, "stagnated"),
        ("finished", math.nan, "stagnated"),
    ],
)
def test_verdicts(status, bits: float, verdict: str) -> None:
    assert judge(status, bits, 4.0) == verdict


def test_an_outcome_holds_what_the_run_recorded(tmp_path, text) -> None:
    plans = {name: plan.change(lr=1e-3) for name, plan in demo_plans(2, 3, text).items()}
    prepare(tmp_path, plans)
    with open_run(tmp_path / "pre-rmsnorm") as run:
        result = run.train()
    outcome = read_outcome(tmp_path / "pre-rmsnorm", 4.0)
    assert outcome.steps == 3
    assert outcome.bits_per_byte == result.bits_per_byte
    assert outcome.largest_grad_norm == result.largest_grad_norm
    assert outcome.losses == tuple(loss / math.log(2.0) for loss in result.losses)
    assert outcome.gradient_step == 1, "the only step that the monitor sampled"
    (sample,) = read_history(tmp_path / "pre-rmsnorm" / RECORD_FILE, {"sample"})
    assert outcome.depth_gradients == tuple(sample["signals"]["stream_grad"])
    assert len(outcome.depth_gradients) == 2
    waiting = read_outcome(tmp_path / "no-norm", 4.0)
    assert (waiting.verdict, waiting.steps, waiting.gradient_step) == ("unfinished", 0, None)
    assert math.isnan(waiting.bits_per_byte)
    assert math.isnan(waiting.tokens_per_second)


@pytest.mark.parametrize(
    ("sampled", "step", "gradients"),
    [
        ({}, None, ()),
        ({1: [1.0, 2.0], 10: [3.0, 4.0]}, 10, (3.0, 4.0)),
        ({10: [3.0, 4.0], 20: [5.0, 6.0], 30: [7.0, 8.0]}, 20, (5.0, 6.0)),
        ({20: [5.0, None]}, 20, (5.0, math.nan)),
    ],
)
def test_gradients_are_those_of_the_last_sample_up_to_the_gradient_step(tmp_path, sampled, step, gradients) -> None:
    lines = [{"kind": "sample", "step": at, "signals": {"stream_grad": values}} for at, values in sampled.items()]
    lines.append({"kind": "sample", "step": GRADIENT_STEP, "signals": {}})  # as of a model without blocks
    (tmp_path / RECORD_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    outcome = read_outcome(tmp_path, 4.0)
    assert outcome.gradient_step == step
    assert outcome.depth_gradients == pytest.approx(gradients, nan_ok=True)


def test_a_diverged_run_keeps_its_gradient_norm(tmp_path, text) -> None:
    plan = demo_plans(24, 4, text)["no-norm"]
    prepare(tmp_path, {"no-norm": plan})
    with open_run(tmp_path / "no-norm") as run:
        assert run.train().status == "diverged"
    outcome = read_outcome(tmp_path / "no-norm", 4.0)
    assert outcome.verdict == "diverged"
    assert math.isnan(outcome.bits_per_byte)
    assert not outcome.largest_grad_norm < 1e6


def test_preparing_again_changes_nothing(tmp_path, text) -> None:
    plans = demo_plans(2, 3, text)
    prepare(tmp_path, plans)
    before = {path: path.read_bytes() for path in tmp_path.glob("*/config.json")}
    assert len(before) == 4
    prepare(tmp_path, plans)
    assert {path: path.read_bytes() for path in tmp_path.glob("*/config.json")} == before


def test_baselines_use_the_evaluated_bytes(text) -> None:
    corpus = load_corpus(text)
    baselines = measure_baselines(corpus, 200)
    assert baselines.unigram == unigram_bits_per_byte(corpus.train, corpus.held_out[:200])
    assert baselines.xz < baselines.unigram


OUTCOMES = [
    Outcome("pre-rmsnorm", "learned", 3.0, 2.0, 1000.0, 3, (8.0, 5.0, 4.0), 20, (1.0, 0.5)),
    Outcome("pre-layernorm", "learned", 3.1, 2.0, 1000.0, 3, (8.0, 5.0, 4.1), 20, (1.0, 0.6)),
    Outcome("post-rmsnorm", "stagnated", 4.4, 9.0, 1000.0, 3, (8.0, 5.0, 4.6), 20, (1e-5, 2.0)),
    Outcome("no-norm", "diverged", math.nan, math.inf, math.nan, 0, (), 1, (1e17, math.inf), 1),
]


def test_results_are_json_with_null_for_what_is_not_finite(tmp_path) -> None:
    path = write_results(tmp_path, OUTCOMES, Baselines(4.4, 2.0))
    values = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert values["baselines"] == {"unigram": 4.4, "xz": 2.0}
    assert values["runs"][0]["losses"] == [8.0, 5.0, 4.0]
    assert values["runs"][3]["bits_per_byte"] is None
    assert values["runs"][3]["depth_gradients"] == [1e17, None]


def drawn(tmp_path, monkeypatch, outcomes):
    """Draw the figure and return it as a matplotlib object."""
    figures = []
    monkeypatch.setattr(plotting, "save_png", lambda figure, path: figures.append(figure))
    draw(tmp_path / "demo.png", outcomes, LABELS, Baselines(4.4, 2.0))
    return figures[0]


def test_the_figure_draws_every_run_of_its_legend(tmp_path, monkeypatch) -> None:
    figure = drawn(tmp_path, monkeypatch, OUTCOMES)
    left, right = figure.axes
    (legend,) = figure.legends
    named = [text.get_text() for text in legend.get_texts()]
    assert named == [*list(LABELS.values())[:3], f"{LABELS['no-norm']}: diverged at step 1"]
    assert {line.get_label() for line in left.lines} >= set(named), "a legend entry has no line"
    assert right.get_title() == "Gradient at step 20"
    assert [tuple(line.get_ydata()) for line in right.lines] == [(1.0, 0.5), (1.0, 0.6), (1e-5, 2.0)]
    colors = {line.get_label(): line.get_color() for line in left.lines}
    assert [line.get_color() for line in right.lines] == [colors[name] for name in named[:3]]


def test_the_figure_labels_a_vanishing_gradient_with_its_factor(tmp_path, monkeypatch) -> None:
    (label,) = drawn(tmp_path, monkeypatch, OUTCOMES).axes[1].texts
    assert "1/200,000" in label.get_text()
    level = [dataclasses.replace(outcome, depth_gradients=(1.0, 2.0)) for outcome in OUTCOMES]
    assert not drawn(tmp_path, monkeypatch, level).axes[1].texts


def test_the_figure_is_a_picture_with_every_line_on_it(tmp_path) -> None:
    path = tmp_path / "demo.png"
    draw(path, OUTCOMES, LABELS, Baselines(4.4, 2.0))
    pixels = image.imread(path)
    assert pixels.shape[0] > 400
    assert pixels.shape[1] > 1000
    half = pixels.shape[1] // 2
    for side in (pixels[:, :half], pixels[:, half:]):
        colors = {tuple(color) for color in (side[..., :3] * 255).round().astype(int).reshape(-1, 3)}
        for wanted in [(0x00, 0x72, 0xB2), (0xE6, 0x9F, 0x00), (0xD5, 0x5E, 0x00)]:
            assert wanted in colors, "a run's line is missing"


def test_a_figure_that_cannot_be_written_raises_a_run_error(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "demo.png"
    with pytest.raises(RunError) as error:
        draw(path, OUTCOMES, LABELS, Baselines(4.4, 2.0))
    assert str(tmp_path / "file") in str(error.value)
