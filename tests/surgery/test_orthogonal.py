"""Rotations are orthogonal, Hadamard where they claim it, and refused for widths without a known matrix."""

from __future__ import annotations

import pytest
import torch

from omninorm.errors import ConfigError
from omninorm.surgery.orthogonal import hadamard_factors, rotation

MODELS = (576, 768, 896, 960, 1152, 1536, 2048, 2304, 2560, 3072, 3584, 4096, 5120, 7168, 8192)


def matrix(kind: str, width: int, seed: int = 0) -> torch.Tensor:
    return rotation(kind, width, seed)(torch.eye(width, dtype=torch.float64)).T


# Sylvester's, Paley's first (12, 20, 28), his second (28, 36), and products of these.
@pytest.mark.parametrize("width", [1, 2, 4, 12, 20, 24, 28, 36, 44, 60, 80, 128, 168, 576])
def test_hadamard_matrix_is_orthogonal_with_elements_of_one_size(width: int) -> None:
    found = matrix("hadamard", width)
    rounding = (width + 8) * torch.finfo(torch.float64).eps  # of sums with as many terms
    assert float((found @ found.T - torch.eye(width)).abs().max()) < rounding
    assert float((found.abs() - width**-0.5).abs().max()) < 1e-15


@pytest.mark.parametrize("width", [1, 7, 52])
def test_random_matrix_is_orthogonal(width: int) -> None:
    found = matrix("random", width)
    assert float((found @ found.T - torch.eye(width)).abs().max()) < 1e-14


@pytest.mark.parametrize("kind", ["hadamard", "random"])
def test_inverse_undoes_a_rotation_of_any_shape(kind: str) -> None:
    turn = rotation(kind, 12)
    x = torch.randn(2, 3, 12, dtype=torch.float64)
    assert torch.allclose(turn.inverse(turn(x)), x, atol=1e-14)
    assert torch.allclose(turn(x), x @ matrix(kind, 12).T, atol=1e-14)


@pytest.mark.parametrize("kind", ["hadamard", "random"])
def test_seed_draws_another_rotation(kind: str) -> None:
    assert torch.equal(matrix(kind, 12, 3), matrix(kind, 12, 3))
    assert not torch.equal(matrix(kind, 12, 3), matrix(kind, 12, 4))


def test_vector_of_equal_features_is_not_an_outlier_after_a_rotation() -> None:
    """Sylvester's first row alone would collect all of it in one feature."""
    turned = rotation("hadamard", 1024)(torch.ones(1024, dtype=torch.float64))
    assert float(turned.abs().max()) < 6


@pytest.mark.parametrize("width", MODELS)
def test_widths_of_common_models_have_a_hadamard_matrix(width: int) -> None:
    factors = hadamard_factors(width)
    assert factors is not None
    assert torch.tensor([len(factor) for factor in factors]).prod() == width


@pytest.mark.parametrize("width", [3, 6, 52, 92, 2 * 17])
def test_width_without_a_matrix_is_refused_with_the_remedy(width: int) -> None:
    """Hadamard matrices have widths 1, 2 and multiples of 4; 52 and 92 need other constructions."""
    with pytest.raises(ConfigError, match=f'width {width} .*Pass kind="random"'):
        rotation("hadamard", width)


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="hadamard, random"):
        rotation("givens", 4)
