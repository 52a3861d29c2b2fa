"""Bits per byte, compared with manual counts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from omninorm.experiments import (
    BpeTokenizer,
    ByteTokenizer,
    TokenData,
    bits_per_byte,
    unigram_bits_per_byte,
    xz_bits_per_byte,
)


class Table(nn.Module):
    """Returns logits that depend only on the last token, so that the mean over a text can be computed manually."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.logits[tokens]


def _data(tokens: torch.Tensor, lengths: torch.Tensor | None = None) -> TokenData:
    return TokenData(tokens, tokens, ByteTokenizer().byte_lengths() if lengths is None else lengths)


@pytest.mark.parametrize("length", [17, 33, 40, 100])
def test_a_uniform_model_over_bytes_needs_exactly_eight_bits(length):
    tokens = torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(0))
    found = bits_per_byte(Table(torch.zeros(256, 256)), _data(tokens.to(torch.uint8)), seq_len=16, batch_size=3)
    # ln 256 rounded to float32 is the only error.
    assert found == pytest.approx(8.0, rel=2**-24)


@pytest.mark.parametrize("length", [10, 11, 23, 24, 25])
def test_every_token_but_the_first_counts_once(length):
    logits = torch.randn(256, 256, generator=torch.Generator().manual_seed(1))
    tokens = torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(2))
    nats = -logits.double().log_softmax(-1)
    pairs = zip(tokens[:-1].tolist(), tokens[1:].tolist(), strict=True)
    by_hand = sum(float(nats[a, b]) for a, b in pairs) / math.log(2) / (length - 1)
    found = bits_per_byte(Table(logits), _data(tokens), seq_len=4, batch_size=2)
    # Each term is rounded to float32 after a log-sum-exp over 256 values: a few units in the last place.
    assert found == pytest.approx(by_hand, rel=8 * 2**-24)


def test_with_bpe_the_bytes_of_the_text_count():
    text = b"the cat and the hat and the bat " * 20
    tokenizer = BpeTokenizer.train(text, 280)
    tokens = tokenizer.encode(text)
    model = Table(torch.zeros(tokenizer.vocab_size, tokenizer.vocab_size))
    found = bits_per_byte(model, _data(tokens, tokenizer.byte_lengths()), seq_len=8, batch_size=4)
    first = len(tokenizer.decode(tokens[:1].tolist()))
    expected = math.log2(tokenizer.vocab_size) * (len(tokens) - 1) / (len(text) - first)
    assert found == pytest.approx(expected, rel=2**-22)
    assert len(tokens) < len(text) / 2


def test_evaluation_changes_neither_gradients_nor_random_state(model, data):
    model.train()
    state = torch.get_rng_state()
    bits_per_byte(model, data, seq_len=16, batch_size=2)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_the_unigram_baseline_by_hand():
    # Counts plus one: a 3, b 2, the other 254 bytes 1 each: 259 in all.
    expected = -(2 * math.log2(3 / 259) + math.log2(2 / 259) + math.log2(1 / 259)) / 4
    assert unigram_bits_per_byte(b"aab", b"aabz") == pytest.approx(expected, rel=1e-12)


def test_the_xz_baseline_is_below_the_unigram_baseline_on_repeated_text(text_file):
    text = text_file.read_bytes()
    train, held_out = text[:3600], text[3600:]
    unigram, xz = unigram_bits_per_byte(train, held_out), xz_bits_per_byte(train, held_out)
    # The text is one sentence over and over: letters alone cost about 4 bits, xz sees the repetition.
    assert xz < 2.0 < unigram < 5.0
