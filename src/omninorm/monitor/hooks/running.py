"""Running: a block whose forward has begun and not ended."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class Running(NamedTuple):
    """A running block: its index, its input with the version that it had, and the input's autograd node."""

    block: int
    x: Tensor | None
    version: int
    node: Any
