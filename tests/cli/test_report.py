"""`omninorm report`: the verdict, the path of the page, and one sentence for bad input."""

from __future__ import annotations

import json
import re

import pytest
from helpers import synthetic_run as synthetic

from omninorm.record import Record


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    alarm = {
        "step": 4,
        "severity": "fail",
        "rule": "attention-logits",
        "layer": "blocks.1\x1b[31m",
        "evidence": "they passed 1e4",
    }
    record = Record(folder / "record.jsonl")
    record.append(
        {
            "kind": "watch",
            "step": 0,
            "format": 1,
            "every": 2,
            "model": "Thinker",
            "blocks": ["blocks.0", "blocks.1\x1b[31m"],
        }
    )
    record.append(
        {
            "kind": "steps",
            "step": 4,
            "first": 1,
            "loss": [4, 3, 2, "nan"],
            "grad_norm": [1, 1, 1, 1],
            "lr": [1, 1, 1, 1],
        }
    )
    record.append({"kind": "sample", "step": 4, "signals": {"stream_rms": [1.0, 2.0]}, "worst": {}})
    record.append({"kind": "alarms", "step": 4, "alarms": [{**alarm, "remedy": "try qk-norm", "source": "Wortsman"}]})
    record.close()
    return folder


def test_report_prints_the_verdict_and_the_path_of_the_page(command, run):
    outcome = command("report", run)
    page = run / "report.html"
    assert outcome.code == 0
    assert outcome.out.splitlines() == [
        "Failing: blocks.1␛[31m: they passed 1e4 (step 4).",
        "What to try: qk-norm",
        "Alarms: 1 failure, 0 warnings.",
        f"Report: {page}",
    ]
    assert "they passed 1e4" in page.read_text(encoding="utf-8")


def test_report_prints_json_and_writes_to_another_file(command, run, tmp_path):
    page = tmp_path / "page.html"
    printed = json.loads(command("report", run / "record.jsonl", "--out", page, "--json").out)
    assert printed["verdict"]["status"] == "failing"
    assert printed["page"] == str(page)
    assert printed["alarms"][0]["rule"] == "attention-logits"
    assert (printed["steps"], printed["samples"]) == (4, 1)
    assert page.stat().st_size > 10_000
    assert not (run / "report.html").exists()


def test_trained_run_has_a_report(command, small, tmp_path):
    folder = tmp_path / "trained"
    assert command("train", *small, "--out", folder).code == 0
    outcome = command("report", folder)
    assert outcome.code == 0
    assert f"Report: {folder / 'report.html'}" in outcome.out.replace("\n", "")
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert 'data-name="step-loss"' in page
    assert 'data-name="eval"' in page
    assert "train.batch_size" in page


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (None, "record.jsonl"),
        (b"", "no events"),
        (b"\x1b[31mnonsense\n", "not a record"),
        (b'{"kind": "watch", "step": 0, "format": 9}\n', "format 9"),
    ],
)
def test_bad_records_are_refused_in_one_sentence(command, tmp_path, content, part):
    if content is not None:
        (tmp_path / "record.jsonl").write_bytes(content)
    outcome = command("report", tmp_path)
    assert outcome.code == 2
    assert outcome.err.startswith("omninorm: ")
    assert outcome.err.count("\n") == 1
    assert part in outcome.err
    assert not (tmp_path / "report.html").exists()


def test_a_page_with_another_suffix_is_refused(command, run, tmp_path):
    for name in ("a.pdf", "a.md", "a"):
        outcome = command("report", run, "--out", tmp_path / name)
        assert outcome.code == 2
        assert outcome.err.count("\n") == 1
        assert f"must end in .html, got {tmp_path / name}" in outcome.err
        assert f"--out {tmp_path / 'a.html'}" in outcome.err
        assert not (tmp_path / name).exists()


def test_output_that_cannot_be_written_is_refused_in_one_sentence(command, run, tmp_path):
    for out in (tmp_path, tmp_path / "nowhere" / "page.html", run / "record.jsonl"):
        outcome = command("report", run, "--out", out)
        assert outcome.code == 2
        assert outcome.err.count("\n") == 1


def test_two_runs_are_overlaid_and_their_parting_is_named(command, tmp_path):
    first, second = (synthetic.run(tmp_path / name, samples=20) for name in ("one", "two"))
    outcome = command("report", first, second)
    page = second / "against-one.html"
    assert outcome.code == 0
    assert outcome.out.replace("\n", " ").startswith("The runs are equal in all 200 recorded steps. Report: ")
    assert page.exists()
    record = second / "record.jsonl"
    record.write_text(re.sub(r'"lr": \[[^]]*\]', lambda found: found[0].replace("0.00", "0.01"), record.read_text()))
    printed = json.loads(command("report", first, second, "--json", "--out", tmp_path / "page.html").out)
    assert (printed["step"], printed["curve"]["name"], printed["steps"]) == (1, "lr", 200)
    assert printed["sentence"] == "The runs part at step 1: learning rate."
    assert (tmp_path / "page.html").exists()


def test_unreadable_second_run_is_refused_in_one_sentence(command, run, tmp_path):
    (tmp_path / "empty").mkdir()
    for other in (tmp_path / "empty", tmp_path / "nowhere"):
        outcome = command("report", run, other)
        assert outcome.code == 2
        assert outcome.err.count("\n") == 1
        assert str(other) in outcome.err


@pytest.mark.parametrize("options", [["--live", "--json"], ["OTHER", "--live"]])
def test_options_that_exclude_each_other_are_refused(command, run, options):
    outcome = command("report", run, *[run if option == "OTHER" else option for option in options])
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1


def test_live_page_refreshes_until_the_run_ends(command, tmp_path, monkeypatch):
    folder = synthetic.run(tmp_path / "run", samples=3)
    record, page = folder / "record.jsonl", folder / "report.html"
    *begin, end = record.read_text().splitlines(keepends=True)
    record.write_text("".join(begin))
    pages = []

    def sleep(seconds):
        pages.append((seconds, page.read_text(encoding="utf-8"), page.stat().st_mtime_ns))
        if len(pages) == 2:
            record.write_text("".join([*begin, end]))

    monkeypatch.setattr("omninorm.cli.report.time.sleep", sleep)
    outcome = command("report", folder, "--live", "--every", 3)
    assert outcome.code == 0
    assert [seconds for seconds, _, _ in pages] == [3, 3]
    assert '<noscript><meta http-equiv="refresh" content="3"></noscript>' in pages[0][1]
    assert '"refresh":3' in pages[0][1]
    assert pages[0][2] == pages[1][2], "a record that has not grown needs no new page"
    last = page.read_text(encoding="utf-8")
    assert '"refresh":null' in last
    assert 'http-equiv="refresh"' not in last
    assert "No alarm in 30 steps" in outcome.out


def test_interrupted_live_page_stays_without_refresh(command, tmp_path, monkeypatch):
    folder = synthetic.run(tmp_path / "run", samples=3)
    record = folder / "record.jsonl"
    record.write_text("".join(record.read_text().splitlines(keepends=True)[:-1]))

    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr("omninorm.cli.report.time.sleep", interrupt)
    assert command("report", folder, "--live").code == 0
    assert '"refresh":null' in (folder / "report.html").read_text(encoding="utf-8")


def test_live_report_of_a_missing_record_is_refused(command, tmp_path):
    outcome = command("report", tmp_path, "--live")
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
