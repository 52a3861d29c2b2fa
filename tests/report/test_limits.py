"""The rules' limits on the page: taken from the rules' own constants, through the record."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch
from helpers import synthetic_run as synthetic
from helpers.browser import open_page
from helpers.stories import story_of
from torch import nn

import omninorm
from omninorm.monitor import History, Step, default_rules
from omninorm.monitor.rules import Threshold, attention_logits
from omninorm.monitor.rules.gradient_spike import GradientSpike
from omninorm.monitor.rules.loss_spike import LossSpike
from omninorm.record.signals import SIGNALS
from omninorm.report import read_run, render


def limits() -> dict[tuple[str, str], tuple]:
    return {(each.rule, each.signal): each for rule in default_rules() for each in rule.limits()}


def figures(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page)[1])["figures"]


def test_limits_follow_the_constants_of_the_rules(monkeypatch):
    before = limits()["attention-logits", "attention_logit"]
    assert (before.warn, before.fail) == (attention_logits.WARN, attention_logits.FAIL)
    monkeypatch.setattr(attention_logits, "WARN", 77.0)
    assert limits()["attention-logits", "attention_logit"].warn == 77.0
    for rule in default_rules():
        if isinstance(rule, Threshold):
            found = limits()[rule.name, rule.signal]
            assert (found.warn, found.fail, found.below) == (rule.warn, rule.fail, rule.below)
    assert all(signal in SIGNALS for _, signal in limits())


def test_limits_of_a_watched_run_are_recorded_and_shown(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.RMSNorm(4), nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(model.parameters())
    with omninorm.watch(model, optimizer, every=1, folder=tmp_path) as w:
        for _ in range(20):
            loss = model(torch.ones(2, 4)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            w.step(loss)
    story = read_run(tmp_path)
    assert {(each.rule, each.signal): each for each in story.watched.limits} == limits()
    page = render(story)
    shown = figures(page)["update_ratio"]["limits"]
    update = limits()["learning-rate", "update_ratio"]
    assert shown == [[update.warn, update.fail, False, True]]
    assert "learning-rate: warning above 0.05" in page
    # Rolling limits need 16 losses.
    band = figures(page)["step-loss"]["band"]
    assert [step for step, _, _ in band] == [step for step in range(1, 21) if step >= 16]
    assert all(low is None and high > 0 for _, low, high in band)


def test_limit_of_another_dtype_is_not_drawn(tmp_path):
    story = story_of(tmp_path, scene="logits")
    assert "limits" not in figures(render(story))["stream_max"]
    assert len(figures(render(replace(story, dtype="float16")))["stream_max"]["limits"]) == 1


def test_record_without_limits_has_none_on_its_page(tmp_path):
    story = story_of(tmp_path, scene="logits")
    bare = replace(
        story,
        watched=replace(story.watched, limits=()),
        columns=[column._replace(bounds={}) for column in story.columns],
    )
    assert 'class="limits"' in render(story)
    assert 'class="limits"' not in render(bare)
    assert not any({"limits", "band"} & set(figure) for figure in figures(render(bare)).values())


@pytest.mark.parametrize("field", ["warn", "signal", "rule", "below"])
def test_damaged_limits_are_ignored_or_shown_escaped(tmp_path, field):
    folder = synthetic.run(tmp_path / "run", samples=3)
    record = folder / "record.jsonl"
    lines = record.read_text().splitlines()
    header = json.loads(lines[0])
    header["limits"] = [
        {**synthetic.LIMITS[1], field: synthetic.HOSTILE},
        "x",
        None,
        {"signal": "angle", "warn": "nan"},
    ]
    record.write_text("\n".join([json.dumps(header), *lines[1:]]) + "\n")
    page = render(read_run(folder))
    assert "<script>document" not in page
    assert len(read_run(folder).watched.limits) == (0 if field in ("warn", "signal") else 1)


@pytest.mark.parametrize(("rule", "name"), [(LossSpike, "loss"), (GradientSpike, "grad_norm")])
def test_bound_is_the_value_from_which_the_rule_reacts(rule, name):
    for factor, reacts in ((0.999, False), (1.001, True)):
        judge, alarms = rule(), []
        for step in range(1, 101):
            value = 2.0 + 0.01 * (step % 3)
            alarms += judge.on_step(History(), Step(step, value, value, 1e-3))
        assert not alarms
        for step in (101, 102):  # the gradient norm needs a second spike
            _, bound = judge.bounds()[name]
            alarms += judge.on_step(History(), Step(step, bound * factor, bound * factor, 1e-3))
        assert bool(alarms) == reacts


def test_shares_have_a_fixed_scale_and_other_signals_do_not(tmp_path):
    drawn = figures(render(story_of(tmp_path)))
    assert drawn["attention_entropy"]["scale"] == [0, 1]
    assert drawn["dead_units"]["scale"] == [0, 1]
    assert "scale" not in drawn["stream_rms"]


LEGEND = """
const texts = name => document.querySelector(`[data-name="${name}"] .legend`).innerText.replaceAll('\\n', ' ');
const map = document.querySelector('[data-name="attention_logit"] .plot');
map.dispatchEvent(new KeyboardEvent('keydown', {key: 'End', bubbles: true}));
for (let i = 0; i < 8; i++) map.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowDown', bubbles: true}));
return [texts('attention_entropy'), texts('attention_logit'), document.getElementById('live').textContent].join('|');
"""


def test_map_names_cells_beyond_a_limit(tmp_path):
    shown = open_page(
        render(story_of(tmp_path, scene="logits")), tmp_path, "window.dispatchEvent(new Event('beforeprint'));" + LEGEND
    )
    assert shown.console == []
    entropy, logit, spoken = shown.result().split("|")
    assert entropy.startswith("0 ")
    assert "within limits" in logit
    assert "(beyond the failure limit), blocks.8" in spoken
