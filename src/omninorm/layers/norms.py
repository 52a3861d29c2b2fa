"""RMSNorm and LayerNorm, drop-in replacements for torch.nn's, and the related CRMSNorm and ScaleNorm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import get_type_hints

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function

from omninorm import checks, functional
from omninorm.config import CASTS, LARGEST, check_choice, read_count, read_number
from omninorm.errors import InputError
from omninorm.kernels import reference
from omninorm.layers.shape import explain_arguments, flatten_features, flatten_gain, read_eps, read_shape
from omninorm.layers.tracing import Proxy, record_leaf, refuse_scripting


class RMSNorm(nn.RMSNorm):
    """y = x / √(mean(x²) + ε) · (γ + gain_offset), over the trailing dimensions `normalized_shape`.

    Takes torch.nn.RMSNorm's arguments, loads its state dict, prints like it, and is an instance of it.

    Args:
        normalized_shape: the size or sizes of the trailing dimensions, each ≥ 1.
        eps: ε ≥ 0; None means the machine epsilon of the compute dtype.
        elementwise_affine: whether there is a gain γ.
        gain_offset, cast: as in `omninorm.functional.rms_norm`; γ starts at 1 − gain_offset.

    Shape: ``(..., *normalized_shape)`` → the same, in the input's dtype.

    Raises:
        ConfigError: on construction, for a size below 1 or constants out of range.
        InputError: on a call, for an input that does not fit.

    Source: Zhang and Sennrich 2019, arXiv 1910.07467.

    Example:
        >>> RMSNorm(4)(torch.tensor([2.0, 4.0, 6.0, 8.0]))
        tensor([0.3651, 0.7303, 1.0954, 1.4606], grad_fn=<RMSNormFunctionBackward>)
    """

    @explain_arguments
    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        gain_offset: float = 0.0,
        cast: str = "fp32",
    ) -> None:
        check_choice("cast", cast, CASTS)
        # Set before the base class's constructor, which calls reset_parameters.
        self.gain_offset = read_number("gain_offset", gain_offset, at_least=-LARGEST, at_most=LARGEST)
        self.cast = cast
        super().__init__(list(read_shape(normalized_shape)), read_eps(eps), elementwise_affine, device, dtype)

    def reset_parameters(self) -> None:
        """Set γ so that the norm multiplies by 1."""
        if self.elementwise_affine:
            nn.init.constant_(self.weight, 1.0 - self.gain_offset)

    def forward(self, x: Tensor) -> Tensor:
        if x.__class__ is not Tensor and isinstance(x, Proxy) and (y := record_leaf(self, RMSNorm, x)) is not None:
            return y
        try:
            weight = self._parameters["weight"]
        except KeyError:  # parametrized
            weight = None
        if weight is not None and len(self.normalized_shape) == 1:
            try:
                return functional.rms_norm(x, weight, self.eps, gain_offset=self.gain_offset, cast=self.cast)
            except InputError:
                flatten_features(x, self.normalized_shape)  # has the clearer message where the shape is wrong
                raise
        return rms_norm_over(x, self.normalized_shape, self.weight, self.eps, self.gain_offset, self.cast)

    __prepare_scriptable__ = refuse_scripting

    def extra_repr(self) -> str:
        offset = f", gain_offset={self.gain_offset}" if self.gain_offset else ""
        cast = f", cast={self.cast!r}" if self.cast != "fp32" else ""
        return super().extra_repr() + offset + cast


class LayerNorm(nn.LayerNorm):
    """y = (x − mean(x)) / √(var(x) + ε) · γ + β, over the trailing dimensions `normalized_shape`.

    Takes torch.nn.LayerNorm's arguments, loads its state dict, prints like it, and is an instance of it.

    Args:
        normalized_shape: the size or sizes of the trailing dimensions, each ≥ 1.
        eps: ε ≥ 0; None means the machine epsilon of the compute dtype.
        elementwise_affine: whether there are a gain γ and a bias β.
        bias: whether there is a β beside the γ.

    Shape: ``(..., *normalized_shape)`` → the same, in the input's dtype.

    Raises:
        ConfigError: on construction, for a size below 1 or an ε out of range.
        InputError: on a call, for an input that does not fit.

    Source: Ba, Kiros and Hinton 2016, arXiv 1607.06450.
    """

    @explain_arguments
    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        shape = list(read_shape(normalized_shape))
        super().__init__(shape, read_eps(eps), elementwise_affine, bias, device, dtype)  # type: ignore[arg-type]

    def forward(self, input: Tensor) -> Tensor:
        if input.__class__ is not Tensor and isinstance(input, Proxy):
            y = record_leaf(self, LayerNorm, input)
            if y is not None:
                return y
        try:
            weight, bias = self._parameters["weight"], self._parameters["bias"]
        except KeyError:  # parametrized
            weight = bias = None
        if weight is not None and bias is not None and len(self.normalized_shape) == 1:
            try:
                return functional.layer_norm(input, weight, bias, self.eps)
            except InputError:
                flatten_features(input, self.normalized_shape)  # has the clearer message where the shape is wrong
                raise
        return layer_norm_over(input, self.normalized_shape, self.weight, self.bias, self.eps)

    __prepare_scriptable__ = refuse_scripting


class CRMSNorm(nn.Module):
    """RMSNorm of the zero-mean vector whose last coordinate was dropped: y = x / √((Σx² + (Σx)²)/(d+1) + ε) · γ.

    The dropped coordinate is −Σx, so nothing is lost by leaving it out.

    Args:
        width: d, the coordinates that are kept, ≥ 1.
        eps: ε ≥ 0; None means the machine epsilon of the compute dtype.

    Shape: (..., d) → the same, in the input's dtype.

    Raises:
        ConfigError, InputError: as `RMSNorm`.

    Source: Jiang, Gu, Zhu and Pan 2023, arXiv 2305.14858.
    """

    @explain_arguments
    def __init__(
        self,
        width: int,
        eps: float | None = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.width = read_count("width", width)
        self.eps = read_eps(eps)
        self.weight = nn.Parameter(torch.empty(self.width, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set γ to 1."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Proxy) and (y := record_leaf(self, CRMSNorm, x)) is not None:
            return y
        return crms_norm(x, self.weight, self.eps)

    __prepare_scriptable__ = refuse_scripting

    def extra_repr(self) -> str:
        return f"{self.width}, eps={self.eps}"


class ScaleNorm(nn.Module):
    """y = g · x / ‖x‖ with one learned g, which starts at √d; ε stands under the root of the mean square.

    Written with the root mean square it is y = (g/√d) · x / √(mean(x²) + ε): RMSNorm with one gain for all features.

    Args:
        width: d ≥ 1.
        eps: ε ≥ 0; None means the machine epsilon of the compute dtype.

    Shape: (..., d) → the same, in the input's dtype.

    Raises:
        ConfigError, InputError: as `RMSNorm`.

    Source: Nguyen and Salazar 2019, arXiv 1910.05895.
    """

    @explain_arguments
    def __init__(
        self,
        width: int,
        eps: float | None = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.width = read_count("width", width)
        self.eps = read_eps(eps)
        self.scale = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set g to √d, so that the norm starts as RMSNorm."""
        nn.init.constant_(self.scale, math.sqrt(self.width))

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Proxy) and (y := record_leaf(self, ScaleNorm, x)) is not None:
            return y
        return scale_norm(x, self.scale, self.width, self.eps)

    __prepare_scriptable__ = refuse_scripting

    def extra_repr(self) -> str:
        return f"{self.width}, eps={self.eps}"


