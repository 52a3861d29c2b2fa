"""Finds norms by probing a copy of each kind of module once; class names do not matter.

Only a norm that cannot run on the CPU, such as one with a GPU kernel, is recognized by its name and its gain.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from omninorm.layers import NORM_TYPES, LayerNorm, RMSNorm
from omninorm.layers.identify import RefusedError
from omninorm.layers.pointwise import Pointwise
from omninorm.layers.recognize import Form, recognize
from omninorm.monitor.history import NormFacts

EPS_NAMES = ("eps", "variance_epsilon", "epsilon")
GAIN_NAMES = ("weight", "scale", "gamma", "gain", "g")
_LIKE_A_NORM = re.compile(r"norm|rms|(^|_)ln(_|\d|$)|layer_?n", re.IGNORECASE)
_NO_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LocalResponseNorm)
# The forward methods whose formula is known; subclasses with another one are probed.
_KNOWN = {nn.LayerNorm.forward, nn.RMSNorm.forward, LayerNorm.forward, RMSNorm.forward}


@dataclass
class Norm:
    """A norm: its facts, its module, its form, the batch dimension of its input, and whether its input can be measured,
    because the form is known."""

    facts: NormFacts
    module: nn.Module
    form: Form
    batch_dim: int = 0
    measured: bool = True

    @property
    def centred(self) -> bool:
        """Whether it subtracts the mean."""
        return self.form.centered

    @property
    def offset(self) -> float:
        """The number that is added to the stored gain."""
        return self.form.offset

    @property
    def gain(self) -> Tensor | None:
        """The gain as stored."""
        found = getattr(self.module, self.form.gain, None) if self.form.gain else None
        return found if isinstance(found, Tensor) and not is_lazy(found) else None

    @property
    def bias(self) -> Tensor | None:
        """The bias, which is added to the output."""
        found = getattr(self.module, self.form.bias, None) if self.form.bias else None
        return found if isinstance(found, Tensor) else None


class Recognizer:
    """Recognizes norms. Modules of the same class, size and settings are probed once."""

    def __init__(self) -> None:
        self._found: dict[Hashable, tuple[Form, bool] | None] = {}

    def find(self, model: nn.Module) -> dict[str, tuple[nn.Module, Form, bool]]:
        """Return the norms of a model by name: the module, its form, and whether its input can be measured."""
        found: dict[str, tuple[nn.Module, Form, bool]] = {}
        for name, module in model.named_modules():
            owner = name.rpartition(".")[0]
            if owner in found:  # the weightless norm inside a norm that adds the gain
                continue
            known = self.form(module, name)
            if known is not None:
                found[name] = (module, *known)
        return found

    def form(self, module: nn.Module, name: str = "") -> tuple[Form, bool] | None:
        """Return a norm's form and whether its input can be measured; None for other modules."""
        if isinstance(module, NORM_TYPES) and (isinstance(module, Pointwise) or not _has_own_forward(module)):
            return declared_form(module), True
        if not self._is_candidate(module, name):
            return None
        key = _key(module)
        if key not in self._found:
            self._found[key] = _probe(module)
        return self._found[key]

    def _is_candidate(self, module: nn.Module, name: str) -> bool:
        if isinstance(module, NORM_TYPES):
            return True
        if isinstance(module, _NO_NORMS) or type(module).__module__.startswith("torch.nn."):
            return False
        own = list(module.parameters(recurse=False))
        if any(True for _ in module.children()):  # a norm that adds a gain to a weightless one
            inner = [self.form(child) for child in module.children()] if own else [None]
            if any(form is None or form[0].gain for form in inner):
                return False
        named = any(_LIKE_A_NORM.search(text) for text in (type(module).__name__, name.rpartition(".")[2]))
        vectors = bool(own) and all(sum(size > 1 for size in parameter.shape) <= 1 for parameter in own)
        return vectors or named


def _has_own_forward(module: nn.Module) -> bool:
    known = isinstance(module, (nn.LayerNorm, nn.RMSNorm))
    return known and type(module).forward not in _KNOWN


def _key(module: nn.Module) -> Hashable:
    shapes = tuple((name, tuple(each.shape)) for name, each in module.named_parameters())
    simple = (int, float, bool, str, type(None), tuple, torch.dtype)
    settings = tuple((name, repr(value)) for name, value in sorted(vars(module).items()) if isinstance(value, simple))
    return type(module), shapes, settings


def _probe(module: nn.Module) -> tuple[Form, bool] | None:
    try:
        form = recognize(module)
    except RefusedError:
        gain = find_gain(module)
        if gain is None or gain.ndim != 1 or "norm" not in type(module).__name__.lower():
            return None
        return declared_form(module), True
    if form is None:  # a norm with an activation, for example
        return (declared_form(module), False) if isinstance(module, NORM_TYPES) else None
    return form, True


def declared_form(module: nn.Module) -> Form:
    """Return the form of a norm that is not probed, from its class and attributes."""
    gain, bias = find_gain(module), getattr(module, "bias", None)
    named = {id(each): name for name, each in module.named_parameters(recurse=False)}
    return Form(
        centered=isinstance(module, nn.LayerNorm),
        dims=len(getattr(module, "normalized_shape", (1,))),
        gain=next((name for name in GAIN_NAMES if gain is not None and getattr(module, name, None) is gain), None),
        offset=float(getattr(module, "gain_offset", 0.0)),
        bias="bias" if isinstance(bias, Tensor) and (id(bias) in named or isinstance(module, NORM_TYPES)) else None,
        eps=read_eps(module),
    )


def find_gain(module: nn.Module) -> nn.Parameter | None:
    """Return a norm's gain, by its usual names."""
    found = (getattr(module, name, None) for name in GAIN_NAMES)
    return next((gain for gain in found if isinstance(gain, nn.Parameter) and not is_lazy(gain)), None)


def read_norm(name: str, module: nn.Module, block: int | None, batch_dim: int = 0, known: Any = None) -> Norm:
    """Return the norm with its facts.

    Args:
        known: what `Recognizer.form` returned for it, if it was called before.
    """
    form, measured = known or Recognizer().form(module, name) or (declared_form(module), True)
    gains = list(module.parameters(recurse=False))
    ours = type(module).__module__.startswith("omninorm.")
    frozen = bool(gains) and not any(gain.requires_grad for gain in gains)
    facts = NormFacts(name, type(module).__name__, form.eps, block, frozen, ours)
    return Norm(facts, module, form, batch_dim, measured)


def read_eps(module: nn.Module) -> float | None:
    """Return a norm's ε, by its usual names; None if it has none."""
    found = (getattr(module, name, None) for name in EPS_NAMES)
    eps = next(
        (float(value) for value in found if isinstance(value, (int, float)) and not isinstance(value, bool)), None
    )
    if eps is None and hasattr(module, "eps") and isinstance(module, NORM_TYPES):  # the machine epsilon
        gain = find_gain(module)
        is_double = gain is not None and gain.dtype == torch.float64
        return torch.finfo(torch.float64 if is_double else torch.float32).eps
    return eps
