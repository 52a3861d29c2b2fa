"""Damaged tokenizer files: each is read, or refused by an OmninormError, within limits of time and memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.mutations import bounded, cases, mutated_json, refuses_or_reads
from helpers.tiny_files import WORDS, tokenizer_json

from omninorm.experiments import BpeTokenizer, load_tokenizer
from omninorm.experiments.pretrained import FolderTokenizer, GgufTokenizer

TEXT = "ab a – é\n"


def _use(tokenizer) -> None:
    tokens = tokenizer.encode(TEXT.encode()).tolist()
    assert isinstance(tokenizer.decode([*tokens, 0, 10**6]), bytes)
    assert len(tokenizer.byte_lengths()) == tokenizer.vocab_size


def _use_folder(path: Path) -> None:
    _use(FolderTokenizer(path))


def _use_run(folder: Path) -> None:
    tokenizer = load_tokenizer("bpe", folder)
    tokenizer.decode(tokenizer.encode(TEXT.encode()).tolist())


@pytest.mark.parametrize("kind", ["folder", "run"])
def test_a_damaged_tokenizer_file_is_read_or_refused(tmp_path, kind):
    path = tmp_path / "tokenizer.json"
    good = tokenizer_json() if kind == "folder" else json.loads(BpeTokenizer.train(b"ab ab ab", 258).to_json())
    use, argument = (_use_folder, path) if kind == "folder" else (_use_run, tmp_path)
    path.write_text(json.dumps(good))
    use(argument)
    read = 0
    for case in range(cases(150)):
        damaged = mutated_json(good, case)
        path.write_bytes(damaged)
        with bounded(len(damaged)):
            read += refuses_or_reads(use, argument)
    assert 0 < read < cases(150)


def test_damaged_metadata_of_a_tokenizer_is_read_or_refused():
    good = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": WORDS,
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.token_type": [3, 1, 1, 1, 1],
        "tokenizer.ggml.eos_token_id": 0,
    }
    read = 0
    for case in range(cases(200)):
        try:
            damaged = json.loads(mutated_json(good, case))
        except ValueError:
            continue
        if isinstance(damaged, dict):
            with bounded(0):
                read += refuses_or_reads(lambda values: _use(GgufTokenizer(values)), damaged)
    assert 0 < read < cases(200)
