"""The operators for programs of torch.export and torch.jit.trace: their derivatives and decompositions.

These operators, called `_autograd`, compute the same as those called `_forward`. An exported program can only contain
operators, so they need registered derivatives. PyTorch calls these through Python, which takes longer than a small
norm, so eager mode uses the functions in `autograd` instead. The decompositions are for exporters that have no
translation of the operators, such as torch.onnx.export without `omninorm.onnx.translations()`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._decomp import register_decomposition

from omninorm.kernels import reference
from omninorm.kernels.autograd import (
    AddLayerNormFunction,
    AddRMSNormFunction,
    LayerNormFunction,
    RMSNormFunction,
)


def register() -> None:
    """Register the derivatives and the decompositions of the operators, which must have been defined before."""
    for name, (function, save, decomposition) in _PROGRAM_OPERATORS.items():
        torch.library.register_autograd(f"omninorm::{name}", _backward(function), setup_context=save)
        register_decomposition(getattr(torch.ops.omninorm, name).default)(decomposition)


def _save_rms_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x, weight, *ctx.constants = inputs
    ctx.save_for_backward(x, weight, output[1])


def _save_add_rms_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    (_, _, weight, *ctx.constants), (_, total, scale) = inputs, output
    ctx.save_for_backward(total, weight, scale)
    ctx.set_materialize_grads(False)


def _save_layer_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    (x, weight, bias, ctx.eps), (_, mean, scale) = inputs, output
    ctx.save_for_backward(x, mean, scale, weight, bias)


def _save_add_layer_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    (_, _, weight, bias, ctx.eps), (_, total, mean, scale) = inputs, output
    ctx.save_for_backward(total, mean, scale, weight, bias)
    ctx.set_materialize_grads(False)


def _backward(function: Any) -> Callable[..., tuple[Any, ...]]:
    """Return the function's derivative, without gradients of the row statistics and without the probe argument."""
    results = 2 if function in (AddRMSNormFunction, AddLayerNormFunction) else 1

    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        ctx.probe = None
        gradient: tuple[Any, ...] = function.backward(ctx, *gradients[:results])
        return gradient[:-1]

    return backward


# Decompositions: the formulas in PyTorch's basic operations. They do not rescale extreme rows as `reference` does,
# because ONNX lacks an operation for this (frexp). -----------------------------------------------------------------


def _decompose_rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, gain_offset: float = 0.0, round_first: bool = False
) -> tuple[Tensor, Tensor]:
    wide = x.to(reference.compute_dtype(x.dtype))
    power = wide.square().mean(-1, keepdim=True) + eps
    scale = torch.rsqrt(power)
    # Between casts this is a quotient: onnxscript's optimizer replaces a product with a reciprocal root by
    # RMSNormalization, and between casts the resulting model is invalid (onnxscript 0.7.2).
    normed = wide * scale if wide.dtype == x.dtype else wide / torch.sqrt(power)
    if round_first:
        normed = normed.to(x.dtype).to(wide.dtype)
    y = normed * reference.gain(weight, gain_offset, wide.dtype)
    return y.to(x.dtype), scale.flatten()


def _decompose_add_rms_norm(x: Tensor, residual: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    total = x + residual
    y, scale = _decompose_rms_norm(total, *arguments)
    return y, total, scale


def _decompose_layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    wide = x.to(reference.compute_dtype(x.dtype))
    gain, shift = (None if each is None else each.to(wide.dtype) for each in (weight, bias))
    y, mean, scale = torch.native_layer_norm(wide, [x.shape[-1]], gain, shift, eps)
    return y.to(x.dtype), mean.flatten(), scale.flatten()


def _decompose_add_layer_norm(x: Tensor, residual: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    total = x + residual
    y, mean, scale = _decompose_layer_norm(total, *arguments)
    return y, total, mean, scale


_PROGRAM_OPERATORS: dict[str, tuple[Any, Any, Any]] = {
    "rms_norm_autograd": (RMSNormFunction, _save_rms_norm, _decompose_rms_norm),
    "add_rms_norm_autograd": (AddRMSNormFunction, _save_add_rms_norm, _decompose_add_rms_norm),
    "layer_norm_autograd": (LayerNormFunction, _save_layer_norm, _decompose_layer_norm),
    "add_layer_norm_autograd": (AddLayerNormFunction, _save_add_layer_norm, _decompose_add_layer_norm),
}
