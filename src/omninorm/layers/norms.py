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

    A subclass of torch.nn.RMSNorm that takes the same arguments, loads its state dicts and has the same repr.

    Args:
        normalized_shape: the size or sizes of the trailing dimensions, each ≥ 1.
        eps: ε ≥ 0; None means the machine epsilon of the compute dtype.
        elementwise_affine: whether there is a gain γ.
        gain_offset, cast: as in `omninorm.functional.rms_norm`; γ starts at 1 − gain_offset.

    Shape: ``(..., *normalized_shape)`` → the same, in the input's dtype.

    Raises:
        ConfigError: on construction, for a size below 1 or constants out of range.
        InputError: on a call, if the input's shape does not end in `normalized_shape` or its dtype is not supported.

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
        # The base class's constructor calls reset_parameters, which reads these.
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
                flatten_features(x, self.normalized_shape)  # raises a clearer message if the shape is wrong
                raise
        return rms_norm_over(x, self.normalized_shape, self.weight, self.eps, self.gain_offset, self.cast)

    __prepare_scriptable__ = refuse_scripting

    def extra_repr(self) -> str:
        offset = f", gain_offset={self.gain_offset}" if self.gain_offset else ""
        cast = f", cast={self.cast!r}" if self.cast != "fp32" else ""
        return super().extra_repr() + offset + cast


class LayerNorm(nn.LayerNorm):
    """y = (x − mean(x)) / √(var(x) + ε) · γ + β, over the trailing dimensions `normalized_shape`.

    A subclass of torch.nn.LayerNorm that takes the same arguments, loads its state dicts and has the same repr.

    Args:
        normalized_shape: the size or sizes of the trailing dimensions, each ≥ 1.
        eps: ε ≥ 0; None means the machine epsilon of the compute dtype.
        elementwise_affine: whether there are a gain γ and a bias β.
        bias: whether there is a β in addition to γ.

    Shape: ``(..., *normalized_shape)`` → the same, in the input's dtype.

    Raises:
        ConfigError: on construction, for a size below 1 or an ε out of range.
        InputError: on a call, if the input's shape does not end in `normalized_shape` or its dtype is not supported.

    Source: Ba, Kiros and Hinton 2016, arXiv 1607.06450.

    Example:
        >>> LayerNorm(4)(torch.tensor([2.0, 4.0, 6.0, 8.0])).detach()
        tensor([-1.3416, -0.4472,  0.4472,  1.3416])
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
                flatten_features(input, self.normalized_shape)  # raises a clearer message if the shape is wrong
                raise
        return layer_norm_over(input, self.normalized_shape, self.weight, self.bias, self.eps)

    __prepare_scriptable__ = refuse_scripting


class CRMSNorm(nn.Module):
    """y = x / √((Σx² + (Σx)²)/(d+1) + ε) · γ: RMSNorm of vectors with mean 0, stored without their last coordinate.

    The last of the d + 1 coordinates is −Σx, so it need not be stored.

    Args:
        width: d, the number of stored coordinates, ≥ 1.
        eps: ε ≥ 0; None means the machine epsilon of the compute dtype.

    Shape: (..., d) → the same, in the input's dtype.

    Raises:
        ConfigError, InputError: as `RMSNorm`.

    Source: Jiang, Gu, Zhu and Pan 2023, arXiv 2305.14858.

    Example:
        >>> CRMSNorm(3)(torch.tensor([1.0, 1.0, 1.0])).detach()  # the fourth coordinate is −3: RMS √((3 + 9)/4)
        tensor([0.5774, 0.5774, 0.5774])
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
    """y = g · x / ‖x‖ with one trainable scalar g, initialized to √d.

    With ε it is computed as y = (g/√d) · x / √(mean(x²) + ε): RMSNorm with the same gain for all features.

    Args:
        width: d ≥ 1.
        eps: ε ≥ 0; None means the machine epsilon of the compute dtype.

    Shape: (..., d) → the same, in the input's dtype.

    Raises:
        ConfigError, InputError: as `RMSNorm`.

    Source: Nguyen and Salazar 2019, arXiv 1910.05895.

    Example:
        >>> ScaleNorm(2)(torch.tensor([3.0, 4.0])).detach()  # √2 · 3/5 and √2 · 4/5
        tensor([0.8485, 1.1314])
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
        """Set g to √d, with which the norm equals RMSNorm without a gain."""
        nn.init.constant_(self.scale, math.sqrt(self.width))

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Proxy) and (y := record_leaf(self, ScaleNorm, x)) is not None:
            return y
        return scale_norm(x, self.scale, self.width, self.eps)

    __prepare_scriptable__ = refuse_scripting

    def extra_repr(self) -> str:
        return f"{self.width}, eps={self.eps}"


# torch.fx copies the annotations of `forward` into the code that it generates, where they must be types, not strings.
for _norm in (RMSNorm, LayerNorm, CRMSNorm, ScaleNorm):
    _norm.forward.__annotations__ = get_type_hints(_norm.forward)

# The modules' arithmetic as functions. torch.fx records each as one node where the module can't be a leaf -----------


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
    # Divided by the largest element times a power of two above d, so that no sum over the row can overflow.
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
