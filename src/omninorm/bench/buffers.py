"""Inputs that are used in turn; there are enough of them that none is still in the cache when it is used again."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}
# The size to assume if the system does not report the last-level cache; it is usual for desktop and server cores.
FALLBACK_CACHE_BYTES = 32 * 2**20
MEMORY_CAP_BYTES = 2 * 2**30
# The memory of a set in multiples of x: x, dy, a residual, and the outputs and graphs that are kept.
_TENSORS_PER_SET = 12
# More sets are not needed: tiny inputs may stay in the cache, as in practice, and their time is that of the call.
_MOST_SETS = 256


def last_level_cache_bytes(caches: Path = _CACHES) -> int:
    """Return the size of the first core's largest cache, or 32 MiB if the system does not report it."""
    sizes = [parse_size(path) for path in caches.glob("index*/size")]
    return max(sizes, default=0) or FALLBACK_CACHE_BYTES


def parse_size(path: Path) -> int:
    """Return the number of bytes in a file with content such as "32768K", or 0 for any other content."""
    try:
        text = path.read_text(encoding="ascii").strip()
        return int(text.rstrip("KMG")) * _UNITS.get(text[-1:], 1)
    except (OSError, ValueError):
        return 0


def sets_needed(bytes_per_set: int, cache_bytes: int, cap_bytes: int = MEMORY_CAP_BYTES) -> int:
    """Return the number of inputs of this size that fill the cache twice, from 2 to 256 and within the memory cap."""
    wanted = -(-2 * cache_bytes // max(1, bytes_per_set))
    allowed = cap_bytes // (_TENSORS_PER_SET * max(1, bytes_per_set))
    return max(2, min(wanted, allowed, _MOST_SETS))


class Buffers:
    """Sets of inputs that are used in turn: x, gradients dy and residuals, all (rows, width).

    x requires a gradient; cases without gradients run under `torch.no_grad`.
    """

    def __init__(self, rows: int, width: int, dtype: torch.dtype, cache_bytes: int) -> None:
        self.rows, self.width, self.dtype = rows, width, dtype
        count = sets_needed(rows * width * dtype.itemsize, cache_bytes)
        first = torch.randn(rows, width).to(dtype)
        gradient, residual = torch.randn(rows, width).to(dtype), torch.randn(rows, width).to(dtype)
        self.x: list[Tensor] = [first.clone().requires_grad_() for _ in range(count)]
        self.dy: list[Tensor] = [gradient.clone() for _ in range(count)]
        self.residual: list[Tensor] = [residual.clone() for _ in range(count)]

    @property
    def count(self) -> int:
        return len(self.x)

    @property
    def bytes(self) -> int:
        """Size of one tensor."""
        return self.rows * self.width * self.dtype.itemsize
