"""Whether the labels are the next tokens of the input, and whether attention can see them there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from omninorm.monitor.stats_buffer import StatsBuffer


class Causality:
    """The tokens of the current forward pass (batch, length): the first such tensor of integers that the model reads.

    Attributes:
        length: the number of tokens of each example; None if the model reads none.
    """

    def __init__(self, buffer: StatsBuffer) -> None:
        self._buffer = buffer
        self.clear()

    def clear(self) -> None:
        self._tokens: Tensor | None = None
        self.length: int | None = None

    def read(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Keep the tokens until the loss has been computed."""
        self.clear()
        inputs = (each for name, each in kwargs.items() if name not in ("labels", "targets"))
        self._tokens = next((each for each in (*args, *inputs) if _are_tokens(each)), None)
        self.length = None if self._tokens is None else self._tokens.shape[1]

    def see_labels(self, labels: Any) -> None:
        """Measure the share of labels that are the next token, of those that are not ignored (negative)."""
        tokens, self._tokens = self._tokens, None
        if tokens is None or not isinstance(labels, Tensor) or labels.dtype != torch.long:
            return
        batch, length = tokens.shape
        if labels.numel() == batch * length:
            labels = labels.reshape(batch, length)[:, :-1]
        elif labels.numel() == batch * (length - 1):
            labels = labels.reshape(batch, length - 1)
        else:
            return
        counts = labels >= 0
        share = ((labels == tokens[:, 1:]) & counts).sum() / counts.sum().clamp_min(1)
        self._buffer.peak("next_tokens", 0, share)


def visible_future(hidden: Tensor, queries: slice) -> Tensor:
    """Return the share of pairs of a token and a later one that attention does not hide, for each block.

    Args:
        hidden: which keys are hidden (n, heads, queries, keys), of the chosen queries and all keys.
        queries: which of the keys' tokens the queries are.
    """
    positions = torch.arange(hidden.shape[-1], device=hidden.device)
    later = positions[queries].unsqueeze(-1) < positions
    seen = (~hidden & later).flatten(1).sum(dim=1)
    return seen / (hidden.shape[1] * later.sum()).clamp_min(1)


def _are_tokens(x: Any) -> bool:
    return type(x) is Tensor and x.dtype == torch.long and x.ndim == 2 and x.shape[0] > 0 and x.shape[1] > 1
