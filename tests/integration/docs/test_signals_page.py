"""docs/signals.md describes every signal, with measured ranges and rules that exist."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from omninorm.monitor import default_rules
from omninorm.record.signals import SIGNALS

DOCS = Path(__file__).parents[3] / "docs"
PAGE = (DOCS / "signals.md").read_text(encoding="utf-8")
RESULTS = json.loads((DOCS / "signals" / "results.json").read_text(encoding="utf-8"))
SECTIONS = {part.split("`")[0]: part for part in PAGE.split("\n### `")[1:]}

LOSS = {"loss-spike", "unrecovered-spike", "loss-rising", "held-out-rising", "suspicious-loss"}
EXACT = {
    *(
        "no-gradient",
        "stale-parameters",
        "learning-rate-zero",
        "learning-rate-rises",
        "gradients-not-cleared",
        "steps-skipped",
    ),
    *("updates-lost", "replicas-differ", "gradient-clipped", "identical-batches"),
    *("evaluation-mode", "adam-betas", "adam-state", "autocast-lost", "dropout"),
    *("double-softmax", "norm-missing", "attention-not-causal", "label-order"),
}
# What they measure is not drawn: the scale of inputs and embeddings, and parts of gradients.
NOT_DRAWN = {
    *("input-scale", "embedding-scale"),
    *("gradient-underflow", "gradient-noise"),
}


def test_every_signal_has_a_section_and_a_figure() -> None:
    assert set(SECTIONS) == set(SIGNALS) == set(RESULTS)
    for name, section in SECTIONS.items():
        assert f"](signals/{name}.svg)" in section
        assert (DOCS / "signals" / f"{name}.svg").exists()


@pytest.mark.parametrize("name", SIGNALS)
def test_a_healthy_range_matches_the_measurements(name: str) -> None:
    values = [value for row in RESULTS[name]["healthy"]["values"] for value in row if value is not None]
    stated = re.search(r"\| healthy, here \| ([^ ;]+)(?: … ([^ ;]+))?[ ;]", SECTIONS[name])
    low, high = float(stated[1]), float(stated[2] or stated[1])
    assert (low, high) == (pytest.approx(min(values), rel=0.06), pytest.approx(max(values), rel=0.06))


def test_the_rules_named_on_the_page_exist() -> None:
    rules = {rule.name for rule in default_rules()}
    named = set(re.findall(r"`([a-z]+(?:-[a-z]+)+|headroom|saturation|logz|initialization)`", PAGE)) - {"qk-norm"}
    assert named <= rules, named - rules
    # Rules about the loss and about NaN have no signal, and neither have exact checks of the training loop.
    assert rules - named == {"nonfinite"} | LOSS | EXACT | NOT_DRAWN
