"""NormConfig (which norm, its placement and constants), and the checks that all settings share."""

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
    "x0",
    "ngpt",
    "mhc",
    "hyper",
    "attention_residual",
)
CASTS = ("fp32", "llama")
# Settings that only these placements use.
_OF_PLACEMENTS = {
    "residual_scale": ("deepnorm", "keel"),
    "mix_fraction": ("mix",),
    "streams": ("mhc", "hyper"),
    "gate_rank": ("hyper",),
    "residual_groups": ("attention_residual",),
}
# The largest constant: constants are converted to float32, whose range ends at about 3.403e38.
LARGEST = 3.4e38

# NumPy's codes for booleans, signed and unsigned integers, floats, and strings.
_NUMPY_KINDS = "biufU"
_ALWAYS_WRITTEN = ("normalization", "norm_placement", "norm_eps")


@dataclass(frozen=True)
class NormConfig:
    """The configuration of a transformer's norms. The defaults are RMSNorm, pre-norm and ε = 1e-6.

    Args:
        normalization: the kind of norm, one of `NORMALIZATIONS`.
        norm_placement: the positions of the norms around a sublayer, one of `PLACEMENTS`.
        norm_eps: ε ≥ 0, added under the root; None means the machine epsilon of the compute dtype.
        gain_offset: the norm multiplies by γ + gain_offset, where γ is initialized to 1 − gain_offset; 1 is Gemma's
            form. For "rmsnorm" only.
        cast: "fp32" multiplies by the gain in float32 and rounds once; "llama" also rounds before the product with
            the gain. For "rmsnorm" only.
        qk_norm: whether queries and keys are normalized per head; None means as the placement prescribes
            (True for "reordered" and "hybrid").
        residual_scale: α of "deepnorm" and "keel"; None means the paper's formula for the model's depth.
        mix_fraction: fraction of the blocks, counted from the input, to which "mix" gives post-norm.
        v_norm: whether values are normalized per head; None means as the placement prescribes (True for "hybrid").
        embedding_norm: whether the embeddings are normalized before the first block, as nanochat and BLOOM do.
        streams: number of parallel residual streams of "mhc" and "hyper", ≥ 2.
        gate_rank: rank of the gates that read the streams of "hyper"; None means 5/32 of the width, rounded up.
        residual_groups: number of groups of sublayers that "attention_residual" attends to; if the model has no more
            sublayers than this, each of them is a group.

    Numbers may be NumPy scalars or 0-d tensors; they are stored as Python numbers.

    Raises:
        ConfigError: an unknown name, a value out of range, or settings that exclude each other.

    Example:
        >>> NormConfig.from_dict({"normalization": "rmsnorm", "norm_placement": "pre", "norm_eps": 1e-6})
        NormConfig(normalization='rmsnorm', norm_placement='pre', norm_eps=1e-06, gain_offset=0.0, cast='fp32', \
qk_norm=None, residual_scale=None, mix_fraction=0.25, v_norm=None, embedding_norm=False, \
streams=4, gate_rank=None, residual_groups=8)
    """

    normalization: str = "rmsnorm"
    norm_placement: str = "pre"
    norm_eps: float | None = 1e-6
    gain_offset: float = 0.0
    cast: str = "fp32"
    qk_norm: bool | None = None
    residual_scale: float | None = None
    mix_fraction: float = 0.25
    v_norm: bool | None = None
    embedding_norm: bool = False
    streams: int = 4
    gate_rank: int | None = None
    residual_groups: int = 8

    def __post_init__(self) -> None:
        store_python_numbers(self)
        check_choice("normalization", self.normalization, NORMALIZATIONS)
        check_choice("norm_placement", self.norm_placement, PLACEMENTS)
        check_choice("cast", self.cast, CASTS)
        if self.norm_eps is not None:
            check_number("norm_eps", self.norm_eps, at_least=0.0, at_most=LARGEST, example=1e-6)
        check_number("gain_offset", self.gain_offset, at_least=-LARGEST, at_most=LARGEST)
        check_number("mix_fraction", self.mix_fraction, at_least=0.0, at_most=1.0)
        if self.residual_scale is not None:
            check_number("residual_scale", self.residual_scale, above=0.0)
        check_count("streams", self.streams, at_least=2)
        check_count("residual_groups", self.residual_groups)
        if self.gate_rank is not None:
            check_count("gate_rank", self.gate_rank)
        self._check_switches()
        self._check_combinations()

    def _check_switches(self) -> None:
        for name in ("qk_norm", "v_norm"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, bool):
                remedy = "leave it out for the placement's default"
                raise ConfigError(f"{name} must be True, False or None", repr(value), remedy)
        if not isinstance(self.embedding_norm, bool):
            raise ConfigError("embedding_norm must be True or False", repr(self.embedding_norm), "pass one of them")
        for name in ("qk_norm", "v_norm", "embedding_norm"):
            if getattr(self, name) and self.normalization == "none":
                remedy = f"choose a normalization, or set {name}=False"
                raise ConfigError(f"{name}=True needs a normalization", "normalization='none'", remedy)
            if getattr(self, name) is False and self.norm_placement == "hybrid" and name != "embedding_norm":
                remedy = f"leave {name} out, or choose another placement"
                invariant = "norm_placement 'hybrid' normalizes queries, keys and values"
                raise ConfigError(invariant, f"{name}=False", remedy)

    def _check_combinations(self) -> None:
        if self.normalization != "rmsnorm" and (self.gain_offset != 0.0 or self.cast != "fp32"):
            received = f"gain_offset={self.gain_offset} and cast={self.cast!r} with {self.normalization!r}"
            invariant = "gain_offset and cast can only be set for normalization 'rmsnorm'"
            raise ConfigError(invariant, received, "leave both out, or choose 'rmsnorm'")
        for name, placements in _OF_PLACEMENTS.items():
            value = getattr(self, name)
            if value != _default(name) and self.norm_placement not in placements:
                names = " and ".join(map(repr, placements))
                invariant = f"{name} can only be set for placement{'s' * (len(placements) > 1)} {names}"
                received = f"{name}={value} with norm_placement={self.norm_placement!r}"
                remedy = "leave it out" if len(placements) == 1 else "leave it out, or choose one of these placements"
                raise ConfigError(invariant, received, remedy)
        if self.norm_placement == "ngpt":
            self._check_unit()

    def _check_unit(self) -> None:
        for name in ("normalization", "gain_offset", "cast", "qk_norm", "v_norm", "embedding_norm"):
            if getattr(self, name) != _default(name):
                received = f"{name}={getattr(self, name)!r}"
                invariant = "norm_placement 'ngpt' gives the stream, queries, keys and matrices unit length by itself"
                raise ConfigError(invariant, received, f"leave {name} out, or choose another placement")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> NormConfig:
        """Return the config that a dictionary describes; missing keys get their defaults.

        Raises:
            ConfigError: `values` is not a mapping, or has an unknown key (the message lists the known ones) or an
                invalid value.
        """
        check_keys("a norm config", values, [field.name for field in fields(cls)])
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return a dictionary from which `from_dict` makes an equal config.

        It has the keys normalization, norm_placement and norm_eps, and those whose values differ from the defaults.

        Example:
            >>> NormConfig(qk_norm=True).to_dict()
            {'normalization': 'rmsnorm', 'norm_placement': 'pre', 'norm_eps': 1e-06, 'qk_norm': True}
        """
        return {
            name: value for name, value in asdict(self).items() if name in _ALWAYS_WRITTEN or value != _default(name)
        }


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ConfigError unless `value` is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        remedy = f"did you mean {near!r}?" if (near := _nearest(value, choices)) else "choose one of these"
        raise ConfigError(f"{name} must be one of {', '.join(choices)}", repr(value), remedy)


def check_number(
    name: str,
    value: object,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    example: float | None = None,
) -> None:
    """Raise ConfigError unless `value` is a finite Python number within the bounds.

    The message suggests `example`, if there is one.
    """
    bounds = [(at_least, "≥"), (above, ">"), (at_most, "≤")]
    wanted = " and ".join(f"{sign} {bound:g}" for bound, sign in bounds if bound is not None)
    invariant = f"{name} must be a finite number{' ' + wanted if wanted else ''}"
    if example is not None:
        remedy = f"use a number such as {example:g}"
    else:
        remedy = f"choose {name} within these bounds" if wanted else f"pass a finite number for {name}"
    if not is_finite(value):
        raise ConfigError(invariant, f"{value!r:.40}", remedy)
    assert isinstance(value, (int, float))
    too_low = (at_least is not None and value < at_least) or (above is not None and value <= above)
    if too_low or (at_most is not None and value > at_most):
        raise ConfigError(invariant, repr(value), remedy)


def read_number(
    name: str,
    value: object,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
) -> float:
    """Return `value` as a float; it may be a Python number, a NumPy scalar or a 0-d array or tensor.

    Raises:
        ConfigError: as `check_number`.
    """
    number = python_number(value)
    check_number(name, number, at_least=at_least, above=above, at_most=at_most)
    return float(number)


def is_finite(value: object) -> bool:
    """Return whether `value` is an int or float (not a bool) that a float can hold and that is not NaN or infinite."""
    largest = sys.float_info.max
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -largest <= value <= largest


def check_count(name: str, value: object, *, at_least: int = 1) -> None:
    """Raise ConfigError unless `value` is a Python integer of at least `at_least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        remedy = f"pass an integer, {at_least} or more"
        raise ConfigError(f"{name} must be an integer ≥ {at_least}", f"{value!r:.40}", remedy)


def read_count(name: str, value: object, *, at_least: int = 1) -> int:
    """Return `value` as an int; it may be a Python integer, a NumPy integer or a 0-d array or tensor of integers.

    Raises:
        ConfigError: as `check_count`.
    """
    number = python_number(value)
    check_count(name, number, at_least=at_least)
    return int(number)


def python_number(value: Any) -> Any:
    """Return a NumPy scalar, 0-d array or 0-d tensor as a Python number or string, and everything else unchanged.

    Tensors that require a gradient are returned unchanged, because a Python number would silently detach them from the
    graph. So are NumPy's dates, durations, complex numbers, bytes and objects. NumPy is never imported: its scalars are
    recognized by their attributes. Reading a 0-d tensor on a GPU waits for the GPU, so pass Python numbers in code that
    runs at every step.

    Example:
        >>> import torch
        >>> python_number(torch.tensor(0.5)), python_number("0.5")
        (0.5, '0.5')
    """
    if type(value) in (int, float, bool, str, type(None)):
        return value
    if getattr(value, "ndim", None) != 0 or not hasattr(value, "item") or getattr(value, "requires_grad", False):
        return value
    if getattr(getattr(value, "dtype", None), "kind", "f") not in _NUMPY_KINDS:
        return value
    try:
        number = value.item()
    except RuntimeError:  # tensors on the meta device have no values
        return value
    if type(number) in (int, float, bool, str):
        return number
    # `item` returns NumPy's long double as it is.
    is_real = type(number).__name__ == "longdouble"
    return float(number) if is_real else value


def store_python_numbers(settings: Any) -> None:
    """Replace the NumPy scalars and 0-d tensors among a dataclass's fields with Python numbers, in place.

    Call it in `__post_init__`, before the checks; it works on frozen dataclasses too. In tuples and lists, each element
    is replaced (a named tuple becomes a tuple). NumPy strings become Python strings.
    """
    for field in fields(settings):
        value = getattr(settings, field.name)
        number: Any
        if isinstance(value, tuple):
            number = tuple(map(python_number, value))
        elif isinstance(value, list):
            number = list(map(python_number, value))
        else:
            number = python_number(value)
        if number is not value:
            object.__setattr__(settings, field.name, number)


def check_keys(what: str, values: object, known: list[str]) -> None:
    """Raise ConfigError unless `values` is a mapping whose keys are all known."""
    what = what[:1].upper() + what[1:]
    if not isinstance(values, Mapping):
        remedy = f"use the keys {', '.join(known)}"
        raise ConfigError(f"{what} must be a dictionary", f"{type(values).__name__} {values!r:.40}", remedy)
    unknown = [key for key in values if key not in known]
    if unknown:
        remedy = f"correct or remove {'it' if len(unknown) == 1 else 'them'}{closest(unknown[0], known)}"
        raise ConfigError(f"{what} has the keys {', '.join(known)}", ", ".join(map(repr, unknown)), remedy)


def closest(key: object, known: Sequence[str]) -> str:
    """Return a question with the known key that was probably meant, or an empty string.

    Example:
        >>> closest("norm_epsilon", ["norm_eps", "cast"])
        "; did you mean 'norm_eps'?"
    """
    near = _nearest(key, known)
    return f"; did you mean {near!r}?" if near else ""


def _nearest(key: object, known: Sequence[str]) -> str:
    return next(iter(difflib.get_close_matches(str(key), known, 1)), "")


def _default(name: str) -> Any:
    value = {field.name: field.default for field in fields(NormConfig)}[name]
    assert value is not MISSING
    return value
