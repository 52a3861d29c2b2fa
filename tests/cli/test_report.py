"""`omninorm report`: the verdict, the path of the page, and one sentence for bad input."""

from __future__ import annotations

import json

import pytest

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
