"""ThinkerConfig: the shape of the decoder, its norms and its initialization."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from omninorm.config import NormConfig, check_choice, check_count, check_keys, check_number, store_python_numbers
from omninorm.errors import ConfigError

FEED_FORWARDS = ("swiglu", "gelu", "relu2")
INITS = ("xavier", "normal")

_HIDDEN_MULTIPLE = 16


@dataclass(frozen=True)
class ThinkerConfig:
    """The configuration of a decoder-only transformer. The defaults are a small byte-level model with μOmni's norms.

    Args:
        vocab_size: number of tokens in the vocabulary; 256 is one per byte.
        d_model: width of the residual stream.
        n_layers: number of blocks, each with attention and a feed-forward layer.
        n_heads: query heads.
        n_kv_heads: key and value heads, each shared by n_heads / n_kv_heads query heads; None means n_heads.
        max_seq_len: the longest context, in tokens.
        norm: the norm and its placement.
        d_ff: hidden width of the feed-forward layer; None means 8/3 · d_model rounded up to a multiple of 16 for
            "swiglu" and 4 · d_model for "gelu" and "relu2", so that all have about the same number of weights.
        feed_forward: "swiglu", down(silu(gate(x)) · up(x)); "gelu", down(gelu(up(x))); or "relu2", down(relu(up(x))²).
        head_dim: width of a head, even because RoPE rotates pairs; None means d_model / n_heads.
        rope_theta: base of RoPE's frequencies.
        tied_head: whether the output head uses the embedding matrix; otherwise it has a separate matrix.
        init: "xavier": normal with variance 2/(fan_in + fan_out), and standard deviation d_model^−½ for the embedding;
            "normal": standard deviation `init_std` for all matrices.
        init_std: standard deviation of init "normal".
        scaled_init: whether the initial weights that write to the residual stream are divided by √(2 · n_layers), as in
            GPT-2.

    Raises:
        ConfigError: a value of the wrong type or out of range, or settings that contradict each other.

    Example:
        >>> ThinkerConfig.from_dict({"n_layers": 2, "norm": {"norm_placement": "post"}}).norm.norm_placement
        'post'
    """

    vocab_size: int = 256
    d_model: int = 256
    n_layers: int = 8
    n_heads: int = 4
    n_kv_heads: int | None = None
    max_seq_len: int = 512
    norm: NormConfig = field(default_factory=NormConfig)
    d_ff: int | None = None
    feed_forward: str = "swiglu"
    head_dim: int | None = None
    rope_theta: float = 10000.0
    tied_head: bool = True
    init: str = "xavier"
    init_std: float = 0.02
    scaled_init: bool = False

    def __post_init__(self) -> None:
        store_python_numbers(self)
        for name in ("vocab_size", "d_model", "n_layers", "n_heads", "max_seq_len"):
            check_count(name, getattr(self, name))
        for name in ("n_kv_heads", "d_ff", "head_dim"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        check_choice("feed_forward", self.feed_forward, FEED_FORWARDS)
        check_choice("init", self.init, INITS)
        check_number("rope_theta", self.rope_theta, above=0.0)
        check_number("init_std", self.init_std, above=0.0)
        for name in ("tied_head", "scaled_init"):
            if not isinstance(getattr(self, name), bool):
                received = f"{getattr(self, name)!r:.80}"
                raise ConfigError(f"{name} must be true or false", received, f"set {name} to True or False")
        if not isinstance(self.norm, NormConfig):
            remedy = "pass NormConfig(...), or a dictionary through ThinkerConfig.from_dict"
            raise ConfigError("norm must be a NormConfig", type(self.norm).__name__, remedy)
        self._check_heads()
        self._check_combinations()

    def _check_heads(self) -> None:
        if self.head_dim is None and self.d_model % self.n_heads:
            received = f"d_model={self.d_model} with n_heads={self.n_heads}"
            remedy = "choose n_heads so that it divides d_model, or set head_dim"
            raise ConfigError("d_model must be a multiple of n_heads", received, remedy)
        if self.n_heads % self.kv_heads:
            received = f"n_heads={self.n_heads} with n_kv_heads={self.n_kv_heads}"
            raise ConfigError("n_heads must be a multiple of n_kv_heads", received, "choose another n_kv_heads")
        if self.head_width % 2:
            given = f", head_dim={self.head_dim}" if self.head_dim is not None else ""
            received = f"{self.head_width} (d_model={self.d_model}, n_heads={self.n_heads}{given})"
            remedy = "choose another n_heads, or set head_dim to an even number"
            raise ConfigError("The width of a head must be even, because RoPE rotates pairs", received, remedy)

    def _check_combinations(self) -> None:
        reasons = {"lns": "already scales the norms by depth", "ngpt": "gives every matrix unit length"}
        reason = reasons.get(self.norm.norm_placement)
        if self.scaled_init and reason:
            remedy = "set scaled_init=False or choose another placement"
            invariant = f"Placement {self.norm.norm_placement!r} {reason} and excludes scaled_init"
            raise ConfigError(invariant, "scaled_init=True", remedy)

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads, with the default filled in."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def head_width(self) -> int:
        """Width of a head, with the default filled in."""
        return self.d_model // self.n_heads if self.head_dim is None else self.head_dim

    @property
    def hidden_width(self) -> int:
        """Hidden width of the feed-forward layer, with the default filled in."""
        if self.d_ff is not None:
            return self.d_ff
        if self.feed_forward != "swiglu":
            return 4 * self.d_model
        return -(-8 * self.d_model // (3 * _HIDDEN_MULTIPLE)) * _HIDDEN_MULTIPLE

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ThinkerConfig:
        """Return the config that a dictionary such as `to_dict`'s describes; missing keys get their defaults.

        `norm` may be a NormConfig or a dictionary.

        Raises:
            ConfigError: `values` is not a mapping, or has an unknown key (the message lists the known ones) or an
                invalid value.
        """
        check_keys("a Thinker config", values, [field.name for field in fields(cls)])
        given = dict(values)
        if "norm" in given and not isinstance(given["norm"], NormConfig):
            given["norm"] = NormConfig.from_dict(given["norm"])
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """Return all settings as a JSON-serializable dictionary, with `NormConfig.to_dict()` for `norm`."""
        return {**asdict(self), "norm": self.norm.to_dict()}
