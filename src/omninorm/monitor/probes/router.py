"""Probe of a mixture of experts: how many tokens choose each expert, from what the router returns or chooses.

A router returns the chosen experts: as indices (tokens, choices), as a mask, or as scores that are 0 for the others. If
it only returns logits, the block chooses with topk or argmax, which is intercepted.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from omninorm.monitor.probes.block import some_of, stride
from omninorm.monitor.probes.padding import Padding
from omninorm.monitor.stats_buffer import StatsBuffer
from omninorm.monitor.tensors import constant, holds_numbers

MOST_TOKENS = 1024


class RouterProbe:
    """The router of one block: `see` takes the experts that the tokens choose.

    Args:
        experts: the number of experts.
    """

    def __init__(self, buffer: StatsBuffer, experts: int, padding: Padding) -> None:
        self.buffer, self.experts, self.padding = buffer, experts, padding
        self.choices = 0  # experts for each token; 0 if unknown
        # Those of indices or masks, and those of scores, which may be dense: then the block chooses from them.
        self._counts: dict[bool, Tensor] = {}

    def see(self, chosen: Tensor) -> None:
        """Count the tokens of each expert.

        Args:
            chosen: indices (…, choices), or a value for each expert (…, experts) that is 0 unless it is chosen.
        """
        if not self.buffer.sampling or chosen.numel() == 0 or not holds_numbers(chosen):
            return
        rows = chosen.detach().reshape(-1, chosen.shape[-1])
        rows = rows[:: stride(rows.shape[0], MOST_TOKENS)]
        if rows.shape[-1] == self.experts:
            mask = rows != 0
        else:
            self.choices = rows.shape[-1]
            mask = (rows.unsqueeze(-1) == constant(tuple(range(self.experts)), rows.device)).any(1)
        counts = some_of(self.padding.rows(chosen.shape[:-1]), MOST_TOKENS)
        tokens = torch.ones_like(mask[:, :1])
        found = torch.cat([mask, tokens], dim=1)
        if counts is not None:
            found = found & counts.unsqueeze(-1)
        total, exact = found.sum(0, dtype=torch.float32), not chosen.is_floating_point()
        self._counts[exact] = self._counts[exact] + total if exact in self._counts else total

    def take(self) -> Tensor | None:
        """Return the tokens of each expert and the number of all tokens since the last call: (experts + 1,)."""
        found, self._counts = self._counts, {}
        return found.get(True, found.get(False))


def choices_in(output: Any, experts: int) -> Tensor | None:
    """Return the tensor in a router's output that holds its choices; None if there are only logits."""
    tensors = [tensor for tensor in _tensors(output) if type(tensor) is Tensor and tensor.ndim >= 2]
    whole = [tensor for tensor in tensors if not tensor.is_floating_point() and tensor.shape[-1] <= experts]
    if whole:
        return whole[0]
    # The scores come first. If they are logits, every expert seems to get every token, which `load_of` drops.
    scores = [tensor for tensor in tensors if tensor.shape[-1] == experts]
    return scores[0] if len(scores) > 1 else None


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (tuple, list)):
        for item in output:
            yield from _tensors(item)
