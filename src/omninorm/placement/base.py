"""The base class of placements: a rule that connects one sublayer to the residual stream."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from omninorm.config import NormConfig, check_choice, check_count, store_python_numbers
from omninorm.errors import ConfigError, InputError
from omninorm.layers.tracing import Proxy

Sublayer = Callable[[Tensor], Tensor]

# A tensor (..., width) for most placements; others use a tuple of tensors, or a tensor (..., n, width).
Stream = Any

ROLES = ("attention", "feed_forward")


@dataclass(frozen=True)
class Position:
    """A sublayer's position in the model.

    Args:
        block: the number of its block, from 1 to `blocks`.
        blocks: the number of blocks.
        role: "attention" or "feed_forward".

    Raises:
        ConfigError: a block outside 1 … blocks, or an unknown role.
    """

    block: int
    blocks: int
    role: str

    def __post_init__(self) -> None:
        store_python_numbers(self)
        check_count("blocks", self.blocks)
        check_count("block", self.block)
        check_choice("role", self.role, ROLES)
        if self.block > self.blocks:
            invariant = f"block must be between 1 and the number of blocks, {self.blocks}"
            raise ConfigError(invariant, f"block {self.block}", "blocks are counted from 1; correct the block's number")


class Placement(nn.Module, ABC):
    """Connects a sublayer F to the residual stream: called with (x, F), it returns the stream after the sublayer.

    Args:
        config: the norm's kind and constants.
        width: number of features of the stream.
        position: the sublayer's position in the model.

    Class attributes:
        final_norm: whether a model with this placement has one more norm after its last block.
        inner: norms that the placement requires inside the sublayers: "q", "k", "v" (per head, after the projection),
            "heads" (a gain per head on the attention's output), "hidden" (on the feed-forward's hidden features),
            "unit" (matrices of unit length with nGPT's scales).
        exit_type: class of the module that turns the last block's stream into one tensor (..., width) before the final
            norm; it is built from the config and the width.
    """

    final_norm: ClassVar[bool] = True
    inner: ClassVar[frozenset[str]] = frozenset()
    exit_type: ClassVar[type[nn.Module] | None] = None

    def __init__(self, config: NormConfig, width: int, position: Position) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, x: Stream, F: Sublayer) -> Stream:
        """Return the stream after sublayer F."""

    def check_stream(self, stream: Stream) -> None:
        """Raise InputError unless `stream` has the form that `enter` returns."""
        if not isinstance(stream, (Tensor, Proxy)):
            remedy = "pass a tensor of shape (..., width)"
            raise InputError("The residual stream must be a tensor", f"a {type(stream).__name__}", remedy)

    @staticmethod
    def enter(x: Tensor, config: NormConfig) -> Stream:
        """Return the stream for the first block, from the embeddings x (..., width)."""
        return x

    @staticmethod
    def leave(stream: Stream, norm: nn.Module) -> Tensor:
        """Return the input of the model's head, (..., width), from the last block's stream and the final norm."""
        y: Tensor = norm(stream)
        return y

    @staticmethod
    def init_gain(blocks: int, role: str) -> float:
        """Return the factor on a projection's initial weights; role is "q", "k", "v", "out" or "feed_forward"."""
        return 1.0


def refuse_stream(placement: str, form: str, stream: object) -> InputError:
    """Return the error for a stream that does not have the placement's `form`."""
    remedy = "call omninorm.placement.enter(config, x) before the first block, and FinalNorm after the last"
    invariant = f"The stream of placement {placement!r} must be {form}"
    if isinstance(stream, Tensor) and "shape" in form:
        received = f"shape {tuple(stream.shape)}"
    else:
        received = f"{len(stream)} tensors" if isinstance(stream, tuple) else f"a {type(stream).__name__}"
    return InputError(invariant, received, remedy)
