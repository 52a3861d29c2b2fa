"""NormConfig: which norm, where it stands, and with which constants. Reads and writes μOmni's dictionary."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

from omninorm.errors import ConfigError

NORMALIZATIONS = ("rmsnorm", "layernorm", "crmsnorm", "scalenorm", "dyt", "derf", "none")
PLACEMENTS = (
    "none",
    "post",
    "pre",
    "sandwich",
    "reordered",
    "deepnorm",
    "lns",
    "mix",
    "hybrid",
    "residual",
    "keel",
    "normformer",
)
CASTS = ("fp32", "llama")
# What float32, in which constants are used, can hold.
LARGEST = 3.4e38

_ALWAYS_WRITTEN = ("normalization", "norm_placement", "norm_eps")


@dataclass(frozen=True)
class NormConfig:
    """How a transformer is normalized. The defaults are μOmni's choice: RMSNorm, pre-norm, ε = 1e-6.

    Args:
        normalization: the norm, one of `NORMALIZATIONS`.
        norm_placement: where it stands around a sublayer, one of `PLACEMENTS`.
        norm_eps: ε ≥ 0, added under the root; None means the machine epsilon of the compute dtype.
        gain_offset: the norm multiplies by γ + gain_offset, with γ starting at 1 − gain_offset (1 is Gemma's
            form; rmsnorm only).
        cast: "fp32" multiplies by the gain in float32 and rounds once; "llama" rounds before the gain
            (rmsnorm only).
        qk_norm: a norm per head on queries and keys; None means what the placement prescribes
            (yes for "reordered" and "hybrid").
        residual_scale: α of "deepnorm" and "keel"; None means the paper's formula for the model's depth.
        mix_fraction: share of blocks, counted from the input, that "mix" places post-norm.

    Raises:
        ConfigError: an unknown name, a value out of range, or settings that do not go together.

    Example:
        >>> NormConfig.from_dict({"normalization": "rmsnorm", "norm_placement": "pre", "norm_eps": 1e-6})
        NormConfig(normalization='rmsnorm', norm_placement='pre', norm_eps=1e-06, gain_offset=0.0, cast='fp32', \
qk_norm=None, residual_scale=None, mix_fraction=0.25)
    """

    normalization: str = "rmsnorm"
    norm_placement: str = "pre"
    norm_eps: float | None = 1e-6
    gain_offset: float = 0.0
    cast: str = "fp32"
    qk_norm: bool | None = None
    residual_scale: float | None = None
    mix_fraction: float = 0.25

    def __post_init__(self) -> None:
        check_choice("normalization", self.normalization, NORMALIZATIONS)
        check_choice("norm_placement", self.norm_placement, PLACEMENTS)
        check_choice("cast", self.cast, CASTS)
        if self.norm_eps is not None:
            check_number("norm_eps", self.norm_eps, at_least=0.0, at_most=LARGEST)
        check_number("gain_offset", self.gain_offset, at_least=-LARGEST, at_most=LARGEST)
        check_number("mix_fraction", self.mix_fraction, at_least=0.0, at_most=1.0)
        if self.residual_scale is not None:
            check_number("residual_scale", self.residual_scale, above=0.0)
        if self.qk_norm is not None and not isinstance(self.qk_norm, bool):
            raise ConfigError("qk_norm must be true, false or None", repr(self.qk_norm), "leave it out for the default")
        self._check_combinations()

    def _check_combinations(self) -> None:
        if self.normalization != "rmsnorm" and (self.gain_offset != 0.0 or self.cast != "fp32"):
            received = f"gain_offset={self.gain_offset}, cast={self.cast!r} with {self.normalization!r}"
            raise ConfigError("gain_offset and cast belong to normalization 'rmsnorm'", received, "leave them out")
        if self.qk_norm and self.normalization == "none":
            raise ConfigError("qk_norm needs a norm", "normalization='none'", "choose one or set qk_norm=False")
        if self.qk_norm is False and self.norm_placement == "hybrid":
            remedy = "leave qk_norm out or choose another placement"
            raise ConfigError("placement 'hybrid' normalizes queries, keys and values", "qk_norm=False", remedy)
        if self.residual_scale is not None and self.norm_placement not in ("deepnorm", "keel"):
            received = f"residual_scale={self.residual_scale} with {self.norm_placement!r}"
            raise ConfigError("residual_scale belongs to placements 'deepnorm' and 'keel'", received, "leave it out")
        if self.mix_fraction != _default("mix_fraction") and self.norm_placement != "mix":
            received = f"mix_fraction={self.mix_fraction} with {self.norm_placement!r}"
            raise ConfigError("mix_fraction belongs to placement 'mix'", received, "leave it out")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> NormConfig:
        """Reads a dictionary such as μOmni's; keys that are left out take their defaults.

        Raises:
            ConfigError: not a mapping, an unknown key (the known ones are listed), or a bad value.
        """
        check_keys("a norm config", values, [field.name for field in fields(cls)])
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """μOmni's three keys, then whatever differs from its default. `from_dict` reads it back to an equal config."""
        return {
            name: value for name, value in asdict(self).items() if name in _ALWAYS_WRITTEN or value != _default(name)
        }


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raises ConfigError unless `value` is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}", repr(value), "choose one of these")


def check_number(
    name: str,
    value: object,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
) -> None:
    """Raises ConfigError unless `value` is a finite real number within the bounds."""
    bounds = [(at_least, "≥"), (above, ">"), (at_most, "≤")]
    wanted = " and ".join(f"{sign} {bound:g}" for bound, sign in bounds if bound is not None)
    invariant = f"{name} must be a finite number{' ' + wanted if wanted else ''}"
    if not is_finite(value):
        raise ConfigError(invariant, f"{value!r:.40}", f"pass a number for {name}")
    assert isinstance(value, (int, float))
    too_low = (at_least is not None and value < at_least) or (above is not None and value <= above)
    if too_low or (at_most is not None and value > at_most):
        raise ConfigError(invariant, repr(value), f"choose {name} within these bounds")


def is_finite(value: object) -> bool:
    """Whether `value` is a real number, no bool, that a float can hold."""
    largest = sys.float_info.max
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -largest <= value <= largest


def check_count(name: str, value: object, *, at_least: int = 1) -> None:
    """Raises ConfigError unless `value` is an integer of at least `at_least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ConfigError(f"{name} must be an integer ≥ {at_least}", repr(value), f"choose {name} within this bound")


def check_keys(what: str, values: object, known: list[str]) -> None:
    """Raises ConfigError unless `values` is a mapping whose keys are all known."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{what} must be a dictionary", type(values).__name__, f"use the keys {', '.join(known)}")
    unknown = [key for key in values if key not in known]
    if unknown:
        remedy = f"correct or remove the unknown ones{closest(unknown[0], known)}"
        raise ConfigError(f"{what} has the keys {', '.join(known)}", ", ".join(map(repr, unknown)), remedy)


def closest(key: object, known: Sequence[str]) -> str:
    """A question after the known key that was probably meant, or nothing.

    Example:
        >>> closest("norm_epsilon", ["norm_eps", "cast"])
        "; did you mean 'norm_eps'?"
    """
    near = difflib.get_close_matches(str(key), known, 1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _default(name: str) -> Any:
    value = {field.name: field.default for field in fields(NormConfig)}[name]
    assert value is not MISSING
    return value
