"""Normalization without statistics: DynamicTanh and DynamicErf squash each element by itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn

from omninorm.config import check_number
from omninorm.functional import check_device, check_rows
from omninorm.kernels.reference import compute_dtype
from omninorm.layers.shape import flatten_features, read_shape


class Pointwise(nn.Module, ABC):
    """y = γ · squash(α x) + β: what DynamicTanh and DynamicErf share."""

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        alpha: float = 0.5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_number("alpha", alpha, above=0.0)
        self.normalized_shape = read_shape(normalized_shape)
        self.first_alpha = alpha
        self.alpha = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.weight = nn.Parameter(torch.empty(self.normalized_shape, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(self.normalized_shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets α to its first value, γ to 1 and β to 0."""
        nn.init.constant_(self.alpha, self.first_alpha)
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def scaled(self, x: Tensor) -> Tensor:
        """α x. α is expanded first, so that its gradient gathers by columns, in one order at any thread count."""
        return self.alpha.to(x.dtype).expand(x.shape[-1]) * x

    @abstractmethod
    def squash(self, x: Tensor) -> Tensor:
        """The bounded function of α x, elementwise."""

    def forward(self, x: Tensor) -> Tensor:
        flatten_features(x, self.normalized_shape)
        check_rows(x)
        check_device("weight", self.weight, x)
        wide = x.to(compute_dtype(x.dtype))
        y = self.weight.to(wide.dtype) * self.squash(wide) + self.bias.to(wide.dtype)
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}"


@final
class DynamicTanh(Pointwise):
    """y = γ · tanh(α x) + β, with one α for all features.

    Args:
        normalized_shape: the size or sizes of the trailing dimensions, each ≥ 1; the shape of γ and β.
        alpha: α's first value, > 0.

    Shape: ``(..., *normalized_shape)`` → the same, in the input's dtype; computed in float32 (float64 for float64).

    Raises:
        ConfigError: on construction, for a size below 1 or an α out of range.
        InputError: on a call, for an input that does not fit.

    Source: Zhu, Chen, He, LeCun and Liu 2025, arXiv 2503.10622.
    """

    def squash(self, x: Tensor) -> Tensor:
        return torch.tanh(self.scaled(x))


@final
class DynamicErf(Pointwise):
    """y = γ · erf(α x + s) + β, with one α and one shift s for all features; s starts at 0.

    Arguments, shapes and errors as `DynamicTanh`.

    Source: Derf, "Stronger Normalization-Free Transformers", arXiv 2512.10938.
    """

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
        """Sets α to its first value, γ to 1, β and s to 0."""
        super().reset_parameters()
        if hasattr(self, "shift"):
            nn.init.zeros_(self.shift)

    def squash(self, x: Tensor) -> Tensor:
        return torch.erf(self.scaled(x) + self.shift.to(x.dtype).expand(x.shape[-1]))
