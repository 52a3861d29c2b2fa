"""Autograd functions that give omninorm's operators their derivatives and call probes.

The functions save x and r = 1/√(mean square + ε), one number per row; LayerNorm also saves the mean. Second derivatives
use the reference, whose backward functions consist of differentiable operations.

If a `Probe` is set, it receives the row statistics after the forward pass, and the block sums of the gain's gradient
after the backward pass. The operator that returns these block sums uses the same kernels as the one that does not.

The functions have no setup_context, because it would cost more time than the operator itself. torch.func requires one,
so the reference is used there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from omninorm.kernels import reference
from omninorm.kernels.probe import Probe

_operators: Any = torch.ops.omninorm


class RMSNormFunction(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        eps: float,
        gain_offset: float,
        round_first: bool,
        watcher: Probe | None,
    ) -> Tensor:
        y, scale = _operators.rms_norm_forward.default(x, weight, eps, gain_offset, round_first)
        ctx.save_for_backward(x, weight, scale)
        ctx.constants = eps, gain_offset, round_first
        ctx.probe = watcher
        if watcher is not None:
            watcher.forward(x, scale, None, eps)
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        eps, gain_offset, round_first = ctx.constants
        wanted = ctx.needs_input_grad[1]
        dx, dweight = rms_norm_backward(dy, None, x, scale, weight, eps, gain_offset, round_first, wanted, ctx.probe)
        return dx, dweight, None, None, None, None


class AddRMSNormFunction(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        weight: Tensor | None,
        eps: float,
        gain_offset: float,
        round_first: bool,
        watcher: Probe | None,
    ) -> tuple[Tensor, Tensor]:
        y, total, scale = _operators.add_rms_norm_forward.default(x, residual, weight, eps, gain_offset, round_first)
        ctx.save_for_backward(total, weight, scale)
        ctx.constants = eps, gain_offset, round_first
        ctx.probe = watcher
        ctx.set_materialize_grads(False)
        if not any(ctx.needs_input_grad[:2]):  # only the gain and the bias require gradients
            ctx.mark_non_differentiable(total)
        if watcher is not None:
            watcher.forward(total, scale, None, eps)
        return y, total

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dtotal: Tensor | None) -> tuple[Tensor | None, ...]:
        total, weight, scale = ctx.saved_tensors
        if dy is None:
            return dtotal, dtotal, None, None, None, None, None
        eps, gain_offset, round_first = ctx.constants
        wanted = ctx.needs_input_grad[2]
        dx, dweight = rms_norm_backward(
            dy, dtotal, total, scale, weight, eps, gain_offset, round_first, wanted, ctx.probe
        )
        return dx, dx, dweight, None, None, None, None


class LayerNormFunction(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, watcher: Probe | None
    ) -> Tensor:
        y, mean, scale = _operators.layer_norm_forward.default(x, weight, bias, eps)
        ctx.save_for_backward(x, mean, scale, weight, bias)
        ctx.eps = eps
        ctx.probe = watcher
        if watcher is not None:
            watcher.forward(x, scale, mean, eps)
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, scale, weight, bias = ctx.saved_tensors
        wanted = any(ctx.needs_input_grad[1:3])
        dx, dweight, dbias = layer_norm_backward(dy, None, x, mean, scale, weight, bias, ctx.eps, wanted, ctx.probe)
        return dx, dweight, dbias, None, None


class AddLayerNormFunction(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        watcher: Probe | None,
    ) -> tuple[Tensor, Tensor]:
        y, total, mean, scale = _operators.add_layer_norm_forward.default(x, residual, weight, bias, eps)
        ctx.save_for_backward(total, mean, scale, weight, bias)
        ctx.eps = eps
        ctx.probe = watcher
        ctx.set_materialize_grads(False)
        if not any(ctx.needs_input_grad[:2]):  # only the gain and the bias require gradients
            ctx.mark_non_differentiable(total)
        if watcher is not None:
            watcher.forward(total, scale, mean, eps)
        return y, total

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dtotal: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return dtotal, dtotal, None, None, None, None
        total, mean, scale, weight, bias = ctx.saved_tensors
        wanted = any(ctx.needs_input_grad[2:4])
        dx, dweight, dbias = layer_norm_backward(
            dy, dtotal, total, mean, scale, weight, bias, ctx.eps, wanted, ctx.probe
        )
        return dx, dx, dweight, dbias, None, None


def rms_norm_backward(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    eps: float,
    gain_offset: float,
    round_first: bool,
    gains_wanted: bool,
    watcher: Probe | None,
) -> tuple[Tensor, Tensor | None]:
    """Return dx + dtotal and dγ.

    With create_graph the reference computes them, which is differentiable; it calls no probe.
    """
    if torch.is_grad_enabled():
        cast = "llama" if round_first else "fp32"
        dx, dweight = reference.rms_norm_backward(dy, x, weight, eps, gain_offset, cast)
        return dx if dtotal is None else dx + dtotal, dweight
    arguments = dy, dtotal, x, scale, weight, eps, gain_offset, round_first, gains_wanted
    if watcher is None:
        dx, dweight = _operators.rms_norm_backward.default(*arguments)
        return dx, dweight if gains_wanted else None
    dx, dweight, blocks = _operators.rms_norm_backward_blocks.default(*arguments)
    dweight = dweight if gains_wanted else None
    _show(watcher, dy, dweight, blocks)
    return dx, dweight


def layer_norm_backward(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    mean: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    gains_wanted: bool,
    watcher: Probe | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return dx + dtotal, dγ and dβ; with create_graph the reference computes them, as in `rms_norm_backward`."""
    if torch.is_grad_enabled():
        dx, dweight, dbias = reference.layer_norm_backward(dy, x, weight, bias, eps)
        return dx if dtotal is None else dx + dtotal, dweight, dbias
    arguments = dy, dtotal, x, mean, scale, weight, bias, eps, gains_wanted
    if watcher is None:
        dx, dweight, dbias = _operators.layer_norm_backward.default(*arguments)
    else:
        dx, dweight, dbias, blocks = _operators.layer_norm_backward_blocks.default(*arguments)
    dweight = dweight if gains_wanted and weight is not None else None
    if watcher is not None:
        _show(watcher, dy, dweight, blocks)
    return dx, dweight, dbias if gains_wanted and bias is not None else None


def _show(watcher: Probe, dy: Tensor, dgain: Tensor | None, blocks: Tensor) -> None:
    rows = dy.numel() // dy.shape[-1]
    watcher.backward(dy, dgain, None if dgain is None else blocks, rows_per_block(rows, by_triton(dy)))


# The blocks depend on the number of rows alone, so that dγ has the same bits with any number of threads. operators.cpp
# has the same constants. Triton uses smaller blocks, because a GPU needs many of them to be busy.
BLOCK_ROWS, MOST_BLOCKS = 64, 256

# True while Triton's interpreter computes CPU tensors; see `gpu.emulated`.
emulated = False


def by_triton(x: Tensor) -> bool:
    """Return whether Triton computes omninorm's operators for x."""
    return x.is_cuda or emulated


def rows_per_block(rows: int, triton: bool) -> int:
    """Return the number of rows in each block of dγ's sum; the last block may have fewer."""
    rows_each = -(-rows // MOST_BLOCKS)
    if triton:
        return max(1, min(BLOCK_ROWS, rows_each))
    most: int = torch.sym_max(BLOCK_ROWS, rows_each)  # type: ignore[no-untyped-call]
    return most
