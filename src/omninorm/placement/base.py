"""What every placement is: a rule that connects one sublayer to the residual stream."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from omninorm.config import NormConfig, check_choice, check_count
from omninorm.errors import ConfigError, InputError
from omninorm.layers.tracing import Proxy

Sublayer = Callable[[Tensor], Tensor]

# One tensor (..., width); placement "residual" carries two.
Stream = Any

ROLES = ("attention", "feed_forward")


@dataclass(frozen=True)
class Position:
    """Which sublayer of the model this is: block 1 … blocks, and its role in the block.

    Raises:
        ConfigError: a block outside 1 … blocks, or an unknown role.
    """

    block: int
    blocks: int
    role: str

    def __post_init__(self) -> None:
        check_count("blocks", self.blocks)
        check_count("block", self.block)
        check_choice("role", self.role, ROLES)
        if self.block > self.blocks:
            received = f"block {self.block} of {self.blocks}"
            raise ConfigError("blocks are counted from 1 to their number", received, "correct the block's number")


class Placement(nn.Module, ABC):
    """Connects a sublayer F to the stream; calling it with (x, F) gives the stream after the sublayer.

    Args:
        config: the norm's kind and constants.
        width: features of the stream.
        position: where in the model the sublayer stands.

    Class attributes:
        final_norm: whether a model of this placement ends with one more norm.
        inner: norms that the placement wants inside the sublayers: "q", "k", "v" (per head, after the projection),
            "heads" (a gain per head on the attention's output), "hidden" (on the feed-forward's hidden features).
    """

    final_norm: ClassVar[bool] = True
    inner: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, config: NormConfig, width: int, position: Position) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, x: Stream, F: Sublayer) -> Stream:
        """The stream (..., width) after sublayer F."""

    def check_stream(self, stream: Stream) -> None:
        """Raises InputError unless `stream` is what `enter` makes."""
        if not isinstance(stream, (Tensor, Proxy)):
            raise InputError("the stream must be a tensor", f"a {type(stream).__name__}", "pass (..., width) features")

    @staticmethod
    def enter(x: Tensor) -> Stream:
        """The stream that the first block receives, from the embeddings x (..., width)."""
        return x

    @staticmethod
    def leave(stream: Stream, norm: nn.Module) -> Tensor:
        """What the model's head receives, (..., width), from the last block's stream and the final norm."""
        y: Tensor = norm(stream)
        return y

    @staticmethod
    def init_gain(blocks: int, role: str) -> float:
        """Factor on a projection's initial weights; role is "q", "k", "v", "out" or "feed_forward"."""
        return 1.0