# torch.fx copies a forward's annotations into the code that it generates, where a string would be no type.
for _norm in (RMSNorm, LayerNorm, CRMSNorm, ScaleNorm):
    _norm.forward.__annotations__ = get_type_hints(_norm.forward)

# The modules' arithmetic as functions, which torch.fx records as one node where a module can't be a leaf -------------


def rms_norm_over(
    x: Tensor, shape: tuple[int, ...], weight: Tensor | None, eps: float | None, gain_offset: float, cast: str
) -> Tensor:
    """Return `functional.rms_norm` of x over its trailing dimensions `shape`."""
    if proxies := checks.overriding(x, weight):
        arguments = x, shape, weight, eps, gain_offset, cast
        return handle_torch_function(rms_norm_over, proxies, *arguments)
    rows = flatten_features(x, shape)
    y = functional.rms_norm(rows, flatten_gain(weight), eps, gain_offset=gain_offset, cast=cast)
    return y if rows is x else y.reshape(x.shape)


def layer_norm_over(
    x: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, eps: float | None
) -> Tensor:
    """Return `functional.layer_norm` of x over its trailing dimensions `shape`."""
    if proxies := checks.overriding(x, weight, bias):
        arguments = x, shape, weight, bias, eps
        return handle_torch_function(layer_norm_over, proxies, *arguments)
    rows = flatten_features(x, shape)
    y = functional.layer_norm(rows, flatten_gain(weight), flatten_gain(bias), eps)
    return y if rows is x else y.reshape(x.shape)


def crms_norm(x: Tensor, weight: Tensor, eps: float | None) -> Tensor:
    """Return x / √((Σx² + (Σx)²)/(d+1) + ε) · γ, as `CRMSNorm` computes it."""
    if proxies := checks.overriding(x, weight):
        return handle_torch_function(crms_norm, proxies, x, weight, eps)
    width = weight.shape[0]
    flatten_features(x, (width,))
    if checks.is_jagged(x):
        return checks.map_rows(lambda rows: crms_norm(rows, weight, eps), x)
    checks.check_rows(x)
    checks.check_gain("weight", weight, x)
    rows = reference.as_rows(x).to(reference.compute_dtype(x.dtype))
    eps = reference.resolve_eps(eps, rows.dtype)
    # In units of the largest element times a power of two above d, no sum over the row can overflow.
    per_unit = reference.reciprocal_unit(rows, eps) / 2 ** width.bit_length()
    rows = rows * per_unit
    dropped = reference.ordered_sum(rows, 1)
    square = reference.ordered_sum(rows * rows, 1) + dropped * dropped
    normed = rows * torch.rsqrt(square / (width + 1) + eps * per_unit * per_unit)
    y: Tensor = normed * weight.to(rows.dtype)
    return y.to(x.dtype).reshape(x.shape)


def scale_norm(x: Tensor, scale: Tensor, width: int, eps: float | None) -> Tensor:
    """Return RMSNorm of x with the gain g/√d for every feature, as `ScaleNorm` computes it."""
    if proxies := checks.overriding(x, scale):
        return handle_torch_function(scale_norm, proxies, x, scale, width, eps)
    rows = flatten_features(x, (width,))
    gain = scale.to(torch.promote_types(scale.dtype, torch.float32)) / math.sqrt(width)
    return functional.rms_norm(rows, gain.expand(width), eps)
