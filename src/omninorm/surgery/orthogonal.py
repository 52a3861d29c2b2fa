"""Orthogonal matrices for rotations: Hadamard matrices with random signs, and random ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from omninorm.errors import ConfigError

KINDS = ("hadamard", "random")
_LARGEST_FACTOR = 64  # of Sylvester's matrix: larger factors cost more multiplications, smaller ones more passes


@dataclass(frozen=True, eq=False)
class Rotation:
    """Q = (F₁ ⊗ F₂ ⊗ …)·diag(signs), orthogonal.

    Args:
        kind: "hadamard" or "random".
        factors: square float64 matrices.
        signs: (width,), each 1 or −1.
    """

    kind: str
    factors: tuple[Tensor, ...]
    signs: Tensor

    @property
    def width(self) -> int:
        return len(self.signs)

    def __call__(self, x: Tensor) -> Tensor:
        """Return Q x for each vector along the last dimension of x (..., width), in float64."""
        y, after = x * self.signs.to(x.device), self.width
        for factor in self.factors:
            after //= len(factor)
            split = y.reshape(-1, len(factor), after)
            y = (factor.to(x.device) @ split).reshape(x.shape)
        return y

    def inverse(self, x: Tensor) -> Tensor:
        """Return Qᵀ x, as above."""
        y, after = x, self.width
        for factor in self.factors:
            after //= len(factor)
            y = (factor.T.to(x.device) @ y.reshape(-1, len(factor), after)).reshape(x.shape)
        return y * self.signs.to(x.device)


@dataclass(frozen=True, eq=False)
class BlockRotation:
    """Rotations of some of the features of vectors.

    Args:
        rotations: width of a block → its rotation.
        places: width → (blocks, width), the features of each block.
    """

    rotations: Mapping[int, Rotation]
    places: Mapping[int, Tensor]

    @property
    def count(self) -> int:
        """The number of blocks."""
        return sum(len(each) for each in self.places.values())

    def __call__(self, x: Tensor, dim: int = -1) -> Tensor:
        """Return x with its features along `dim` rotated."""
        return self._apply(x, dim, inverse=False)

    def inverse(self, x: Tensor, dim: int = -1) -> Tensor:
        """Return x with its features along `dim` rotated back."""
        return self._apply(x, dim, inverse=True)

    def equals(self, other: BlockRotation) -> bool:
        """Return whether the other rotates the same features in the same way."""
        return self.places.keys() == other.places.keys() and all(
            torch.equal(self.places[width], other.places[width]) and self.rotations[width] is other.rotations[width]
            for width in self.places
        )

    def _apply(self, x: Tensor, dim: int, inverse: bool) -> Tensor:
        y = x.movedim(dim, -1).clone()
        for width, places in self.places.items():
            where, turn = places.to(x.device), self.rotations[width]
            y[..., where] = turn.inverse(y[..., where]) if inverse else turn(y[..., where])
        return y.movedim(-1, dim)


def rotation(kind: str, width: int, seed: int = 0) -> Rotation:
    """Return a rotation of this width.

    "hadamard" is a Hadamard matrix divided by √width, with the sign of each column drawn from the seed: every feature
    is spread equally over all others, and a vector of equal features does not become an outlier. "random" is drawn
    uniformly from all orthogonal matrices.

    Args:
        kind: "hadamard" or "random".
        width: of the vectors, at least 1.
        seed: of the signs or the matrix.

    Raises:
        ConfigError: an unknown kind, or a width for which no Hadamard matrix is known here.

    Example:
        >>> turn = rotation("hadamard", 12)
        >>> x = torch.ones(12, dtype=torch.float64)
        >>> torch.allclose(turn.inverse(turn(x)), x)
        True
    """
    if kind not in KINDS:
        raise ConfigError(f"kind must be one of {', '.join(KINDS)}", f"{kind!r:.80}", "choose one of them")
    generator = torch.Generator().manual_seed(seed)
    if kind == "random":
        q, r = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64, generator=generator))
        return Rotation(kind, (q * r.diagonal().sign(),), torch.ones(width, dtype=torch.float64))
    factors = hadamard_factors(width)
    if factors is None:
        problem = f"No Hadamard matrix of width {width} is built by Paley's construction from a prime"
        raise ConfigError(problem, "", 'pass kind="random"')
    signs = torch.randint(0, 2, (width,), generator=generator).double() * 2 - 1
    return Rotation(kind, tuple(factor / math.sqrt(len(factor)) for factor in factors), signs)


def hadamard_factors(width: int) -> list[Tensor] | None:
    """Return Hadamard matrices whose Kronecker product has this width, or None if none is built here.

    The width must be 2ᵏ·m for a k ≥ 0 and an m that is 1, or q + 1 for a prime q ≡ 3 (mod 4), or 2(q + 1) for a prime
    q ≡ 1 (mod 4): Sylvester's doublings of one of Paley's matrices.
    """
    doublings = (width & -width).bit_length() - 1
    for count in range(doublings, -1, -1):
        base = _paley(width >> count)
        if base is not None:
            return [*_sylvester(2**count), *([base] if len(base) > 1 else [])] or [base]
    return None


def _sylvester(width: int) -> list[Tensor]:
    """Return factors of Sylvester's matrix."""
    factors = []
    while width > 1:
        size, factor = min(width, _LARGEST_FACTOR), torch.ones(1, 1, dtype=torch.float64)
        while len(factor) < size:
            factor = torch.kron(factor, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64))
        factors.append(factor)
        width //= size
    return factors


def _paley(width: int) -> Tensor | None:
    """Return Paley's Hadamard matrix of this width from a prime, or None."""
    if width == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if width % 4:
        return None
    if _is_prime(width - 1) and (width - 1) % 4 == 3:
        conference = _bordered(width - 1, -1.0)
        return conference + torch.eye(width, dtype=torch.float64)
    if _is_prime(width // 2 - 1) and (width // 2 - 1) % 4 == 1:
        conference = _bordered(width // 2 - 1, 1.0)
        pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        other = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(conference, pair) + torch.kron(torch.eye(width // 2, dtype=torch.float64), other)
    return None


def _bordered(prime: int, left: float) -> Tensor:
    """Return Paley's conference matrix C of order prime + 1: zeros on the diagonal, ±1 elsewhere, C Cᵀ = prime·I."""
    squares = {number * number % prime for number in range(1, prime)}
    residue = torch.tensor([0.0] + [1.0 if number in squares else -1.0 for number in range(1, prime)])
    places = torch.arange(prime)
    matrix = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    matrix[0, 1:], matrix[1:, 0] = 1.0, left
    matrix[1:, 1:] = residue[(places[:, None] - places) % prime]
    return matrix


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))
