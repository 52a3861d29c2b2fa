"""The demo's plans, measurements and verdicts."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from matplotlib import image

from omninorm import NormConfig
from omninorm.errors import RunError
from omninorm.experiments.corpus import load_corpus, tokenize, windows
from omninorm.experiments.demo import (
    VARIANTS,
    Baselines,
    Outcome,
    demo_plans,
    depth_grad_norms,
    judge,
    measure_baselines,
    prepare,
    read_outcome,
    write_results,
)
from omninorm.experiments.demo_figure import draw
from omninorm.experiments.evaluate import unigram_bits_per_byte
from omninorm.experiments.runs import build_model, open_run
from omninorm.experiments.tokenizer import ByteTokenizer

LABELS = {name: label for name, (label, _) in VARIANTS.items()}


@pytest.fixture
def text(tmp_path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("And the evening and the morning were the first day.\n" * 100, encoding="utf-8")
    return str(path)


def test_plans_differ_in_their_norms_only(text) -> None:
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


def test_gradient_norms_by_depth_are_those_of_each_block(text) -> None:
    plan = demo_plans(3, 5, text)["pre-rmsnorm"]
    data = tokenize(load_corpus(text), ByteTokenizer(), 128)
    model = build_model(plan.model, plan.train.seed)
    tokens = windows(data.train, 0, 1, 8, 128)
    log_probabilities = torch.log_softmax(model(tokens[:, :-1]), -1)
    (-log_probabilities.gather(-1, tokens[:, 1:, None]).mean()).backward()
    expected = [
        math.sqrt(sum(parameter.grad.double().square().sum().item() for parameter in block.parameters()))
        for block in model.blocks
    ]
    assert depth_grad_norms(plan, data) == pytest.approx(expected, rel=1e-5)


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


def test_outcomes_tell_what_the_runs_recorded(tmp_path, text) -> None:
    plans = {name: plan.change(lr=1e-3) for name, plan in demo_plans(2, 3, text).items()}
    prepare(tmp_path, plans)
    with open_run(tmp_path / "pre-rmsnorm") as run:
        result = run.train()
    outcome = read_outcome(tmp_path / "pre-rmsnorm", [1.0, 2.0], 4.0)
    assert outcome.steps == 3
    assert outcome.bits_per_byte == result.bits_per_byte
    assert outcome.largest_grad_norm == result.largest_grad_norm
    assert outcome.losses == tuple(loss / math.log(2.0) for loss in result.losses)
    assert outcome.depth_grad_norms == (1.0, 2.0)
    waiting = read_outcome(tmp_path / "no-norm", [], 4.0)
    assert (waiting.verdict, waiting.steps) == ("unfinished", 0)
    assert math.isnan(waiting.bits_per_byte)
    assert math.isnan(waiting.tokens_per_second)


def test_a_run_that_blew_up_has_diverged_and_its_gradient_is_not_hidden(tmp_path, text) -> None:
    plan = demo_plans(24, 4, text)["no-norm"]
    prepare(tmp_path, {"no-norm": plan})
    with open_run(tmp_path / "no-norm") as run:
        assert run.train().status == "diverged"
    outcome = read_outcome(tmp_path / "no-norm", [], 4.0)
    assert outcome.verdict == "diverged"
    assert math.isnan(outcome.bits_per_byte)
    assert not outcome.largest_grad_norm < 1e6


def test_preparing_again_leaves_runs_alone(tmp_path, text) -> None:
    plans = demo_plans(2, 3, text)
    prepare(tmp_path, plans)
    before = {path: path.read_bytes() for path in tmp_path.glob("*/config.json")}
    assert len(before) == 4
    prepare(tmp_path, plans)
    assert {path: path.read_bytes() for path in tmp_path.glob("*/config.json")} == before


def test_baselines_are_of_the_evaluated_bytes(text) -> None:
    corpus = load_corpus(text)
    baselines = measure_baselines(corpus, 200)
    assert baselines.unigram == unigram_bits_per_byte(corpus.train, corpus.held_out[:200])
    assert baselines.xz < baselines.unigram


OUTCOMES = [
    Outcome("pre-rmsnorm", "learned", 3.0, 2.0, 1000.0, 3, (8.0, 5.0, 4.0), (1.0, 0.5)),
    Outcome("pre-layernorm", "learned", 3.1, 2.0, 1000.0, 3, (8.0, 5.0, 4.1), (1.0, 0.5)),
    Outcome("post-rmsnorm", "stagnated", 4.4, 9.0, 1000.0, 3, (8.0, 5.0, 4.6), (1.0, 2.0)),
    Outcome("no-norm", "diverged", math.nan, math.inf, math.nan, 0, (), (1e17, math.inf)),
]


def test_results_are_json_with_null_for_what_is_not_finite(tmp_path) -> None:
    path = write_results(tmp_path, OUTCOMES, Baselines(4.4, 2.0))
    values = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert values["baselines"] == {"unigram": 4.4, "xz": 2.0}
    assert values["runs"][0]["losses"] == [8.0, 5.0, 4.0]
    assert values["runs"][3]["bits_per_byte"] is None
    assert values["runs"][3]["depth_grad_norms"] == [1e17, None]


def test_the_figure_is_a_picture_with_something_on_it(tmp_path) -> None:
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


def test_a_figure_that_cannot_be_written_is_one_sentence(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="a run's folder must be writable"):
        draw(tmp_path / "file" / "demo.png", OUTCOMES, LABELS, Baselines(4.4, 2.0))
