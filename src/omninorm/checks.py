"""What the functions of norms accept: checks of arguments, proxies of torch.fx, and jagged nested tensors.

For small norms the checks would take longer than the norm. So where C++ operators are called directly, which check the
arguments themselves, the checks are called only after an operator refused them, to raise a readable error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from omninorm.config import CASTS, LARGEST, is_finite
from omninorm.errors import InputError

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
REFUSALS = (RuntimeError, TypeError, KeyError)


# Proxies and jagged tensors --------------------------------------------------------------------------------------


def overriding(*arguments: object) -> list[Any]:
    """Return the arguments with `__torch_function__` that are not tensors, such as torch.fx's proxies."""
    return [
        argument
        for argument in arguments
        if not (argument is None or isinstance(argument, Tensor)) and hasattr(type(argument), "__torch_function__")
    ]


def is_jagged(x: object) -> bool:
    """Return whether `x` is a nested tensor in the jagged layout."""
    return isinstance(x, Tensor) and x.is_nested and x.layout == torch.jagged


def map_rows(norm: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a norm to a jagged nested tensor: rows are independent, so all values are normalized as one dense tensor.

    Raises:
        InputError: the jagged dimension is the last one, that of the features.
    """
    ragged: int = x._ragged_idx  # type: ignore[attr-defined]
    if ragged == x.ndim - 1:
        remedy = "transpose it so that the features are the last dimension"
        raise InputError("A nested tensor must have the same number of features everywhere", f"shape {x.shape}", remedy)
    return torch.nested.nested_tensor_from_jagged(
        norm(x.values()),  # includes rows that belong to no sequence, if there are gaps
        x.offsets(),  # type: ignore[attr-defined]
        x.lengths(),  # type: ignore[attr-defined]
        jagged_dim=ragged,
        min_seqlen=x._maybe_min_seqlen,  # type: ignore[attr-defined]
        max_seqlen=x._maybe_max_seqlen,  # type: ignore[attr-defined]
    )


# Checks ----------------------------------------------------------------------------------------------------------


def check_rms_norm(x: Tensor, weight: Tensor | None, eps: float | None, gain_offset: float, cast: str) -> None:
    """Raise InputError unless these are valid arguments of `rms_norm`."""
    check_rows(x)
    check_gain("weight", weight, x)
    check_eps(eps)
    check_rounding(gain_offset, cast)


def check_layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float | None) -> None:
    """Raise InputError unless these are valid arguments of `layer_norm`."""
    check_rows(x)
    check_gain("weight", weight, x)
    check_gain("bias", bias, x)
    check_eps(eps)


def check_float(name: str, x: object) -> None:
    """Raise InputError unless `x` is a dense tensor of one of the four floating-point dtypes."""
    if not isinstance(x, Tensor):
        received = f"{type(x).__name__} {x!r:.40}" if isinstance(x, (bool, int, float, str)) else type(x).__name__
        raise InputError(f"{name} must be a torch.Tensor", received, "convert it with torch.as_tensor")
    if x.dtype not in FLOATS:
        remedy = f"convert it first, e.g. with {name}.float()"
        raise InputError(f"{name} must be float16, bfloat16, float32 or float64", str(x.dtype), remedy)
    if x.is_nested:
        if x.layout == torch.jagged:
            remedy = "pass a dense tensor, e.g. its padded form from to_padded_tensor"
            raise InputError(f"{name} can't be a nested tensor here", "", remedy)
        remedy = "build it with torch.nested.nested_tensor(…, layout=torch.jagged), or pad it with to_padded_tensor"
        raise InputError(f"{name} must be a dense or a jagged nested tensor", "a strided nested tensor", remedy)
    if x.layout != torch.strided:
        raise InputError(f"{name} must be a dense tensor", str(x.layout), f"convert it with {name}.to_dense()")


def check_rows(x: Tensor) -> None:
    """Raise InputError unless `x` has a last dimension to normalize over."""
    check_float("x", x)
    if x.ndim == 0 or x.shape[-1] == 0:
        remedy = "pass a tensor with features in its last dimension"
        raise InputError("x must have a last dimension of width ≥ 1", f"shape {tuple(x.shape)}", remedy)


def check_gain(name: str, gain: Tensor | None, x: Tensor) -> None:
    """Raise InputError unless `gain` has one value per feature of `x` and is on x's device, or is None."""
    if gain is None:
        return
    check_float(name, gain)
    if gain.shape != x.shape[-1:]:
        received = f"{tuple(gain.shape)} for x of shape {tuple(x.shape)}"
        remedy = f"pass a {name} with one value per feature of x"
        raise InputError(f"{name} must have shape ({x.shape[-1]},), like x's last dimension", received, remedy)
    check_device(name, gain, x)


def check_device(name: str, gain: Tensor, x: Tensor) -> None:
    """Raise InputError unless `gain` is on x's device."""
    if gain.device != x.device:
        received = f"{gain.device} and {x.device}"
        raise InputError(f"{name} and x must be on the same device", received, f"move {name}: {name}.to(x.device)")


def check_eps(eps: float | None) -> None:
    """Raise InputError unless `eps` is a finite number ≥ 0, or None."""
    if eps is None:
        return
    if not is_finite(eps) or not 0 <= eps <= LARGEST:
        remedy = "use a small positive value such as 1e-6"
        raise InputError("eps must be a finite number ≥ 0, or None", f"{eps!r:.40}", remedy)


def check_rounding(gain_offset: float, cast: str) -> None:
    """Raise InputError unless the gain offset is a finite number and `cast` one of `CASTS`."""
    if not is_finite(gain_offset) or abs(gain_offset) > LARGEST:
        remedy = "use 0.0, or 1.0 for Gemma's norms, whose gains start at 0"
        raise InputError("gain_offset must be a finite number", f"{gain_offset!r:.40}", remedy)
    if cast not in CASTS:
        raise InputError(f"cast must be one of {', '.join(CASTS)}", repr(cast), "choose one of these")


def check_gate(x: Tensor, z: Tensor) -> None:
    """Raise InputError unless the gate `z` is a floating-point tensor of x's shape, on its device."""
    check_float("z", z)
    if z.shape != x.shape:
        received = f"{tuple(z.shape)} for x of shape {tuple(x.shape)}"
        raise InputError("z must have x's shape", received, "pass a gate with one value per element of x")
    check_device("z", z, x)


def check_groups(groups: int, x: Tensor) -> None:
    """Raise InputError unless `groups` is a count that divides the features of `x`."""
    width = int(x.shape[-1])
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1 or width % groups:
        remedy = "use 1, or a number of groups of equal size"
        raise InputError(f"groups must divide x's {width} features", f"groups={groups!r:.40}", remedy)


def check_modulation(name: str, values: Tensor, x: Tensor) -> None:
    """Raise InputError unless `values` are floating point and broadcast to x's shape, on its device."""
    check_float(name, values)
    sizes = zip(reversed(values.shape), reversed(x.shape), strict=False)
    if values.ndim > x.ndim or any(size not in (1, of_x) for size, of_x in sizes):
        received = f"{tuple(values.shape)} for x of shape {tuple(x.shape)}"
        remedy = f"give it as many dimensions as x, with 1 where it is the same, e.g. {name}.unsqueeze(1)"
        raise InputError(f"{name} must broadcast to x's shape", received, remedy)
    check_device(name, values, x)


def check_pair(x: Tensor, residual: Tensor) -> None:
    """Raise InputError unless `x` and `residual` can be added without broadcasting or promotion."""
    for name, tensor in (("x", x), ("residual", residual)):
        if not is_jagged(tensor):
            check_float(name, tensor)
    if (x.shape, x.dtype, x.device) != (residual.shape, residual.dtype, residual.device):
        received = f"{_describe(x)} and {_describe(residual)}"
        raise InputError("x and residual must have the same shape, dtype and device", received, "convert one of them")


def _describe(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)} on {x.device}"
