"""Rows that do not count: padding, by the attention mask that the model was given, or because they are zero."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# Arguments of a model's forward that mark tokens, and whether True marks the padding.
_MASKS = {"attention_mask": False, "src_key_padding_mask": True, "key_padding_mask": True}
_INPUTS = ("input_ids", "inputs_embeds")
MASK, ZERO_ROWS = "attention mask", "zero rows"


class Padding:
    """The padding of the current forward pass. The mask is only kept, and read when a probe needs it.

    Args:
        model: the model, whose forward may take a mask (batch, length).
    """

    def __init__(self, model: nn.Module) -> None:
        try:
            self._names = list(inspect.signature(type(model).forward).parameters)[1:]
        except (TypeError, ValueError):
            self._names = []
        self._given: dict[str, Any] = {}
        self._counts: Tensor | None = None
        self.used = False

    def read(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Keep the tensors among the arguments of a forward pass."""
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        self._given = {name: each for name, each in given.items() if isinstance(each, Tensor)}
        self._counts = None

    def clear(self) -> None:
        """End a forward pass."""
        self._given, self._counts = {}, None

    def _read(self) -> Tensor | None:
        """Return which tokens (batch, length) count; None without a mask that belongs to the other inputs."""
        name = next((name for name in _MASKS if name in self._given), None)
        if name is None:
            return None
        mask = self._given[name]
        if not _is_plain(mask) or mask.ndim != 2 or mask.numel() == 0 or not self._fits(mask):
            return None
        return _without_causal((mask == 0) if _MASKS[name] else _shown(mask))

    def _fits(self, mask: Tensor) -> bool:
        """Return whether the mask has the batch and the length of the model's input, in either order."""
        others = {name: each for name, each in self._given.items() if "mask" not in name and _is_plain(each)}
        named = next((others[name] for name in _INPUTS if name in others), None)
        x = next(iter(others.values()), None) if named is None else named
        return x is None or mask.shape in (x.shape[:2], x.shape[1::-1])

    def rows(self, shape: Sequence[int], batch_dim: int = 0) -> Tensor | None:
        """Return which rows of a tensor (*shape, features) count, flat; None if there is no mask that fits."""
        if self._counts is None and self._given:
            self._counts = self._read()
            self._given = {}
        counts = self._counts
        if counts is None:
            return None
        if batch_dim == 1:
            counts = counts.T
        shape = tuple(shape)
        if shape[:2] == counts.shape:
            fitted = counts.reshape(*counts.shape, *[1] * (len(shape) - 2))
        elif len(shape) == 3 and (shape[0], shape[2]) == counts.shape:  # (batch, heads, length)
            fitted = counts.unsqueeze(1)
        elif shape == (counts.numel(),):
            fitted = counts.reshape(-1)
        else:
            return None
        self.used = True
        return fitted.expand(shape).reshape(-1)


def _is_plain(x: Tensor) -> bool:
    """Return whether a tensor is dense, with two or more dimensions."""
    return not x.is_nested and x.layout == torch.strided and x.ndim >= 2


def _shown(mask: Tensor) -> Tensor:
    """Return which tokens a mask shows. A float mask without positive values is added to the attention logits."""
    if not mask.is_floating_point():
        return mask != 0
    return torch.where((mask <= 0).all(), mask == 0, mask != 0)


def _without_causal(counts: Tensor) -> Tensor:
    """Return the counts; all count if a square mask is causal: it shows the diagonal and nothing above it."""
    if counts.shape[0] != counts.shape[1]:
        return counts
    causal = counts.diagonal().all() & ~counts.triu(1).any()
    return counts | causal


def mean_over(values: Tensor, counts: Tensor) -> Tensor:
    """Return the means of the values (n, rows) of rows that count."""
    return (torch.where(counts, values, 0) * weights_of(counts, values.dtype)).sum(dim=1)


def weights_of(counts: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weights (n, rows) of means over the rows that count, or over all if none does."""
    # The small term is far below rounding, and what is left if no row counts.
    weights = counts.to(dtype).add_(1e-30)
    return weights / weights.sum(dim=1, keepdim=True)
