"""The run's name, settings and evaluations on the page: recorded by watch, escaped, and refused if of the wrong type."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import synthetic_run as synthetic
from torch import nn

import omninorm
from omninorm.errors import ConfigError, RunError
from omninorm.record import Record
from omninorm.report import read_run, render
from omninorm.report.facts import facts
from omninorm.report.story import RunStory


def watched(folder: Path | None, page: Path | None = None, **options) -> str:
    """The page of a run of two steps: read from its folder, or written by the watch to `page`."""
    model = nn.Sequential(nn.Linear(4, 4), nn.RMSNorm(4), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with omninorm.watch(model, optimizer, folder=folder, **options) as w:
        for _ in range(2):
            model(torch.ones(2, 4)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            w.step(1.0)
    return render(read_run(folder)) if page is None else w.report(page).read_text(encoding="utf-8")


def test_config_and_name_are_shown_and_escaped(tmp_path):
    config = {
        "batch size": 32, "seed": 7, "device": torch.device("cpu"), "path": Path("data"), "clip": None,
        "data": {"name": synthetic.HOSTILE, "tokens": 10}, "nan": float("nan"),
    }  # fmt: skip
    page = watched(tmp_path / "run", config=config, name=f"Width 512 {synthetic.HOSTILE}")
    assert "<title>Width 512 &lt;script&gt;" in page
    for label, text in (
        ("batch size", "32"),
        ("seed", "7"),
        ("device", "cpu"),
        ("path", "data"),
        ("data.tokens", "10"),
    ):
        assert f"<dt>{label}</dt><dd>{text}</dd>" in page
    assert "<dt>data.name</dt><dd>&lt;script&gt;" in page
    assert "<script>document" not in page
    assert "<dt>clip</dt>" not in page


def test_without_config_and_name_the_page_has_the_name_of_the_folder(tmp_path):
    assert "<title>mine: " in watched(tmp_path / "mine")


def test_page_of_a_run_without_a_folder_is_named_after_the_model(tmp_path):
    assert "<title>Run of Sequential: " in watched(None, page=tmp_path / "page.html")
    assert "<title>mine: " in watched(None, page=tmp_path / "page.html", name="mine")


def test_page_is_named_after_the_folder_even_if_its_disk_was_full(tmp_path, monkeypatch):
    """Then some events are in memory, and the page is written from a copy."""
    append = Record.append

    def fails(record, event):
        if record.path == tmp_path / "mine" / "record.jsonl" and event["kind"] == "steps":
            raise RunError("No space left on device", "", "")
        append(record, event)

    monkeypatch.setattr(Record, "append", fails)
    with pytest.warns(UserWarning, match="stopped recording"):
        assert "<title>mine: " in watched(tmp_path / "mine", page=tmp_path / "page.html")


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"config": [1]}, "config must be a dictionary"),
        ({"config": {1: 2}}, "config must be a dictionary"),
        ({"name": 3}, "name must be text"),
    ],
)
def test_config_and_name_of_the_wrong_type_are_refused(tmp_path, options, part):
    with pytest.raises(ConfigError, match=part):
        watched(tmp_path, **options)


def test_config_that_contains_itself_is_refused(tmp_path):
    config: dict = {}
    config["self"] = config
    with pytest.raises(ConfigError, match="config cannot be recorded"):
        watched(tmp_path, config=config)


def test_settings_of_a_trained_run_that_readers_look_for_first_are_facts(tmp_path):
    folder = synthetic.run(tmp_path / "run", samples=2)
    config = {"train": {"batch_size": 8, "weight_decay": 0.1, "seed": 3}, "git_commit": "abc123"}
    (folder / "config.json").write_text(json.dumps(config))
    shown = dict(facts(read_run(folder)))
    assert [shown[key] for key in ("Batch size", "Weight decay", "Seed", "Commit")] == ["8", "0.1", "3", "abc123"]


def test_evaluations_are_drawn_by_name(tmp_path):
    folder = synthetic.run(tmp_path / "run", samples=4)
    events = [
        {"kind": "evaluation", "step": step, "name": name, "loss": loss}
        for step, name, loss in [(0, "eval", 5.0), (20, "eval", 4.0), (20, "<b>code", 3.0), (30, "code", "x")]
    ]
    with open(folder / "record.jsonl", "a") as file:
        file.writelines(json.dumps(event) + "\n" for event in events)
    story = read_run(folder)
    assert {name: series.values for name, series in story.evaluations.items()} == {"eval": [5.0, 4.0], "<b>code": [3.0]}
    page = render(story)
    assert re.findall(r"<h3>(Evaluation.*?)</h3>", page) == ["Evaluation: eval", "Evaluation: &lt;b&gt;code"]
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page)[1])
    assert data["figures"]["evaluation-0"]["x"] == [0, 20]
    assert data["first"] == 0


def test_unknown_placement_is_shown_with_its_reason_and_padding_with_how_it_was_recognized():
    story = RunStory(source=Path("run"), placement_reason="the blocks differ: 3 × pre, 1 × post", padding="zero rows")
    shown = dict(facts(story))
    assert shown["Placement"] == "unknown: the blocks differ: 3 × pre, 1 × post"
    assert shown["Padding"] == "left out of the statistics, recognized by: zero rows"
    known = dict(facts(replace(story, placement="sandwich", padding=None)))
    assert known["Placement"].startswith("sandwich")
    assert "Padding" not in known
