"""Builds omninorm's GatedRMSNorm for a gated norm of any class, if both compute the same."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from omninorm.config import CASTS
from omninorm.layers import GatedRMSNorm
from omninorm.layers.identify import RefusedError, almost_equal
from omninorm.layers.recognize import ACTIVATIONS, Form, gate_of, recognize, unwatched_copy

_ROWS = 64
_CLOSE = 1e-5  # modules that compute in float32 inside are right to about 1e-6 of the largest output
_GATE = "gate"  # the name of GatedRMSNorm's second argument


def build_gated(module: nn.Module) -> GatedRMSNorm | str:
    """Return omninorm's norm with the module's parameter, or the reason why there is none."""
    if gate_of(module) != _GATE:
        return f"its second argument is not named {_GATE!r}, as GatedRMSNorm's is"
    try:
        form = recognize(module)
    except RefusedError as refused:
        return str(refused)
    if form is None:
        return "it is no gated norm over features"
    if (form.centered, form.axis, form.dims, form.offset, form.bias) != (False, -1, 1, 0.0, None) or form.eps is None:
        return "it is gated, and not an RMSNorm with a plain gain"
    if form.gain != "weight" or [name for name, _ in module.named_parameters()] != ["weight"]:
        return "its gain is not its only parameter, or is not named 'weight': the state dict would change"
    found = _equal(module, form)
    if not found:
        return "it is gated in a way that omninorm does not have"
    weight = module.get_parameter("weight")
    rounded_alike = [each for each in found if _agrees(module, each, torch.bfloat16)]
    if not rounded_alike and weight.dtype in (torch.float16, torch.bfloat16):
        return f"in {weight.dtype} it rounds in an order that omninorm does not have"
    new = (rounded_alike or found)[0]
    new.weight = weight
    return new


def _equal(module: nn.Module, form: Form) -> list[GatedRMSNorm]:
    """Return the norms, on the meta device, that compute what the module computes in float64."""
    width = module.get_parameter("weight").numel()
    after = form.gate == "after"
    activations = [name for name in ACTIVATIONS if name != "identity" and form.gate in ("after", name)]
    with torch.device("meta"):
        candidates = [
            GatedRMSNorm(width, form.eps, activation=activation, norm_first=after, groups=form.groups, cast=cast)
            for activation, cast in itertools.product(activations, CASTS)
        ]
    return [each for each in candidates if _agrees(module, each, torch.float64)]


def _agrees(module: nn.Module, ours: GatedRMSNorm, dtype: torch.dtype) -> bool:
    generator = torch.Generator("cpu").manual_seed(0)
    weight, x, gate = (
        (torch.randn(*shape, ours.width, generator=generator, device="cpu") * size).to(dtype)
        for shape, size in (((), 1.0), ((_ROWS,), 3.0), ((_ROWS,), 3.0))
    )
    theirs = unwatched_copy(module).to(dtype)
    theirs.get_parameter("weight").data = weight.clone()
    with torch.no_grad(), torch.device("cpu"), torch.autocast("cpu", enabled=False):
        try:
            expected = theirs(x.clone(), gate.clone())
        except Exception:  # a module may raise anything, for example because it has no support for bfloat16
            return False
        y = torch.func.functional_call(ours, {"weight": weight}, (x, gate))
    if not isinstance(expected, Tensor) or expected.shape != y.shape:
        return False
    if dtype == torch.bfloat16:
        return expected.dtype == dtype and almost_equal(expected, y)
    return float((expected.double() - y).abs().max()) <= _CLOSE * float(y.abs().max())
