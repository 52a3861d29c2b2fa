"""RMSNorm and LayerNorm, drop-in for torch.nn's, and their relatives CRMSNorm and ScaleNorm."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from omninorm import functional
from omninorm.config import CASTS, LARGEST, check_choice, check_count, check_number
from omninorm.errors import InputError
from omninorm.kernels import reference
from omninorm.layers.shape import flatten_features, flatten_gain, read_eps, read_shape


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
        check_number("gain_offset", gain_offset, at_least=-LARGEST, at_most=LARGEST)
        check_choice("cast", cast, CASTS)
        # Before the base class, whose constructor calls reset_parameters.
        self.gain_offset = float(gain_offset)
        self.cast = cast
        super().__init__(list(read_shape(normalized_shape)), read_eps(eps), elementwise_affine, device, dtype)

    def reset_parameters(self) -> None:
        """Sets γ so that the norm multiplies by 1."""
        if self.elementwise_affine:
            nn.init.constant_(self.weight, 1.0 - self.gain_offset)

    def forward(self, x: Tensor) -> Tensor:
        weight = self._parameters.get("weight")
        if weight is not None and len(self.normalized_shape) == 1:
            try:
                return functional.rms_norm(x, weight, self.eps, gain_offset=self.gain_offset, cast=self.cast)
            except InputError:
                flatten_features(x, self.normalized_shape)  # knows better what is wrong, if it is the shape
                raise
        rows = flatten_features(x, self.normalized_shape)
        gain = flatten_gain(self.weight)
        y = functional.rms_norm(rows, gain, self.eps, gain_offset=self.gain_offset, cast=self.cast)
        return y if rows is x else y.reshape(x.shape)

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
        weight, bias = self._parameters.get("weight"), self._parameters.get("bias")
        if weight is not None and bias is not None and len(self.normalized_shape) == 1:
            try:
                return functional.layer_norm(input, weight, bias, self.eps)
            except InputError:
                flatten_features(input, self.normalized_shape)  # knows better what is wrong, if it is the shape
                raise
        rows = flatten_features(input, self.normalized_shape)
        y = functional.layer_norm(rows, flatten_gain(self.weight), flatten_gain(self.bias), self.eps)
        return y if rows is input else y.reshape(input.shape)


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

    def __init__(
        self,
        width: int,
        eps: float | None = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_count("width", width)
        self.width = width
        self.eps = read_eps(eps)
        self.weight = nn.Parameter(torch.empty(self.width, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets γ to 1."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        flatten_features(x, (self.width,))
        functional.check_rows(x)
        functional.check_gain("weight", self.weight, x)
        rows = reference.as_rows(x).to(reference.compute_dtype(x.dtype))
        eps = reference.resolve_eps(self.eps, rows.dtype)
        # In units of the largest element times a power of two above d, no sum over the row can overflow.
        per_unit = reference.reciprocal_unit(rows, eps) / 2 ** self.width.bit_length()
        rows = rows * per_unit
        dropped = reference.ordered_sum(rows, 1)
        square = reference.ordered_sum(rows * rows, 1) + dropped * dropped
        normed = rows * torch.rsqrt(square / (self.width + 1) + eps * per_unit * per_unit)
        y: Tensor = normed * self.weight.to(rows.dtype)
        return y.to(x.dtype).reshape(x.shape)

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

    def __init__(
        self,
        width: int,
        eps: float | None = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_count("width", width)
        self.width = width
        self.eps = read_eps(eps)
        self.scale = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets g to √d, so that the norm is RMSNorm at first."""
        nn.init.constant_(self.scale, math.sqrt(self.width))

    def forward(self, x: Tensor) -> Tensor:
        rows = flatten_features(x, (self.width,))
        gain = self.scale.to(torch.promote_types(self.scale.dtype, torch.float32)) / math.sqrt(self.width)
        return functional.rms_norm(rows, gain.expand(self.width), self.eps)

    def extra_repr(self) -> str:
        return f"{self.width}, eps={self.eps}"
