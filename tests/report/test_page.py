"""render and write_report: contents, escaping, Content-Security-Policy, size, and atomic writing of the page."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from helpers import synthetic_run as synthetic
from helpers.stories import alarm, of_losses, story_of

from omninorm.errors import RunError
from omninorm.record.signals import SIGNALS
from omninorm.report import read_run, render, write_report
from omninorm.report.facts import facts, samples
from omninorm.report.packing import unpack
from omninorm.report.story import RunStory, Series


def embedded(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page)[1])


class Document(HTMLParser):
    """The tags of a page, checked for correct nesting."""

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
def faulty(tmp_path_factory) -> RunStory:
    return story_of(tmp_path_factory.mktemp("faulty"), scene="logits", kinds="both")


def test_table_of_more_than_eight_alarms_scrolls(faulty):
    for number, kind in ((8, "scroll whole"), (9, "scroll")):
        alarms = [alarm(step, source="somebody, 2023") for step in range(number)]
        page = render(replace(faulty, alarms=alarms))
        assert f'<div class="{kind}" tabindex="0" role="region" aria-label="{number} alarms' in page
        expected = '<td><p>it was too large</p><p class="remedy"><b>What to try</b> less</p><p class="source">Source: somebody, 2023</p></td>'
        assert page.count(expected) == number


def test_loss_of_a_trained_run_has_a_unit_and_of_a_custom_loop_has_none(faulty):
    trained, given = dict(facts(faulty)), dict(facts(replace(faulty, evals=Series([], []))))
    assert trained["Last loss"].endswith(" nats per token")
    assert trained["Last evaluation"].endswith(" bits per byte")
    assert float(given["Last loss"]) == float(trained["Last loss"].split()[0])
    assert "Last evaluation" not in given
    assert "<h3>Loss</h3><p>nats per token, every step</p>" in render(faulty)
    assert "<h3>Loss</h3><p>every step</p>" in render(replace(faulty, evals=Series([], []), config={}))


def test_rows_have_short_unique_names(faulty):
    groups = ["blocks.0", "tokens.embedding", "places.embedding", "lm_head", "end.3", "model.e"]
    story = replace(faulty, watched=replace(faulty.watched, blocks=["blocks.0"], groups=groups))
    story = replace(story, columns=[], samples=0)
    labels = embedded(render(story))["ticks"]["group"]
    assert labels == ["0", "tokens.embedding", "places.embedding", "lm_head", "end.3", "model.e"]


def test_largest_float_is_drawn_as_not_finite(faulty):
    page = render(of_losses(faulty, *[1.0] * 59, 1.797e308, 1.7976931348623157e308))
    assert embedded(page)["figures"]["step-loss"]["bad"] == [60, 61]


def test_page_has_all_sections_figures_and_tables_in_order(faulty):
    page = render(faulty)
    document = Document(page)
    assert document.open == []
    headings = re.findall(r"<h2[^>]*>(.*?)</h2>", page)
    assert headings == [
        "Alarms", "The run", "Training", "By depth", "Norms", "Weights and optimizer", "Output and gradient noise",
        "Values by layer", "Signals without values",
    ]  # fmt: skip
    assert page.index("<h1>Failing") < page.index("<h2")
    assert len(document.named("h1")) == len(document.named("main")) == 1
    figures = [each["data-name"] for each in document.named("figure") if "data-name" in each]
    shown = {name.removeprefix("signal-") for name in figures}
    missing = {"saturation", "noise_scale"}
    assert shown == {*SIGNALS, "step-loss", "step-grad_norm", "step-lr", "eval"} - missing
    assert set(re.findall(r"<td><code>(\w+)</code></td>", page[page.index("table-unseen") :])) == missing
    canvases = document.named("canvas")
    assert len(canvases) == len(figures)
    assert all(each["role"] == "img" and len(each["aria-label"]) > 30 for each in canvases)
    assert len(document.named("table")) == len(document.named("caption")) == 4
    assert all(each.get("scope") in ("row", "col") for each in document.named("th"))
    for label, text in facts(faulty):
        assert f"<dt>{label}</dt><dd>" in page, text


def test_figures_hold_the_numbers_of_the_record(faulty):
    data = embedded(render(faulty))
    assert data["steps"] == [column.step for column in faulty.columns]
    assert data["axes"]["block"] == list(faulty.watched.blocks)
    cells = unpack(data["figures"]["stream_grad"]["data"])
    assert cells == pytest.approx([v for column in faulty.columns for v in column.signals["stream_grad"]], rel=2**-8)
    assert data["figures"]["step-loss"]["x"] == list(range(1, 601))
    assert data["figures"]["eval"]["y"][0] == 8.0
    assert data["refresh"] is None
    assert data["alarms"][data["lead"]] == [360, "fail", "attention-logits", "blocks.8"]
    assert data["ticks"]["group"][-4:] == ["11", "embedding", "norm", "head"]
    assert data["ticks"]["norm"][:3] == ["0", "", "1"]


def test_figures_have_text_alternatives(faulty):
    labels = [each.get("aria-label", "") for each in Document(render(faulty)).named("canvas")]
    logits = next(label for label in labels if label.startswith("Largest attention logit"))
    values = [value for column in faulty.columns for value in column.signals["attention_logit"]]
    assert "12 blocks by 60 samples" in logits
    assert f"to {max(values):,.0f}." in logits
    assert "largest in blocks.8" in logits


def test_policy_allows_only_the_own_script_and_style(faulty):
    page = render(faulty)
    (policy,) = [each["content"] for each in Document(page).named("meta") if each.get("http-equiv")]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    for name, tag in (("script-src", "script"), ("style-src", "style")):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        assert rules[name] == f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
    assert not re.search(r"https?:|//cdn|url\(|@import|\ssrc=|innerHTML|\son\w+=|\sstyle=", page)


def test_hostile_text_is_escaped(tmp_path):
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


def test_placeholders_in_a_record_are_not_replaced(faulty):
    page = render(replace(faulty, notes=["{{script}} {{data}}"]))
    assert "<li>{{script}} {{data}}</li>" in page


def test_run_of_only_nan_is_rendered(tmp_path):
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
    assert re.search(r"Not finite in \d+ cells", page)


def test_list_of_too_many_alarms_keeps_the_failures(faulty):
    alarms = [alarm(step, "warn", layer=None) for step in range(1, 1001)] + [alarm(1001)]
    page = render(replace(faulty, alarms=alarms))
    assert "1,001 alarms, by step; 601 of them are not listed" in page
    assert len(embedded(page)["alarms"]) == 400
    assert embedded(page)["alarms"][-1][:2] == [1001, "fail"]


def test_page_of_a_large_run_is_smaller_than_three_megabytes(tmp_path):
    """With 193 norms, 99 groups and more samples than fit: the limit on cells holds for any number of samples."""
    folder = synthetic.run(tmp_path / "run", blocks=96, samples=1, every=1)
    record = folder / "record.jsonl"
    (line,) = [line for line in record.read_text().splitlines() if '"sample"' in line]
    with open(record, "a") as file:
        file.writelines(line.replace('"step": 1', f'"step": {step}', 1) + "\n" for step in range(2, 1201))
    story = read_run(folder)
    assert story.samples == 1200
    assert len(story.columns) == 300 + 1
    size = len(render(story).encode())
    assert 2_000_000 < size < 3_000_000
    assert samples(story) == "every 4th of 1,200 samples shown (one every step), plus those at alarms"


def test_failed_write_leaves_the_old_page(tmp_path, faulty, monkeypatch):
    folder = synthetic.run(tmp_path / "run", samples=3)
    out = write_report(folder, tmp_path / "page.html")
    assert out.read_text(encoding="utf-8").startswith("<!doctype html>")
    before = out.read_bytes()
    monkeypatch.setattr(
        "omninorm.record.files.os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(RunError, match="No space left"):
        write_report(folder, out)
    assert out.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "run"]


def test_page_does_not_overwrite_the_record(tmp_path):
    record = synthetic.run(tmp_path / "run", samples=2) / "record.jsonl"
    before = record.read_bytes()
    with pytest.raises(RunError, match="overwrite the record") as error:
        write_report(record, record)
    assert str(record) in str(error.value)
    assert record.read_bytes() == before


def test_page_needs_only_the_record(tmp_path):
    story = story_of(tmp_path, scene="logits", samples=6)
    assert render(read_run(tmp_path / "run" / "record.jsonl")) == render(story)
