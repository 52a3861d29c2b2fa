"""render and write_report: the verdict, the facts, every signal, nothing unescaped, and the size."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from omninorm.errors import RunError
from omninorm.record.signals import SIGNALS
from omninorm.report import judge, read_run, render, write_report
from omninorm.report.facts import facts, samples
from omninorm.report.packing import unpack
from omninorm.report.story import Bad, Ending, RunStory, StoryAlarm

from . import synthetic


def story_of(tmp_path, **options) -> RunStory:
    return read_run(synthetic.run(tmp_path / "run", **options))


def alarm(step, severity="fail", layer="blocks.1", **given) -> StoryAlarm:
    values = {"rule": "rule", "evidence": "it was too large", "remedy": "try less", "source": ""}
    return StoryAlarm(step, severity, layer=layer, **values | given)


def embedded(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page)[1])


class Document(HTMLParser):
    """The tags of a page, checked to be nested rightly."""

    VOID = frozenset({"meta", "br", "img", "link", "input"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def named(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def sick(tmp_path_factory) -> RunStory:
    return story_of(tmp_path_factory.mktemp("sick"), scene="logits", kinds="both")


@pytest.mark.parametrize(
    ("scene", "status", "sentence"),
    [
        ("healthy", "healthy", "Healthy: no alarm in 200 steps."),
        (
            "warnings",
            "warnings",
            "2 warnings, no failure: the loss rose to 5.31, 6.8 σ above its mean of 128 steps (step 120).",
        ),
        (
            "logits",
            "failing",
            "Failing: the attention logits of blocks.8 passed 1e4 and went on growing for 5 samples (step 120).",
        ),
        ("nan", "failing", "Failing: blocks.6.feed_forward: a NaN came out of the forward pass (step 120)."),
    ],
)
def test_the_verdict_is_computed_from_the_alarms(tmp_path, scene, status, sentence):
    verdict = judge(story_of(tmp_path, scene=scene, samples=20))
    assert (verdict.status, verdict.sentence) == (status, sentence)
    assert (verdict.alarm is None) == (scene == "healthy")


def test_the_first_failure_that_names_a_layer_leads(sick):
    alarms = [alarm(3, "warn"), alarm(5, layer=None), alarm(5, layer="blocks.4"), alarm(9)]
    verdict = judge(replace(sick, alarms=alarms))
    assert verdict.sentence == "Failing: blocks.4: it was too large (step 5)."
    assert verdict.remedy == "less"
    assert verdict.more == "2 further failures and 1 further warning in 600 steps."
    assert verdict.alarm == alarms[2]


def test_verdicts_without_alarms(sick):
    calm = replace(sick, alarms=[], ending=Ending(600, "done"))
    bad = replace(calm, bad=[Bad(4, "backward", "blocks.3.attention", "inf", 2)])
    assert (
        judge(bad).sentence
        == "Failing: the first infinity appeared in blocks.3.attention, in the backward pass of step 4 on rank 2."
    )
    diverged = judge(replace(calm, ending=Ending(7, "diverged")))
    assert diverged.sentence == "Failing: the run diverged at step 7."
    stopped = judge(replace(calm, ending=Ending(600, "error", "ValueError: \x1b[31mno")))
    assert stopped.status == "healthy"
    assert stopped.more == "The run was stopped by an error at step 600: ValueError: ␛[31mno."
    assert judge(replace(calm, watched=None)).status == "unjudged"
    assert judge(replace(calm, columns=[], samples=0)).status == "unjudged"


def test_the_page_has_everything_in_order(sick):
    page = render(sick)
    document = Document(page)
    assert document.open == []
    headings = re.findall(r"<h2[^>]*>(.*?)</h2>", page)
    assert headings == [
        "The run", "Alarms", "Training", "Through the depth", "Norms", "Weights and optimizer", "Output and gradient noise",
        "Layer by layer", "What was not seen, and why",
    ]  # fmt: skip
    assert page.index("<h1>Failing") < page.index("<h2")
    assert len(document.named("h1")) == len(document.named("main")) == 1
    figures = [each["data-name"] for each in document.named("figure") if "data-name" in each]
    empty = [each["data-empty"] for each in document.named("figure") if "data-empty" in each]
    shown = {name.removeprefix("signal-") for name in [*figures, *empty]}
    assert shown == {*SIGNALS, "step-loss", "step-grad_norm", "step-lr", "eval"}
    assert set(empty) == {"saturation", "signal-noise_scale"}
    canvases = document.named("canvas")
    assert len(canvases) == len(figures)
    assert all(each["role"] == "img" and len(each["aria-label"]) > 30 for each in canvases)
    assert len(document.named("table")) == len(document.named("caption")) == 4
    assert all(each.get("scope") in ("row", "col") for each in document.named("th"))
    for label, told in facts(sick):
        assert f"<dt>{label}</dt><dd>" in page, told


def test_the_figures_hold_the_records_numbers(sick):
    data = embedded(render(sick))
    assert data["steps"] == [column.step for column in sick.columns]
    assert data["axes"]["block"] == list(sick.watched.blocks)
    cells = unpack(data["figures"]["stream_grad"]["data"])
    assert cells == pytest.approx([v for column in sick.columns for v in column.signals["stream_grad"]], rel=2**-8)
    assert data["figures"]["step-loss"]["x"] == list(range(1, 601))
    assert data["figures"]["eval"]["y"][0] == 8.0
    assert data["alarms"][data["lead"]] == [360, "fail", "attention-logits", "blocks.8"]
    assert data["ticks"]["group"][-4:] == ["11", "embedding", "norm", "head"]
    assert data["ticks"]["norm"][:3] == ["0", "", "1"]


def test_figures_are_told_in_words(sick):
    labels = [each.get("aria-label", "") for each in Document(render(sick)).named("canvas")]
    logits = next(label for label in labels if label.startswith("Largest attention logit"))
    values = [value for column in sick.columns for value in column.signals["attention_logit"]]
    assert "12 blocks by 60 samples" in logits
    assert f"to {max(values):,.0f}." in logits
    assert "largest in blocks.8" in logits


def test_the_policy_allows_this_script_and_style_and_nothing_else(sick):
    page = render(sick)
    (policy,) = [each["content"] for each in Document(page).named("meta") if each.get("http-equiv")]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    for name, tag in (("script-src", "script"), ("style-src", "style")):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        assert rules[name] == f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
    assert not re.search(r"https?:|//cdn|url\(|@import|\ssrc=|innerHTML|\son\w+=|\sstyle=", page)


def test_hostile_texts_stay_texts(tmp_path):
    story = story_of(tmp_path, scene="hostile", prefix=synthetic.HOSTILE, samples=4)
    hostile = {"<script>": {"a": synthetic.HOSTILE}, "train": {synthetic.HOSTILE: "\x1b[31m"}}
    page = render(replace(story, config=hostile, notes=[synthetic.HOSTILE]))
    document = Document(page)
    assert document.open == []
    assert len(document.named("script")) == 2
    assert document.named("img") == []
    assert "\x1b" not in page
    assert "\u2028" not in page
    assert page.count("<!--") == 0
    assert "&lt;script&gt;document.title=" in page
    assert embedded(page)["axes"]["block"][0] == f"{synthetic.HOSTILE}.0"


def test_placeholders_in_a_record_are_not_filled(sick):
    page = render(replace(sick, notes=["{{script}} {{data}}"]))
    assert "<li>{{script}} {{data}}</li>" in page


def test_a_run_of_nothing_but_nan(tmp_path):
    folder = synthetic.run(tmp_path / "run", samples=5)
    record = folder / "record.jsonl"
    record.write_text(
        re.sub(r"(?<=[\[ ])\d[\d.e-]*(?=[],])", '"nan"', record.read_text()).replace('"step": "nan"', '"step": 5')
    )
    lines = [line for line in record.read_text().splitlines() if '"sample"' in line]
    assert lines
    assert '"nan"' in lines[0]
    page = render(read_run(folder))
    assert Document(page).open == []
    assert "cells not finite" in page


def test_too_many_alarms_are_counted_and_the_failures_kept(sick):
    alarms = [alarm(step, "warn", layer=None) for step in range(1, 1001)] + [alarm(1001)]
    page = render(replace(sick, alarms=alarms))
    assert "1,001 alarms, in the order of their steps; 601 of them are not listed here" in page
    assert len(embedded(page)["alarms"]) == 400
    assert embedded(page)["alarms"][-1][:2] == [1001, "fail"]


def test_a_large_run_stays_within_three_megabytes(tmp_path):
    """97 norms and 51 groups, in more samples than fit: the bound on cells holds for any number of them."""
    folder = synthetic.run(tmp_path / "run", blocks=48, samples=1, every=1)
    record = folder / "record.jsonl"
    (line,) = [line for line in record.read_text().splitlines() if '"sample"' in line]
    with open(record, "a") as file:
        file.writelines(line.replace('"step": 1', f'"step": {step}', 1) + "\n" for step in range(2, 1201))
    story = read_run(folder)
    assert story.samples == 1200
    assert len(story.columns) == 600 + 1
    size = len(render(story).encode())
    assert 2_000_000 < size < 3_000_000
    assert samples(story) == "every 2nd of 1,200 samples shown (one every step), and each one at an alarm"


def test_the_page_is_written_whole_or_not_at_all(tmp_path, sick, monkeypatch):
    folder = synthetic.run(tmp_path / "run", samples=3)
    out = write_report(folder, tmp_path / "page.html")
    assert out.read_text(encoding="utf-8").startswith("<!doctype html>")
    before = out.read_bytes()
    monkeypatch.setattr(
        "omninorm.record.files.os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(RunError, match="space"):
        write_report(folder, out)
    assert out.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "run"]


def test_a_page_never_replaces_the_record(tmp_path):
    record = synthetic.run(tmp_path / "run", samples=2) / "record.jsonl"
    before = record.read_bytes()
    with pytest.raises(RunError, match="a page must not replace a record"):
        write_report(record, record)
    assert record.read_bytes() == before


def test_only_the_record_is_needed(tmp_path):
    story = story_of(tmp_path, scene="logits", samples=6)
    assert render(read_run(tmp_path / "run" / "record.jsonl")) == render(story)
