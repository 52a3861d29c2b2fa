"""The parts of a model that a placement determines, built from a config: block, final norm, and initial gains."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from omninorm.config import NormConfig, check_choice, read_count
from omninorm.errors import ConfigError, InputError
from omninorm.layers import build_norm
from omninorm.layers.tracing import Proxy
from omninorm.placement.base import Placement, Position, Stream
from omninorm.placement.hyper import MHC, Hyper
from omninorm.placement.ngpt import NGPT
from omninorm.placement.normed import DeepNorm, HybridNorm, Keel, MixNorm, PostNorm, ResiDual
from omninorm.placement.plain import LayerNormScaling, NoNorm, NormFormer, PreNorm, Reordered, Sandwich
from omninorm.placement.recall import X0, AttentionResidual

PLACEMENT_TYPES: dict[str, type[Placement]] = {
    "none": NoNorm,
    "post": PostNorm,
    "pre": PreNorm,
    "sandwich": Sandwich,
    "reordered": Reordered,
    "deepnorm": DeepNorm,
    "lns": LayerNormScaling,
    "mix": MixNorm,
    "hybrid": HybridNorm,
    "residual": ResiDual,
    "keel": Keel,
    "normformer": NormFormer,
    "x0": X0,
    "ngpt": NGPT,
    "mhc": MHC,
    "hyper": Hyper,
    "attention_residual": AttentionResidual,
}

# The inner norms that each sublayer has to implement.
ATTENTION_NORMS = frozenset({"q", "k", "v", "heads", "unit"})
FEED_FORWARD_NORMS = frozenset({"hidden", "unit"})
PROJECTIONS = ("q", "k", "v", "out", "feed_forward")


class Block(nn.Module):
    """One transformer block: attention and a feed-forward, each connected to the stream by the configured placement.

    The sublayers can be any two modules that map (..., width) to (..., width): causal or bidirectional attention, a
    convolution, a mixture of experts. Extra arguments of a call are passed to `attention`.

    If the placement requires norms inside the sublayers (`inner_norms(config)`), a sublayer must name those that it
    implements in an attribute `inner_norms`, a set of names; otherwise the constructor raises ConfigError.

    Args:
        config: kind and placement of the norms.
        width: number of features of the residual stream, ≥ 1.
        attention, feed_forward: the sublayers.
        block, blocks: the block's number, counted from 1, and the number of blocks; some placements depend on them.

    Shape: stream → stream. `enter` returns the first stream; most placements use a tensor (..., width), some a tuple
        of tensors or several streams in one tensor. `FinalNorm` returns one tensor from the last stream.

    Raises:
        ConfigError: on construction, if the block's number is out of range, or a sublayer is not a module or lacks an
            inner norm.
        InputError: on a call, if the stream does not come from `enter`, or a sublayer changes the shape.

    Example:
        >>> import torch
        >>> from omninorm.placement import Block, FinalNorm, enter
        >>> width, depth = 16, 2
        >>> config = NormConfig.from_dict({"normalization": "rmsnorm", "norm_placement": "pre", "norm_eps": 1e-6})
        >>> blocks = [Block(config, width, nn.Linear(width, width), nn.Linear(width, width), block=l, blocks=depth)
        ...           for l in (1, 2)]
        >>> stream = enter(config, torch.ones(3, width))
        >>> for block in blocks:
        ...     stream = block(stream)
        >>> FinalNorm(config, width)(stream).shape
        torch.Size([3, 16])
    """

    def __init__(
        self,
        config: NormConfig,
        width: int,
        attention: nn.Module,
        feed_forward: nn.Module,
        *,
        block: int,
        blocks: int,
    ) -> None:
        super().__init__()
        check_config(config)
        width = read_count("width", width)
        check_sublayer(config, "attention", attention, ATTENTION_NORMS)
        check_sublayer(config, "feed_forward", feed_forward, FEED_FORWARD_NORMS)
        place = PLACEMENT_TYPES[config.norm_placement]
        self.attention = attention
        self.feed_forward = feed_forward
        self.around_attention = place(config, width, Position(block, blocks, "attention"))
        self.around_feed_forward = place(config, width, Position(block, blocks, "feed_forward"))

    def forward(self, stream: Stream, *args: Any, **kwargs: Any) -> Stream:
        self.around_attention.check_stream(stream)
        stream = self.around_attention(stream, lambda x: same_shape("attention", x, self.attention(x, *args, **kwargs)))
        return self.around_feed_forward(stream, lambda x: same_shape("feed_forward", x, self.feed_forward(x)))


class FinalNorm(nn.Module):
    """The part between the last block and the head: it returns one tensor from the stream, normalized.

    The norm is left out for placements without a final norm, such as "post".

    Shape: last stream → (..., width), the input of the head.
    """

    def __init__(self, config: NormConfig, width: int) -> None:
        super().__init__()
        self.placement = PLACEMENT_TYPES[config.norm_placement]
        self.norm = build_norm(config, width) if self.placement.final_norm else nn.Identity()
        self.exit = None if self.placement.exit_type is None else self.placement.exit_type(config, width)

    def forward(self, stream: Stream) -> Tensor:
        return self.placement.leave(stream if self.exit is None else self.exit(stream), self.norm)


def enter(config: NormConfig, x: Tensor) -> Stream:
    """Return the stream for the first block, from the embeddings x (..., width).

    Example:
        >>> import torch
        >>> enter(NormConfig(), torch.ones(3, 16)).shape
        torch.Size([3, 16])
        >>> enter(NormConfig(norm_placement="mhc"), torch.ones(3, 16)).shape  # four streams
        torch.Size([3, 4, 16])
    """
    return PLACEMENT_TYPES[config.norm_placement].enter(x, config)


def inner_norms(config: NormConfig) -> frozenset[str]:
    """Return the names of the norms that the sublayers must contain: the placement's, adjusted by qk_norm and v_norm.

    Names: "q", "k", "v" (per head, on the projection), "heads" (a gain per head on the attention's output),
    "hidden" (on the feed-forward's hidden features), "unit" (matrices of unit length with nGPT's scales).

    Example:
        >>> sorted(inner_norms(NormConfig(qk_norm=True)))
        ['k', 'q']
    """
    inner = PLACEMENT_TYPES[config.norm_placement].inner
    if config.normalization == "none":
        return inner & {"heads"}  # gains, not norms
    for switch, names in ((config.qk_norm, {"q", "k"}), (config.v_norm, {"v"})):
        if switch is not None:
            inner = inner | names if switch else inner - names
    return inner


def init_gain(config: NormConfig, blocks: int, role: str) -> float:
    """Return the factor by which the placement scales a projection's initial weights in a model of `blocks` blocks.

    Args:
        role: "q", "k", "v" or "out" for attention's projections, "feed_forward" for each of the feed-forward's.

    Raises:
        ConfigError: an unknown role, or blocks below 1.

    Example:
        >>> init_gain(NormConfig(norm_placement="deepnorm"), blocks=32, role="out")  # (8 · 32)^−¼
        0.25
    """
    check_choice("role", role, PROJECTIONS)
    blocks = read_count("blocks", blocks)
    return PLACEMENT_TYPES[config.norm_placement].init_gain(blocks, role)


def check_config(config: object) -> None:
    """Raise ConfigError unless `config` is a NormConfig."""
    if not isinstance(config, NormConfig):
        remedy = 'pass e.g. NormConfig(norm_placement="pre") or NormConfig.from_dict({…})'
        raise ConfigError("A block's config must be a NormConfig", f"{config!r:.60}", remedy)


def check_sublayer(config: NormConfig, name: str, sublayer: nn.Module, realizable: frozenset[str]) -> None:
    """Raise ConfigError unless `sublayer` is a module with the inner norms that the config requires of its kind.

    `realizable` are the names of the inner norms that this kind of sublayer can have.
    """
    if not isinstance(sublayer, nn.Module):
        received = f"a {type(sublayer).__name__}"
        remedy = "wrap it in a module, so that its parameters are registered"
        raise ConfigError(f"{name} must be a torch.nn.Module", received, remedy)
    wanted = inner_norms(config) & realizable
    missing = wanted - frozenset(getattr(sublayer, "inner_norms", frozenset()))
    if missing:
        values = "" if config.v_norm is None else f" and v_norm={config.v_norm}"
        what = f"Placement {config.norm_placement!r} with qk_norm={config.qk_norm}{values}"
        invariant = f"{what} needs the norms {', '.join(sorted(wanted))} inside {name}"
        received = f"a {type(sublayer).__name__} without {', '.join(sorted(missing))}"
        remedy = f"add them to {name} and list their names in its attribute inner_norms"
        raise ConfigError(invariant, received, remedy)


def same_shape(name: str, x: Tensor, branch: Tensor) -> Tensor:
    """Return the sublayer's output `branch`; raise InputError if its shape differs from that of the input x."""
    if isinstance(branch, Proxy):
        return branch
    if not isinstance(branch, Tensor) or branch.shape != x.shape:
        received = f"shape {tuple(branch.shape)}" if isinstance(branch, Tensor) else f"a {type(branch).__name__}"
        remedy = "wrap the sublayer so that it returns just that tensor"
        raise InputError(f"{name} must return a tensor of its input's shape {tuple(x.shape)}", received, remedy)
    return branch
