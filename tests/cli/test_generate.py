"""`omninorm generate`: the same text streamed or as JSON, and nothing that could harm a terminal."""

from __future__ import annotations

import io
import json

import pytest

from omninorm.cli.generate import _write
from omninorm.cli.harmless import harmless


@pytest.fixture
def run(command, small, tmp_path):
    folder = tmp_path / "run"
    assert command("train", *small, "--out", folder, "--checkpoint-every", 2)[0] == 0
    return folder


def test_a_seed_repeats_the_text(command, run):
    texts = [command("generate", run, "--prompt", "In", "--seed", seed, "--max-new-tokens", 40) for seed in (1, 1, 2)]
    assert texts[0].code == 0
    assert texts[0].out.startswith("In")
    assert texts[0] == texts[1] != texts[2]


def test_json_has_the_whole_story(command, run):
    options = ["--prompt", "In", "--seed", 1, "--max-new-tokens", 40, "--top-k", 50, "--top-p", 0.9]
    streamed = command("generate", run, *options).out
    told = json.loads(command("generate", run, *options, "--json").out)
    assert (told["run"], told["step"], told["prompt"], told["seed"]) == (str(run), 4, "In", 1)
    assert harmless("In" + told["text"]) + "\n" == streamed


def test_text_ends_before_a_stop(command, run):
    options = ["--prompt", "In", "--seed", 1, "--max-new-tokens", 60, "--json"]
    whole = json.loads(command("generate", run, *options).out)["text"]
    stop = next(character for character in whole[10:] if character.isascii())
    cut = json.loads(command("generate", run, *options, "--stop", stop, "--stop", "\0\0\0").out)["text"]
    assert cut == whole[: whole.index(stop)]


def test_an_older_checkpoint_can_be_chosen(command, run):
    told = json.loads(command("generate", run, "--step", 2, "--max-new-tokens", 1, "--json").out)
    assert told["step"] == 2


def test_control_characters_become_pictures():
    assert harmless("a\n\tb\x1b[2J\r\x07\x7f\x9b漢") == "a\n\tb␛[2J␍␇␡�漢"


def test_a_stream_that_cannot_show_a_character_gets_a_question_mark(monkeypatch):
    """In a process whose stdout is ASCII; `main` sets its error handler."""
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii", errors="strict")
    monkeypatch.setattr("sys.stdout", stream)
    from omninorm.cli import main

    with pytest.raises(SystemExit):
        main(["--version"])
    _write("漢")
    assert raw.getvalue().endswith(b"?")
