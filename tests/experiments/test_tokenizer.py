"""Tokenizers lose nothing, count bytes, and are read back from their file."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch

from omninorm.errors import ConfigError, RunError
from omninorm.experiments import BpeTokenizer, ByteTokenizer, build_tokenizer, load_tokenizer

TEXT = ("the Æther — “quoted”, 漢字, \U0001f600, a\ttab\r\nand\n\n\n  spaces  \n" * 30).encode()


@pytest.fixture(scope="module")
def bpe() -> BpeTokenizer:
    return BpeTokenizer.train(TEXT, 300)


def test_byte_tokens_are_the_bytes():
    tokens = ByteTokenizer().encode("é!".encode())
    assert tokens.tolist() == [0xC3, 0xA9, 0x21]
    assert ByteTokenizer().decode([0xC3, 0xA9]) == "é".encode()
    assert ByteTokenizer().encode(b"").tolist() == []


def test_every_byte_tokenizer_token_is_one_byte():
    assert torch.equal(ByteTokenizer().byte_lengths(), torch.ones(256, dtype=torch.int64))


@pytest.mark.parametrize("text", [TEXT, b"unseen: \x01\x7f", "Ωmega".encode(), b"", b"\n"])
def test_bpe_round_trip_is_lossless(bpe, text):
    tokens = bpe.encode(text)
    assert bpe.decode(tokens.tolist()) == text
    assert int(bpe.byte_lengths()[tokens.long()].sum()) == len(text)


def test_bpe_compresses_what_it_was_trained_on(bpe):
    assert bpe.vocab_size == 300
    assert len(bpe.encode(TEXT)) < len(TEXT) / 2


def test_bpe_of_a_text_in_pieces_is_lossless(bpe, monkeypatch):
    monkeypatch.setattr("omninorm.experiments.tokenizer._PIECE", 10)
    assert bpe.decode(bpe.encode(TEXT).tolist()) == TEXT


def test_bpe_is_read_back(bpe, tmp_path):
    (tmp_path / "tokenizer.json").write_text(bpe.to_json(), encoding="utf-8")
    again = load_tokenizer("bpe", tmp_path)
    assert torch.equal(again.encode(TEXT), bpe.encode(TEXT))


def test_a_small_text_gives_fewer_tokens_than_asked_for():
    tokenizer = BpeTokenizer.train(b"ab ab ab", 5000)
    assert 256 < tokenizer.vocab_size < 300


@pytest.mark.parametrize("content", [None, "", "{", '{"version": "1.0"}', "[]"])
def test_a_missing_or_damaged_file_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(RunError, match=r"tokenizer\.json"):
        load_tokenizer("bpe", tmp_path)


def test_sizes_that_do_not_go_with_the_kind_are_refused():
    with pytest.raises(ConfigError, match=r"256 tokens.*vocab_size=300.*'bpe'"):
        build_tokenizer("byte", 300, TEXT)
    with pytest.raises(ConfigError, match=r"257.*got 256"):
        build_tokenizer("bpe", 256, TEXT)
    with pytest.raises(ConfigError, match="byte, bpe, got 'words'"):
        build_tokenizer("words", None, TEXT)


def test_a_vocabulary_with_a_gap_is_refused(bpe, tmp_path):
    content = json.loads(bpe.to_json())
    content["model"]["vocab"] = {word: index * 2 for word, index in content["model"]["vocab"].items()}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(RunError, match=r"tokenizer\.json"):
        load_tokenizer("bpe", tmp_path)


def test_another_tokenizer_than_the_one_written_is_refused(bpe, tmp_path):
    (tmp_path / "tokenizer.json").write_text(bpe.to_json(), encoding="utf-8")
    digest = hashlib.sha256(bpe.to_json().encode()).hexdigest()
    assert load_tokenizer("bpe", tmp_path, digest).vocab_size == 300
    (tmp_path / "tokenizer.json").write_text(BpeTokenizer.train(TEXT, 299).to_json(), encoding="utf-8")
    with pytest.raises(RunError, match=r"tokenizer\.json has changed"):
        load_tokenizer("bpe", tmp_path, digest)


def test_a_vocabulary_above_the_limit_is_refused():
    with pytest.raises(ConfigError, match=r"vocab_size.*1048577"):
        build_tokenizer("bpe", 2**20 + 1, b"some text")
