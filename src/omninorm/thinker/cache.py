"""KVCache: keys and values of earlier tokens, so that only the new tokens are processed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from omninorm.errors import InputError
from omninorm.thinker.config import ThinkerConfig


@dataclass(frozen=True)
class LayerCache:
    """The cache of one block: keys and values (batch, kv_heads, capacity, head_dim), with `used` slots filled."""

    keys: Tensor
    values: Tensor
    used: int

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write (batch, kv_heads, sequence, head_dim) after the filled slots; return all slots up to there."""
        stop = self.used + keys.shape[2]
        self.keys[:, :, self.used : stop] = keys
        self.values[:, :, self.used : stop] = values
        return self.keys[:, :, :stop], self.values[:, :, :stop]


class KVCache:
    """Preallocated keys and values of every block; calling a Thinker with `cache=` appends to them.

    Args:
        config: the Thinker's config.
        batch: number of rows.
        capacity: number of tokens per row, including padding; None means config.max_seq_len.
        padding: number of padding tokens on the left of each row, for prompts of different lengths in one batch.
            Padding is not attended to and does not count as positions.
        device, dtype: of the keys and values; use those of the Thinker's weights.

    Attributes:
        used: number of slots filled in every row.

    Raises:
        InputError: a capacity below 1 or above max_seq_len, or padding that is not one count per row.

    Example:
        >>> from omninorm import Thinker
        >>> model = Thinker(ThinkerConfig(d_model=32, n_layers=2))
        >>> cache = model.new_cache(batch=1, capacity=8)
        >>> with torch.no_grad():
        ...     _ = model(torch.tensor([[72, 101]]), cache=cache)
        ...     logits = model(torch.tensor([[108]]), cache=cache)  # of the third token only
        >>> logits.shape, cache.used
        (torch.Size([1, 1, 256]), 3)
    """

    def __init__(
        self,
        config: ThinkerConfig,
        batch: int,
        capacity: int | None = None,
        *,
        padding: Sequence[int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.capacity = config.max_seq_len if capacity is None else capacity
        if not 1 <= self.capacity <= config.max_seq_len:
            invariant = f"The capacity of a cache must be between 1 and max_seq_len={config.max_seq_len}"
            raise InputError(invariant, self.capacity, "choose a capacity in this range")
        shape = (config.n_layers, batch, config.kv_heads, self.capacity, config.head_width)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros_like(self.keys)
        self.used = 0
        self.padding = self._check_padding(padding, batch)

    def _check_padding(self, padding: Sequence[int] | None, batch: int) -> Tensor | None:
        if padding is None or (len(padding) == batch and not any(padding)):
            return None
        if len(padding) != batch or not all(0 <= count < self.capacity for count in padding):
            invariant = f"padding must be {batch} counts, one per row, from 0 to {self.capacity - 1}"
            raise InputError(
                invariant, f"{list(padding)!s:.80}", "pass the number of padding tokens on the left of each row"
            )
        return torch.tensor(padding, device=self.keys.device)

    @property
    def batch(self) -> int:
        """Number of rows."""
        return self.keys.shape[1]

    def layer(self, index: int) -> LayerCache:
        """Return the cache of block `index`, counted from 0."""
        return LayerCache(self.keys[index], self.values[index], self.used)

    def check_room(self, batch: int, count: int) -> None:
        """Raise InputError unless `count` more tokens for each of `batch` rows fit."""
        if batch != self.batch:
            received = f"tokens for {batch} rows"
            raise InputError(f"This cache is for {self.batch} rows", received, "create a new cache for each batch")
        if self.used + count > self.capacity:
            received = f"{count} more after {self.used}"
            remedy = "create a larger cache, or start a new one with the last tokens"
            raise InputError(f"This cache has room for {self.capacity} tokens", received, remedy)

    def advance(self, count: int) -> None:
        """Mark the `count` slots that every block has just written as filled."""
        self.used += count

    def mask(self, count: int) -> Tensor | None:
        """Return which slots the next `count` tokens may attend to, boolean (batch or 1, 1, count, used + count).

        None means that no mask is needed: the cache is empty, so attention is causal, or the single new token attends
        to every slot.
        """
        if self.padding is None and (self.used == 0 or count == 1):
            return None
        slots = torch.arange(self.used + count, device=self.keys.device)
        queries = slots[self.used :].unsqueeze(1)
        if self.padding is None:
            return (slots <= queries)[None, None]
        real = slots >= self.padding[:, None, None]
        # Padding attends to itself, because a softmax over no slots would be NaN; the result is never used.
        return (((slots <= queries) & real) | (slots == queries)).unsqueeze(1)

    def select(self, rows: Sequence[int]) -> None:
        """Keep only these rows, and drop the slots that are padding in all of them."""
        index = torch.tensor(rows, device=self.keys.device)
        self.keys, self.values = self.keys[:, index], self.values[:, index]
        if self.padding is None:
            return
        padding = self.padding[index]
        common = int(padding.min())
        self.keys, self.values = self.keys.roll(-common, dims=3), self.values.roll(-common, dims=3)
        self.used -= common
        self.padding = padding - common if bool((padding > common).any()) else None
