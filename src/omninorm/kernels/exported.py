"""The operators that a program of torch.export or torch.jit.trace calls, with derivatives that it can be trained by.

They are those of `_forward` by a second name. PyTorch finds their derivatives by way of Python, which takes longer than
a small norm, so eager mode has `autograd`'s functions instead; a program has operators alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from omninorm.kernels.autograd import (
    AddLayerNormFunction,
    AddRMSNormFunction,
    LayerNormFunction,
    RMSNormFunction,
)


def register() -> None:
    """Gives the operators, which must be defined, the derivatives of `autograd`'s functions."""
    for name, (function, save) in _DERIVATIVES.items():
        torch.library.register_autograd(f"omninorm::{name}", _backward(function), setup_context=save)


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
    """The function's derivative, without the statistics among the results and the watcher among the arguments."""
    results = 2 if function in (AddRMSNormFunction, AddLayerNormFunction) else 1

    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        ctx.probe = None
        gradient: tuple[Any, ...] = function.backward(ctx, *gradients[:results])
        return gradient[:-1]

    return backward


_DERIVATIVES = {
    "rms_norm_autograd": (RMSNormFunction, _save_rms_norm),
    "add_rms_norm_autograd": (AddRMSNormFunction, _save_add_rms_norm),
    "layer_norm_autograd": (LayerNormFunction, _save_layer_norm),
    "add_layer_norm_autograd": (AddLayerNormFunction, _save_add_layer_norm),
}
