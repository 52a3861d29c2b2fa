"""Counts a norm's arithmetic operations per element, after PyTorch's operators are decomposed."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_ROWS, _WIDTH = 8, 64
# Operations per element that an operator reads. Sums and means add each element; a variance subtracts the mean, squares
# and adds.
_POINTWISE = ("add", "sub", "mul", "div", "pow")
_REDUCTIONS = {"sum": 1, "mean": 1, "var": 3}


def count_operations(normalization: str) -> dict[str, float]:
    """Count the operations of the forward pass of "rmsnorm" or "layernorm": "per_element" and "per_row".

    They are counted in the graph into which torch.compile decomposes torch.nn.functional's operator.
    """
    # A late import, because it takes a second and no other protocol needs it.
    from torch._decomp import get_decompositions
    from torch.fx.experimental.proxy_tensor import make_fx

    x, gain, bias = torch.ones(_ROWS, _WIDTH), torch.ones(_WIDTH), torch.ones(_WIDTH)

    def layer_norm(x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, (_WIDTH,), gain, bias, 1e-6)

    def rms_norm(x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
        return F.rms_norm(x, (_WIDTH,), gain, 1e-6)

    function = {"layernorm": layer_norm, "rmsnorm": rms_norm}[normalization]
    aten = torch.ops.aten
    parts: Any = get_decompositions([aten.native_layer_norm, aten.native_layer_norm.default, aten.var_mean.correction])
    with torch.no_grad():
        graph = make_fx(function, decomposition_table=parts, tracing_mode="fake")(x, gain, bias).graph
    per_element = per_row = 0.0
    for node in graph.nodes:
        name = str(getattr(node.target, "__name__", node.target)).split(".")[0].rstrip("_")
        read = max((_size(each) for each in node.all_input_nodes), default=0)
        if name in _REDUCTIONS:
            per_element += _REDUCTIONS[name] * read / (_ROWS * _WIDTH)
            per_row += name == "mean"  # a mean divides once per row
        elif name in _POINTWISE or name == "rsqrt":
            whole = _size(node) == _ROWS * _WIDTH
            per_element += whole
            per_row += not whole
    return {"per_element": per_element, "per_row": per_row}


def _size(node: torch.fx.Node) -> int:
    value = node.meta.get("val")
    return math.prod(value.shape) if isinstance(value, Tensor) else 0
