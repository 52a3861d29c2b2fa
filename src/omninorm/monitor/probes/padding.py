"""Rows that do not count: padding, by the attention mask that the model was given, or because they are zero."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# Arguments of a model's forward that mark tokens, and whether True marks the padding.
_MASKS = {"attention_mask": False, "src_key_padding_mask": True, "key_padding_mask": True}
MASK, ZERO_ROWS = "attention mask", "zero rows"


class Padding:
    """The padding of the current forward pass.

    Args:
        model: the model, whose forward may take a mask (batch, length).
    """

    def __init__(self, model: nn.Module) -> None:
        try:
            self._names = list(inspect.signature(type(model).forward).parameters)[1:]
        except (TypeError, ValueError):
            self._names = []
        self._counts: Tensor | None = None
        self.used = False

    def read(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Take the mask from the arguments of a forward pass."""
        self._counts = None
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        for name, hides in _MASKS.items():
            mask = given.get(name)
            if isinstance(mask, Tensor) and mask.ndim == 2 and mask.numel() > 0:
                self._counts = (mask == 0) if hides else (mask != 0)
                return

    def clear(self) -> None:
        """End a forward pass."""
        self._counts = None

    def rows(self, shape: Sequence[int], batch_dim: int = 0) -> Tensor | None:
        """Return which rows of a tensor (*shape, features) count, flat; None if there is no mask that fits."""
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


def mean_over(values: Tensor, counts: Tensor) -> Tensor:
    """Return the mean of the values (rows,) of rows that count."""
    return torch.dot(torch.where(counts, values, 0), weights_of(counts, values.dtype))


def weights_of(counts: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weights (rows,) of a mean over the rows that count, or over all if none does."""
    # The small term is far below rounding, and what is left if no row counts.
    weights = counts.to(dtype).add_(1e-30)
    return weights / weights.sum()
