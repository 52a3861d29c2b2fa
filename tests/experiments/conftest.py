"""A text, and a model small enough to train in milliseconds."""

from __future__ import annotations

import pytest
import torch
from helpers.cli import SENTENCE

from omninorm.experiments import ByteTokenizer, TokenData, TrainConfig, load_corpus, tokenize
from omninorm.thinker import Thinker, ThinkerConfig


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(SENTENCE * 40, encoding="utf-8")
    return path


@pytest.fixture
def data(text_file) -> TokenData:
    return tokenize(load_corpus(text_file), ByteTokenizer(), 16)


@pytest.fixture
def small() -> TrainConfig:
    return TrainConfig(steps=6, batch_size=2, seq_len=16, eval_every=3, checkpoint_every=2, eval_bytes=None)


@pytest.fixture
def model() -> Thinker:
    torch.manual_seed(0)
    return Thinker(ThinkerConfig(d_model=16, n_layers=1, n_heads=2, max_seq_len=16))
