"""`omninorm report`: the verdict, where the page is, and one sentence for bad input."""

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


def test_it_says_the_verdict_and_where_the_page_is(command, run):
    outcome = command("report", run)
    page = run / "report.html"
    assert outcome.code == 0
    assert outcome.out.splitlines() == [
        "Failing: blocks.1␛[31m: they passed 1e4 (step 4).",
        "What to try: qk-norm",
        "Alarms: 1 failure, 0 warnings.",
        f"Written to {page}",
    ]
    assert "they passed 1e4" in page.read_text(encoding="utf-8")


def test_json_and_another_place(command, run, tmp_path):
    page = tmp_path / "page.html"
    told = json.loads(command("report", run / "record.jsonl", "--out", page, "--json").out)
    assert told["verdict"]["status"] == "failing"
    assert told["page"] == str(page)
    assert told["alarms"][0]["rule"] == "attention-logits"
    assert (told["steps"], told["samples"]) == (4, 1)
    assert page.stat().st_size > 10_000
    assert not (run / "report.html").exists()


def test_a_run_of_train_has_a_report(command, small, tmp_path):
    folder = tmp_path / "trained"
    assert command("train", *small, "--out", folder).code == 0
    outcome = command("report", folder)
    assert outcome.code == 0
    assert "Written to" in outcome.out
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert 'data-name="step-loss"' in page
    assert 'data-name="eval"' in page
    assert "train.batch_size" in page


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (None, "must have a record.jsonl"),
        (b"", "at least one event"),
        (b"\x1b[31mnonsense\n", "needs a record of omninorm"),
        (b'{"kind": "watch", "step": 0, "format": 9}\n', "upgrade omninorm"),
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


def test_a_place_that_cannot_be_written(command, run, tmp_path):
    for out in (tmp_path, tmp_path / "nowhere" / "page.html", run / "record.jsonl"):
        outcome = command("report", run, "--out", out)
        assert outcome.code == 2
        assert outcome.err.count("\n") == 1
