"""Translates omninorm's operators to ONNX, one node per norm.

    torch.onnx.export(model, (x,), "model.onnx", dynamo=True, opset_version=23,
                      custom_translation_table=omninorm.onnx.translations())

RMSNorm becomes RMSNormalization, which needs opset 23, and LayerNorm becomes LayerNormalization (opset 17). Float16 and
bfloat16 are cast to float32 before the node and back after it; otherwise they would be rounded before the gain.

Without the table, torch.onnx.export writes each norm as several basic operations (Mul, ReduceMean, …), in any opset.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from omninorm.errors import MissingExtraError
from omninorm.kernels import operators as _operators  # noqa: F401  defines the operators


def translations() -> dict[Any, Callable[..., Any]]:
    """Return the table for torch.onnx.export's custom_translation_table, with `dynamo=True` and `opset_version=23`.

    Returns:
        A dictionary from operators to the functions that build their ONNX nodes.

    Raises:
        MissingExtraError: onnxscript is not installed.
    """
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        remedy = 'install it with pip install "omninorm[onnx]"'
        raise MissingExtraError("Exporting to ONNX needs the package onnxscript", "", remedy) from error
    names = torch.ops.omninorm
    return {
        names.rms_norm_autograd.default: _rms_norm,
        names.add_rms_norm_autograd.default: _add_rms_norm,
        names.layer_norm_autograd.default: _layer_norm,
        names.add_layer_norm_autograd.default: _add_layer_norm,
    }


# One function per operator, with its arguments and results --------------------------------------------------------


def _rms_norm(x: Any, weight: Any, eps: float, gain_offset: float = 0.0, round_first: bool = False) -> Any:
    op, wide = _opset(), _wide(x)
    scale = _scale(wide, eps)
    gain = _ones(wide) if weight is None else op.CastLike(weight, wide)
    if gain_offset and weight is not None:
        gain = op.Add(gain, op.CastLike(op.Constant(value_float=gain_offset), wide))
    if round_first and wide is not x:
        normed = op.RMSNormalization(wide, _ones(wide), axis=-1, epsilon=eps)
        return op.CastLike(op.Mul(op.CastLike(op.CastLike(normed, x), wide), gain), x), scale
    return op.CastLike(op.RMSNormalization(wide, gain, axis=-1, epsilon=eps), x), scale


def _add_rms_norm(
    x: Any, residual: Any, weight: Any, eps: float, gain_offset: float = 0.0, round_first: bool = False
) -> Any:
    total = _sum(x, residual)
    y, scale = _rms_norm(total, weight, eps, gain_offset, round_first)
    return y, total, scale


def _layer_norm(x: Any, weight: Any, bias: Any, eps: float) -> Any:
    op, wide = _opset(), _wide(x)
    gains = [_ones(wide) if weight is None else op.CastLike(weight, wide)]
    gains += [] if bias is None else [op.CastLike(bias, wide)]
    y, mean, scale = op.LayerNormalization(wide, *gains, axis=-1, epsilon=eps)
    return op.CastLike(y, x), _flat(mean), _flat(scale)


def _add_layer_norm(x: Any, residual: Any, weight: Any, bias: Any, eps: float) -> Any:
    total = _sum(x, residual)
    y, mean, scale = _layer_norm(total, weight, bias, eps)
    return y, total, mean, scale


# Parts -----------------------------------------------------------------------------------------------------------


def _opset() -> Any:
    from onnxscript import opset23

    return opset23


def _sum(x: Any, residual: Any) -> Any:
    total = _opset().Add(x, residual)
    total.dtype, total.shape = x.dtype, x.shape
    return total


def _wide(x: Any) -> Any:
    """Return x in the compute type, without a cast if it already has this type."""
    if x.dtype.bitwidth >= 32:
        return x
    wide = _opset().Cast(x, to=_FLOAT)
    wide.shape = x.shape
    return wide


def _ones(x: Any) -> Any:
    op = _opset()
    return op.CastLike(op.Constant(value_floats=[1.0] * int(x.shape[-1])), x)


def _scale(x: Any, eps: float) -> Any:
    """Return 1/√(mean(x²) + ε) of each row. The exporter removes it if it is unused."""
    op = _opset()
    power = op.ReduceMean(op.Mul(x, x), op.Constant(value_ints=[-1]), keepdims=1)
    return _flat(op.Reciprocal(op.Sqrt(op.Add(power, op.CastLike(op.Constant(value_float=eps), power)))))


def _flat(x: Any) -> Any:
    op = _opset()
    return op.Reshape(x, op.Constant(value_ints=[-1]))


_FLOAT = 1  # the number of float32 in ONNX's TensorProto
