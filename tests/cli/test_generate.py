"""`omninorm generate`: the same text streamed or as JSON, from runs and from pretrained models."""

from __future__ import annotations

import io
import json

import pytest
from helpers.cli import SENTENCE, SMALL, call
from helpers.tiny_files import gguf_file, hugging_face

from omninorm.cli.generate import _write
from omninorm.cli.harmless import harmless


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 4 steps with checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("generate")
    (folder / "text.txt").write_text(SENTENCE * 40, encoding="utf-8")
    options = ["--text", folder / "text.txt", *SMALL, "--steps", 4, "--checkpoint-every", 2, "--no-watch"]
    assert call("train", *options, "--out", folder / "run") == 0
    return folder / "run"


def test_a_seed_repeats_the_text(command, run):
    texts = [command("generate", run, "--prompt", "In", "--seed", seed, "--max-new-tokens", 40) for seed in (1, 1, 2)]
    assert texts[0].code == 0
    assert texts[0].out.startswith("In")
    assert texts[0] == texts[1] != texts[2]


def test_json_has_the_text_and_the_settings(command, run):
    options = ["--prompt", "In", "--seed", 1, "--max-new-tokens", 40, "--top-k", 50, "--top-p", 0.9]
    streamed = command("generate", run, *options).out
    printed = json.loads(command("generate", run, *options, "--json").out)
    assert (printed["run"], printed["step"], printed["prompt"], printed["seed"]) == (str(run), 4, "In", 1)
    assert harmless("In" + printed["text"]) + "\n" == streamed


def test_text_ends_before_a_stop(command, run):
    options = ["--prompt", "In", "--seed", 1, "--max-new-tokens", 60, "--json"]
    whole = json.loads(command("generate", run, *options).out)["text"]
    stop = next(character for character in whole[10:] if character.isascii())
    cut = json.loads(command("generate", run, *options, "--stop", stop, "--stop", "\0\0\0").out)["text"]
    assert cut == whole[: whole.index(stop)]


def test_step_selects_an_older_checkpoint(command, run):
    printed = json.loads(command("generate", run, "--step", 2, "--max-new-tokens", 1, "--json").out)
    assert printed["step"] == 2


def test_control_characters_become_symbols():
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


def test_a_hugging_face_folder_continues_a_text(command, tmp_path):
    hugging_face(tmp_path)
    options = ["--prompt", "ab", "--max-new-tokens", 3, "--temperature", 0]
    code, out, err = command("generate", tmp_path, *options)
    assert (code, err) == (0, "")
    assert out.startswith("ab")
    printed = json.loads(command("generate", tmp_path, *options, "--json").out)
    assert (printed["run"], printed["step"]) == (str(tmp_path), None)
    assert harmless("ab" + printed["text"]) + "\n" == out


def test_step_of_a_pretrained_model_is_refused(command, tmp_path):
    for path in (hugging_face(tmp_path), gguf_file(tmp_path / "m.gguf")):
        code, _, err = command("generate", path, "--step", 2)
        assert code == 2
        assert f"{path} is not a run, got --step 2" in err


def test_another_architecture_is_refused_by_its_name(command, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}')
    code, _, err = command("generate", tmp_path)
    assert (code, err.count("\n")) == (2, 1)
    assert "got the architecture GPT2LMHeadModel. Run other models with transformers" in err


def test_a_hugging_face_folder_without_a_tokenizer_is_refused_in_one_line(command, tmp_path):
    hugging_face(tmp_path, tokenizer=False)
    code, _, err = command("generate", tmp_path)
    assert (code, err.count("\n")) == (2, 1)
    assert f"tokenizer.json in {tmp_path}" in err
