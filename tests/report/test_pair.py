"""Two runs on one page: where they part, how much noise hides, and what was set differently."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from helpers import synthetic_run as synthetic
from helpers.browser import open_page

from omninorm.errors import RunError
from omninorm.record.signals import SIGNALS
from omninorm.report.pair import describe, names_of, read_pair, render_pair, write_pair
from omninorm.report.parting import compare

LOUD = 12


def runs(tmp_path: Path, change=None, **options) -> tuple:
    """Two runs that are equal but for `change`, which gets each event of the second one."""
    first = synthetic.run(tmp_path / "one", samples=40)
    second = synthetic.run(tmp_path / "two", samples=40, **options)
    if change:
        record = second / "record.jsonl"
        events = [json.loads(line) for line in record.read_text().splitlines()]
        for event in events:
            change(event)
        record.write_text("".join(json.dumps(event) + "\n" for event in events))
    return read_pair(first, second)


def from_step(step: int, signal: str, row: int, factor: float):
    def change(event):
        if event["kind"] == "sample" and event["step"] >= step:
            event["signals"][signal][row] *= factor

    return change


def test_equal_runs_are_reported_as_equal(tmp_path):
    pair = runs(tmp_path)
    found = compare(*pair)
    assert (found.unequal, found.step, found.steps, found.samples) == (None, None, 400, 40)
    assert describe(found, names_of(*pair)) == ("The runs are equal in all 400 recorded steps", [])
    assert "<h1>The runs are equal in all 400 recorded steps</h1>" in render_pair(*pair)


def test_nan_in_both_runs_is_equal_and_in_one_it_is_where_they_part(tmp_path):
    def spoil(event):
        if event["kind"] == "sample" and event["step"] == 200:
            event["signals"]["stream_rms"][4] = "nan"

    pair = runs(tmp_path, spoil)
    (found,) = compare(*pair).layers
    assert (found.step, found.name, found.layer) == (200, "stream_rms", "blocks.4")
    assert math.isnan(found.second)
    assert compare(pair[1], pair[1]).unequal is None


def test_gradient_that_is_missing_in_one_run_comes_before_what_differs(tmp_path):
    """Detached below block 4: the earlier blocks get no gradient, and the loss of later steps differs as well."""

    def detach(event):
        if event["kind"] == "sample":
            signals = event["signals"]
            signals["grad_norm"] = [None if row < 4 else value for row, value in enumerate(signals["grad_norm"])]
            signals["eps_share"][2] *= 1000.0
            signals["weight_rms"][5], signals["attention_entropy"][7] = "nan", None
        if event["kind"] == "steps":
            event["loss"] = [2 * loss for loss in event["loss"]]

    first, second = runs(tmp_path, detach)
    found, layer = compare(first, second), first.watched.groups[3]
    assert found.lead == found.layers[0]
    assert (found.lead.name, found.lead.layer, found.lead.second) == ("grad_norm", layer, None)
    assert [each.name for each in found.layers][:6] == [*["grad_norm"] * 4, "attention_entropy", "weight_rms"]
    title, sentences = describe(found, ("one", "two"))
    assert title.endswith(f": gradient norm in {layer} is missing in two")
    assert f": gradient norm in {layer} is missing in two and" in sentences[0]
    assert f"{layer} is missing in one" in describe(compare(second, first), ("one", "two"))[0]
    assert "is missing in two" in render_pair(first, second)


def test_signal_that_a_run_lacks_completely_is_not_a_parting(tmp_path):
    """Another optimizer has no second moments; without gradients, nothing is trained."""

    def without(*names):
        return lambda event: [event.get("signals", {}).pop(name, None) for name in names]

    assert compare(*runs(tmp_path / "adam", without("adam_ratio", "attention_logit"))).step is None
    assert compare(*runs(tmp_path / "gradients", without("grad_norm"))).lead.name == "grad_norm"


@pytest.mark.parametrize(("signal", "row"), [("weight_rms", 5), ("attention_logit", 11), ("gain_max", 3)])
def test_layer_that_changes_is_named_with_its_step(tmp_path, signal, row):
    first, second = runs(tmp_path, from_step(210, signal, row, 100.0))
    found = compare(first, second)
    lead = found.layers[0]
    assert (found.step, lead.step, lead.name) == (210, 210, signal)
    assert lead.layer == first.watched.names(SIGNALS[signal].axis)[row]
    assert found.unequal.step == 210
    title, sentences = describe(found, names_of(first, second))
    assert title == f"The runs part at step 210: {SIGNALS[signal].title} in {lead.layer}"
    assert sentences[-1].startswith("The first value that differs at all is at step 210")


def test_curve_that_changes_is_named_with_its_step(tmp_path):
    def change(event):
        if event["kind"] == "steps":
            steps = range(event["first"], event["step"] + 1)
            event["lr"] = [rate * (3 if step >= 123 else 1) for step, rate in zip(steps, event["lr"], strict=True)]

    found = compare(*runs(tmp_path, change))
    assert (found.step, found.curve.name, found.curve.step, found.layers) == (123, "lr", 123, [])


def test_rounding_is_a_difference_but_not_a_parting(tmp_path):
    def change(event):
        if event["kind"] == "steps" and event["step"] > 50:
            event["loss"] = [loss * (1 + 1e-6) for loss in event["loss"]]

    pair = runs(tmp_path, change)
    found = compare(*pair)
    assert (found.unequal.step, found.unequal.name, found.step) == (51, "loss", None)
    assert describe(found, names_of(*pair))[0] == "The runs differ by no more than their noise in 400 recorded steps"


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_other_noise_is_no_parting_and_a_fault_within_it_is(tmp_path, seed):
    assert compare(*runs(tmp_path, seed=seed)).step is None
    found = compare(*runs(tmp_path, from_step(210, "weight_rms", 5, 20.0), seed=seed))
    assert (found.step, found.layers[0].name, found.layers[0].layer) == (210, "weight_rms", "blocks.5")


def test_runs_without_common_steps_and_of_different_models_have_a_page(tmp_path):
    early = synthetic.run(tmp_path / "early", samples=2, every=10, blocks=3)
    other = synthetic.run(tmp_path / "other", samples=2, every=7, prefix="layers", kinds="both")
    pair = read_pair(early, other)
    assert "<h1>" in render_pair(*pair)
    record = other / "record.jsonl"
    record.write_text("".join(line for line in record.read_text().splitlines(keepends=True) if '"eval"' in line))
    assert "The runs have no steps in common" in render_pair(*read_pair(early, other))


def test_samples_at_common_steps_are_compared_for_long_runs(tmp_path):
    """500 of each run are read, and not at the same steps unless the second reads those of the first."""
    first = synthetic.run(tmp_path / "one", samples=1100, every=1, blocks=1)
    second = synthetic.run(tmp_path / "two", samples=1102, every=1, blocks=1)
    assert compare(*read_pair(first, second)).samples > 300


def test_settings_that_differ_are_listed(tmp_path):
    def change(event):
        if event["kind"] == "watch":
            event["optimizer"], event["config"]["batch size"] = "SGD", synthetic.HOSTILE

    page = render_pair(*runs(tmp_path, change))
    table = page[page.index('id="table-settings"') :]
    rows = re.findall(r'<th scope="row">(.*?)</th><td>(.*?)</td><td>(.*?)</td>', table)
    assert rows[0][:2] == ("Optimizer", "AdamW, ε = 1e-8")
    assert [row[:2] for row in rows[1:2]] == [("batch size", "32")]
    assert "&lt;script&gt;" in rows[1][2]
    assert "<script>document" not in page


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path):
    pair = read_pair(synthetic.run(tmp_path / "a" / "run", samples=2), synthetic.run(tmp_path / "b" / "run", samples=2))
    assert names_of(*pair) == (str(tmp_path / "a" / "run"), str(tmp_path / "b" / "run"))
    assert len(set(names_of(pair[0], pair[0]))) == 2


def test_page_does_not_overwrite_a_record(tmp_path):
    pair = runs(tmp_path)
    with pytest.raises(RunError, match="overwrite the record"):
        write_pair(*pair, tmp_path / "one" / "record.jsonl")


def test_page_is_drawn_without_errors(tmp_path):
    pair = runs(tmp_path, from_step(210, "weight_rms", 5, 100.0))
    script = """
const keys = [...document.querySelectorAll('.stroke')].length;
const plot = document.querySelector('[data-name="step-loss"] .plot');
plot.dispatchEvent(new KeyboardEvent('keydown', {key: 'Home', bubbles: true}));
return [keys, document.getElementById('live').textContent].join('|');
"""
    shown = open_page(render_pair(*pair), tmp_path, script)
    assert shown.console == []
    assert re.search(r'data-drawn="\d\d"', shown.dom)
    keys, spoken = shown.result().split("|")
    assert keys == "2"
    assert "one; two " in spoken
