"""Models from a path: transformers' folders, runs and GGUF files, with their tokenizers; the tokens of a text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.cli import SMALL, call
from helpers.converted import random_model, write_folder, write_gguf

from omninorm.errors import DataError, OmninormError, RunError
from omninorm.experiments.models import load_model, tokens_of
from omninorm.experiments.pretrained import FolderTokenizer
from omninorm.experiments.tokenizer import BpeTokenizer, ByteTokenizer
from omninorm.thinker import Thinker

BYTES = ByteTokenizer()


def test_a_folder_of_transformers_is_loaded_by_transformers(tmp_path: Path) -> None:
    model, tokenizer = load_model(write_folder(random_model("gemma"), tmp_path / "m"))
    assert (type(model).__name__, tokenizer) == ("GemmaForCausalLM", None)


def test_a_folder_may_hold_a_tokenizer(tmp_path: Path) -> None:
    folder = write_folder(random_model("llama"), tmp_path / "m")
    (folder / "tokenizer.json").write_text(BpeTokenizer.train(b"some text " * 50, 260).to_json() or "")
    tokenizer = load_model(folder)[1]
    assert isinstance(tokenizer, FolderTokenizer)
    assert tokenizer.decode(tokenizer.encode(b"some text").tolist()) == b"some text"


def test_unsupported_tokenizers_are_left_out(tmp_path: Path) -> None:
    folder = write_folder(random_model("llama"), tmp_path / "m")
    (folder / "tokenizer.json").write_text("{}")
    assert load_model(folder)[1] is None


def test_a_gguf_file_is_loaded_with_or_without_a_tokenizer(tmp_path: Path) -> None:
    model, tokenizer = load_model(write_gguf(random_model("llama"), tmp_path / "m.gguf", "llama"))
    assert (isinstance(model, Thinker), model.training, tokenizer) == (True, False, None)


def test_a_run_is_loaded_with_its_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("In the beginning. " * 300)
    assert call("train", "--text", tmp_path / "text.txt", *SMALL, "--steps", 1, "--out", tmp_path / "run") == 0
    model, tokenizer = load_model(tmp_path / "run")
    assert isinstance(model, Thinker)
    assert isinstance(tokenizer, ByteTokenizer)


def refuse(path: Path, error: type[OmninormError], said: str) -> None:
    with pytest.raises(error) as caught:
        load_model(path)
    assert said in str(caught.value)


def test_other_paths_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "nowhere", RunError, "No such file or folder")
    refuse(tmp_path / "x.txt", RunError, "is a file, but not a .gguf file")
    refuse(tmp_path / "empty", RunError, "empty")


def test_tokens_are_the_first_of_the_text_by_the_first_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("héllo" * 50, encoding="utf-8")
    for tokenizers in ((BYTES, None), (None, BYTES)):
        found = tokens_of(path, tokenizers, 4)
        assert (found.dtype, found.tolist()) == (torch.int64, [[104, 0xC3, 0xA9, 108]])
    assert tokens_of(path, (BYTES, None), 10**6).shape == (1, 300)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "Cannot read"),
        (b"", "must hold some text, got 0 characters"),
        (b"ab\xff", "must be UTF-8, got an invalid byte at 2"),
    ],
)
def test_unusable_texts_are_refused(content: bytes | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        tokens_of(path, (BYTES, None), 10)
    assert said in str(caught.value)


def test_a_text_needs_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="Neither model has a tokenizer"):
        tokens_of(tmp_path / "text.txt", (None, None), 10)
