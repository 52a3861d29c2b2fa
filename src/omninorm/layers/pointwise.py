"""DynamicTanh and DynamicErf: bounded functions of single elements, which need no row statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, final, get_type_hints

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function

from omninorm.checks import check_device, check_rows, is_jagged, map_rows, overriding
from omninorm.config import read_number
from omninorm.kernels.reference import compute_dtype
from omninorm.layers.shape import explain_arguments, flatten_features, read_shape
from omninorm.layers.tracing import Proxy, record_leaf, refuse_scripting


class Pointwise(nn.Module):
    """The common base of DynamicTanh and DynamicErf: y = γ · f(α x) + β."""

    function: ClassVar[str]

    @explain_arguments
    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        alpha: float = 0.5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.first_alpha = read_number("alpha", alpha, above=0.0)
        self.normalized_shape = read_shape(normalized_shape)
        self.alpha = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.weight = nn.Parameter(torch.empty(self.normalized_shape, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(self.normalized_shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set α to its initial value, γ to 1 and β to 0."""
        nn.init.constant_(self.alpha, self.first_alpha)
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Proxy) and (y := record_leaf(self, Pointwise, x)) is not None:
            return y
        shift = getattr(self, "shift", None)
        return bounded(x, self.function, self.normalized_shape, self.alpha, shift, self.weight, self.bias)

    __prepare_scriptable__ = refuse_scripting

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}"


@final
class DynamicTanh(Pointwise):
    """y = γ · tanh(α x) + β, with one α for all features.

    Args:
        normalized_shape: the size or sizes of the trailing dimensions, each ≥ 1; the shape of γ and β.
        alpha: initial value of α, > 0.

    Shape: ``(..., *normalized_shape)`` → the same, in the input's dtype; computed in float32 (float64 for float64).

    Raises:
        ConfigError: on construction, for a size below 1 or an α out of range.
        InputError: on a call, for an input of another shape, dtype or device.

    Source: Zhu, Chen, He, LeCun and Liu 2025, arXiv 2503.10622.

    Example:
        >>> DynamicTanh(2, alpha=0.5)(torch.tensor([0.0, 2.0])).detach()  # tanh(0) and tanh(1)
        tensor([0.0000, 0.7616])
    """

    function = "tanh"


@final
class DynamicErf(Pointwise):
    """y = γ · erf(α x + s) + β, with one α and one shift s for all features; s is initialized to 0.

    Arguments, shapes and errors are those of `DynamicTanh`.

    Source: Derf, "Stronger Normalization-Free Transformers", arXiv 2512.10938.

    Example:
        >>> DynamicErf(2, alpha=0.5)(torch.tensor([0.0, 2.0])).detach()  # erf(0) and erf(1)
        tensor([0.0000, 0.8427])
    """

    function = "erf"

    @explain_arguments
    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        alpha: float = 0.5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(normalized_shape, alpha, device, dtype)
        self.shift = nn.Parameter(torch.zeros(1, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Set α to its initial value, γ to 1, β and s to 0."""
        super().reset_parameters()
        if hasattr(self, "shift"):
            nn.init.zeros_(self.shift)


Pointwise.forward.__annotations__ = get_type_hints(Pointwise.forward)  # see norms.py

FUNCTIONS = {"tanh": torch.tanh, "erf": torch.erf}


def bounded(
    x: Tensor,
    function: str,
    shape: tuple[int, ...],
    alpha: Tensor,
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor,
) -> Tensor:
    """Return γ · f(α x + s) + β for x (..., *shape), with f one of `FUNCTIONS`.

    α and s are expanded before they are used, so that their gradients are sums over columns, whose order does not
    depend on the number of threads.
    """
    if proxies := overriding(x, alpha, shift, weight, bias):
        arguments = x, function, shape, alpha, shift, weight, bias
        return handle_torch_function(bounded, proxies, *arguments)
    flatten_features(x, shape)
    if is_jagged(x):
        return map_rows(lambda rows: bounded(rows, function, shape, alpha, shift, weight, bias), x)
    check_rows(x)
    check_device("weight", weight, x)
    wide = x.to(compute_dtype(x.dtype))
    inner = alpha.to(wide.dtype).expand(wide.shape[-1]) * wide
    if shift is not None:
        inner = inner + shift.to(wide.dtype).expand(wide.shape[-1])
    y = weight.to(wide.dtype) * FUNCTIONS[function](inner) + bias.to(wide.dtype)
    return y.to(x.dtype)
