"""Held-out bits per byte, which is comparable between tokenizers, and two baselines."""

from __future__ import annotations

import lzma
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omninorm.device import widest
from omninorm.experiments.corpus import TokenData
from omninorm.experiments.precision import autocast


def bits_per_byte(
    model: nn.Module, data: TokenData, *, seq_len: int, batch_size: int, precision: str = "float32"
) -> float:
    """Return the sum of the losses in nats / ln 2 / bytes, over the held-out tokens.

    The text is cut into windows of seq_len inputs. A window's last target is the next window's first input, so each
    token is predicted exactly once. The first token is the exception: nothing precedes it, so its bytes do not count.
    A token is predicted from the tokens before it *in its window*, so the first target of a window has a context of one
    token, and the mean context is (seq_len + 1)/2. The result is therefore larger than with full contexts, equally for
    all models with the same seq_len. The bytes are those of the text, for any tokenizer.

    Args:
        model: maps int64 tokens (batch, sequence) to logits (batch, sequence, vocabulary).
        data: the tokens.
        seq_len: tokens per window.
        batch_size: windows per forward pass; it changes only the rounding of the result.
        precision: "float32", or "bfloat16" or "float16" (autocast).
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    losses: list[Tensor] = []
    count = 0
    try:
        with torch.no_grad(), autocast(precision, device):
            for inputs, targets in _held_out_batches(data.held_out, seq_len, batch_size):
                logits = model(to_device(inputs, device))
                expected = to_device(targets, device).flatten()
                loss = F.cross_entropy(logits.flatten(0, 1).float(), expected, reduction="none")
                losses.append(loss.to(widest(device)).sum())
                count += int(data.byte_lengths[targets].sum())
    finally:
        model.train(was_training)
    nats = 0.0
    for each in torch.stack(losses).tolist():  # only here does the host wait for a GPU
        nats += each
    return nats / math.log(2.0) / count


def to_device(tokens: Tensor, device: torch.device) -> Tensor:
    """Copy tokens from the host to the device; for NVIDIA and AMD GPUs from pinned memory, without waiting."""
    pinned = tokens.pin_memory() if device.type == "cuda" else tokens
    return pinned.to(device, non_blocking=device.type != "mps")


def unigram_bits_per_byte(train: bytes, held_out: bytes) -> float:
    """Return the unigram baseline: the cross entropy of the held-out bytes under the training bytes' frequencies.

    Each count is increased by one, so that a byte that is not in the training text has a finite cost.
    """
    counts = torch.bincount(torch.frombuffer(bytearray(train), dtype=torch.uint8).long(), minlength=256)
    bits = -torch.log2((counts + 1).double() / (counts + 1).sum())
    return float(bits[torch.frombuffer(bytearray(held_out), dtype=torch.uint8).long()].mean())


def xz_bits_per_byte(train: bytes, held_out: bytes) -> float:
    """Return the xz baseline: the growth of the compressed training text when the held-out text is appended."""
    alone = len(lzma.compress(train, preset=6))
    return (len(lzma.compress(train + held_out, preset=6)) - alone) * 8.0 / len(held_out)


def _held_out_batches(tokens: Tensor, seq_len: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield inputs and targets, int64 (≤ batch_size, seq_len), and last a shorter window with the remaining tokens."""
    whole = (len(tokens) - 1) // seq_len
    inputs = tokens[: whole * seq_len].view(whole, seq_len).long()
    targets = tokens[1 : whole * seq_len + 1].view(whole, seq_len).long()
    for start in range(0, whole, batch_size):
        yield inputs[start : start + batch_size], targets[start : start + batch_size]
    if whole * seq_len + 1 < len(tokens):
        yield tokens[None, whole * seq_len : -1].long(), tokens[None, whole * seq_len + 1 :].long()
