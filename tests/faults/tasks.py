"""Tasks: the batch of each step, as a pure function of the seed and the step.

Every task is a classification: the model returns logits (..., classes), the batch has a label for each position, and
-100 marks a position without one. A fault can therefore change inputs, labels or logits of any task in the same way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from omninorm.experiments.corpus import load_corpus, windows

IGNORED = -100
MASK, PAD = 3, 0
CLASSES, IMAGE = 8, 24
HELD_OUT = 1_000_000  # added to the step of evaluation batches


@dataclass
class Batch:
    """The inputs of a step, their labels, and the attention mask and images where a model takes them."""

    inputs: Tensor
    labels: Tensor
    mask: Tensor | None = None
    images: Tensor | None = None


Task = Callable[[int, int, int, int], Batch]
"""Return the batch for (seed, step, batch size, length)."""


@functools.cache
def text(held_out: bool = False) -> Tensor:
    """Return the King James Bible as bytes."""
    corpus = load_corpus()
    return torch.frombuffer(bytearray(corpus.held_out if held_out else corpus.train), dtype=torch.uint8)


def _windows(seed: int, step: int, size: int, length: int) -> Tensor:
    return windows(text(step >= HELD_OUT), seed, step, size, length)


def _generator(seed: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 2_000_003 + step) % 2**31)


def causal(seed: int, step: int, size: int, length: int) -> Batch:
    """Predict the next byte."""
    found = _windows(seed, step, size, length)
    return Batch(found[:, :-1], found[:, 1:])


def shifted_alphabet(seed: int, step: int, size: int, length: int) -> Batch:
    """Predict the next byte of a text whose letters are replaced by the next ones: new data for a pretrained model."""
    table = torch.arange(256)
    table[97:122] += 1
    table[122] = 97
    batch = causal(seed, step, size, length)
    return Batch(table[batch.inputs], table[batch.labels])


def masked(seed: int, step: int, size: int, length: int) -> Batch:
    """Predict the 15 % of the bytes that are masked."""
    found = _windows(seed, step, size, length - 1)
    hidden = torch.rand(found.shape, generator=_generator(seed, step)) < 0.15
    hidden[:, 0] = True  # at least one label in every row
    return Batch(found.masked_fill(hidden, MASK), found.masked_fill(~hidden, IGNORED))


def continued(seed: int, step: int, size: int, length: int) -> Batch:
    """Predict the second half of a window from its first half. The inputs are those of encoder and decoder, joined."""
    found = _windows(seed, step, size, length)
    return Batch(found[:, :-1], found[:, length // 2 + 1 :])


def next_kind(seed: int, step: int, size: int, length: int) -> Batch:
    """Classify the byte that follows each position: vowel, consonant, space or other."""
    found = _windows(seed, step, size, length)
    kinds = torch.full((256,), 3)
    kinds[list(b"abcdefghijklmnopqrstuvwxyz")] = 1
    kinds[list(b"aeiou")] = 0
    kinds[list(b" ")] = 2
    return Batch(found[:, :-1], kinds[found[:, 1:]])


@functools.cache
def _prototypes() -> Tensor:
    return torch.randn(CLASSES, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(7))


def _images(classes: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(len(classes), 3, IMAGE, IMAGE, generator=generator)
    return 0.4 * _prototypes()[classes] + noise


def images(seed: int, step: int, size: int, length: int) -> Batch:
    """Classify an image: one of eight patterns in noise."""
    generator = _generator(seed, step)
    classes = torch.randint(CLASSES, (size,), generator=generator)
    return Batch(torch.zeros(0), classes, images=_images(classes, generator))


def pairs(seed: int, step: int, size: int, length: int) -> Batch:
    """Find each image's caption among those of the batch."""
    generator = _generator(seed, step)
    classes = torch.randperm(CLASSES, generator=generator)[:size]
    captions = torch.randint(100, 200, (len(classes), length), generator=generator)
    captions[:, 2] = 10 + classes
    captions[:, -1] = 2  # end of text
    return Batch(captions, torch.arange(len(classes)), images=_images(classes, generator))


def padded(batch: Batch, seed: int, step: int) -> Batch:
    """Return the batch with 30 to 70 % of each row replaced by padding, which has no labels and is masked."""
    rows, length = batch.inputs.shape
    kept = (length * (0.3 + 0.4 * torch.rand(rows, 1, generator=_generator(seed, step + 1)))).long()
    mask = torch.arange(length) < kept
    return Batch(batch.inputs.masked_fill(~mask, PAD), batch.labels.masked_fill(~mask, IGNORED), mask.long())
