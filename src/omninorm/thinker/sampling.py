"""Choosing the next token from logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from omninorm.config import store_python_numbers
from omninorm.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """The settings of sampling: the temperature is applied first, then top-k, then top-p to the remaining tokens.

    Args:
        temperature: divides the logits; 0 means greedy decoding, the most probable token (the first of equals).
        top_k: keep the k most probable tokens and ties of the k-th; None or k ≥ the vocabulary keeps all.
        top_p: keep the fewest most probable tokens whose probabilities sum to at least top_p; None keeps all.

    Raises:
        InputError: a temperature that is negative or not finite, top_k below 1, or top_p outside (0, 1].
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        store_python_numbers(self)
        if not _is_number(self.temperature) or not 0 <= self.temperature < math.inf:
            remedy = "use 0 for the most probable token, 1 for the model's own distribution"
            raise InputError("temperature must be a finite number ≥ 0", repr(self.temperature), remedy)
        if self.top_k is not None and not (is_integer(self.top_k) and self.top_k >= 1):
            raise InputError("top_k must be an integer ≥ 1", repr(self.top_k), "leave it out to keep all tokens")
        if self.top_p is not None and not (_is_number(self.top_p) and 0 < self.top_p <= 1):
            raise InputError("top_p must be a number in (0, 1]", repr(self.top_p), "leave it out to keep all tokens")


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> Tensor:
    """Sample one token per row: logits (batch, vocab_size) → int64 (batch,).

    Raises:
        InputError: a row of logits contains NaN or +∞, or only −∞.

    Example:
        >>> sample(torch.tensor([[0.0, 2.0, 1.0]]), Sampling(temperature=0.0))
        tensor([1])
    """
    if not bool(logits.amax(dim=-1).isfinite().all()):
        remedy = "the model has probably diverged: use an earlier checkpoint"
        raise InputError("The largest logit of every row must be finite", "NaN or infinity", remedy)
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float()
    # The largest logit is subtracted first and the divisor is a normal float32, so that no temperature gives ∞ − ∞.
    temperature = max(sampling.temperature, torch.finfo(torch.float32).tiny)
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    probabilities = keep_probable(scaled, sampling.top_k, sampling.top_p).softmax(dim=-1)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)


def keep_probable(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Return the logits (batch, vocab_size) with −∞ for every token that top-k or top-p excludes."""
    if top_k is not None and top_k < logits.shape[-1]:
        smallest_kept = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest_kept, -math.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        probabilities = ordered.softmax(dim=-1)
        # A token is kept if the more probable ones do not reach top_p together; the first is always kept.
        surplus = probabilities.cumsum(dim=-1) - probabilities >= top_p
        surplus[..., 0] = False  # even if top_p underflows to 0 in float32
        logits = logits.masked_fill(torch.zeros_like(surplus).scatter(-1, order, surplus), -math.inf)
    return logits


def is_integer(value: object) -> bool:
    """Return whether `value` is an int and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
