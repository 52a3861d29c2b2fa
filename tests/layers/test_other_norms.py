"""CRMSNorm, ScaleNorm, DynamicTanh and DynamicErf against their formulas in float64, and the builder."""

import math

import pytest
import torch
from helpers import oracle
from helpers.norm_checks import on_threads
from torch import Tensor, nn

import omninorm
from omninorm import NormConfig
from omninorm.config import NORMALIZATIONS
from omninorm.errors import ConfigError
from omninorm.layers import NORM_TYPES, build_norm

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def shaken(norm: nn.Module) -> nn.Module:
    """Away from its initial values, so that no gain is missed."""
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.mul_(torch.rand_like(parameter) + 0.5).add_(0.1)
    return norm


def crmsnorm(x: Tensor, p: dict[str, Tensor], eps: float) -> Tensor:
    full = torch.cat((x, -x.sum(-1, keepdim=True)), -1)
    return full[..., :-1] / torch.sqrt((full * full).mean(-1, keepdim=True) + eps) * p["weight"]


def scalenorm(x: Tensor, p: dict[str, Tensor], eps: float) -> Tensor:
    return p["scale"] * x / torch.sqrt((x * x).sum(-1, keepdim=True) + eps * x.shape[-1])


def dyt(x: Tensor, p: dict[str, Tensor], eps: float) -> Tensor:
    return p["weight"] * torch.tanh(p["alpha"] * x) + p["bias"]


def derf(x: Tensor, p: dict[str, Tensor], eps: float) -> Tensor:
    return p["weight"] * torch.erf(p["alpha"] * x + p["shift"]) + p["bias"]


FORMULAS = {
    omninorm.CRMSNorm: crmsnorm,
    omninorm.ScaleNorm: scalenorm,
    omninorm.DynamicTanh: dyt,
    omninorm.DynamicErf: derf,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm_type", FORMULAS)
def test_formula_and_gradients(norm_type, dtype: torch.dtype) -> None:
    """The results of two float64 evaluations for float64; elsewhere one rounding to the dtype at the end."""
    norm = shaken(norm_type(24, dtype=dtype))
    x = torch.randn(3, 5, 24).to(dtype).requires_grad_()
    exact = {name: p.detach().double().requires_grad_() for name, p in norm.named_parameters()}
    exact_x = oracle.double(x)
    y, expected = norm(x), FORMULAS[norm_type](exact_x, exact, 1e-6)
    assert y.dtype == dtype
    oracle.assert_forward(y.detach(), expected.detach())
    dy = torch.randn(3, 5, 24).to(dtype)
    y.backward(dy)
    expected.backward(dy.double())
    # The arithmetic is in the compute dtype: a handful of roundings of terms of order 1, 360 of them in a sum. Then
    # one rounding to the dtype: half an epsilon, relative.
    compute, rtol = torch.finfo(oracle.compute_dtype(dtype)).eps, torch.finfo(dtype).eps
    torch.testing.assert_close(x.grad.double(), exact_x.grad, rtol=rtol, atol=40 * compute)
    for name, parameter in norm.named_parameters():
        torch.testing.assert_close(parameter.grad.double(), exact[name].grad, rtol=rtol, atol=400 * compute)


@pytest.mark.parametrize("norm_type", [omninorm.CRMSNorm, omninorm.ScaleNorm])
@pytest.mark.parametrize("gain_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_eps_and_gains_of_another_dtype(norm_type, gain_dtype: torch.dtype) -> None:
    norm = shaken(norm_type(24, 0.5, dtype=gain_dtype))
    x = torch.randn(7, 24).bfloat16()
    exact = {name: parameter.detach().double() for name, parameter in norm.named_parameters()}
    oracle.assert_forward(norm(x).detach(), FORMULAS[norm_type](x.double(), exact, 0.5))


@pytest.mark.parametrize("scale", [1e37, 1e38, 1e-42])
def test_crmsnorm_of_the_largest_and_smallest_rows(scale: float) -> None:
    """All of one sign, so that their sum has no float32."""
    norm = omninorm.CRMSNorm(100, 0.0)
    x = torch.randn(4, 100).abs().clamp(0.1, 3) * scale
    expected = crmsnorm(x.double(), {"weight": torch.ones(100, dtype=torch.float64)}, 0.0)
    oracle.assert_forward(norm(x).detach(), expected)


def test_crmsnorm_is_lossless() -> None:
    """RMSNorm of a zero-mean vector, and CRMSNorm of all but its last coordinate: the same numbers."""
    full = torch.randn(6, 17, dtype=torch.float64)
    full = full - full.mean(-1, keepdim=True)
    kept = omninorm.CRMSNorm(16, dtype=torch.float64)(full[:, :-1])
    torch.testing.assert_close(kept, omninorm.functional.rms_norm(full)[:, :-1])


def test_initial_values() -> None:
    assert omninorm.ScaleNorm(16).scale.item() == math.sqrt(16)
    tanh, erf = omninorm.DynamicTanh((2, 3)), omninorm.DynamicErf(4)
    assert (tanh.alpha.item(), erf.alpha.item(), erf.shift.item()) == (0.5, 0.5, 0.0)
    assert torch.equal(tanh.weight, torch.ones(2, 3))
    assert torch.equal(tanh.bias, torch.zeros(2, 3))
    with pytest.raises(ConfigError, match="alpha must be a finite number > 0, got 0"):
        omninorm.DynamicTanh(4, alpha=0)
    x = torch.randn(3, 16)
    torch.testing.assert_close(omninorm.ScaleNorm(16)(x), omninorm.RMSNorm(16, 1e-6)(x))


@pytest.mark.parametrize("kind", NORMALIZATIONS)
def test_every_kind_is_built(kind: str) -> None:
    norm = build_norm(NormConfig(normalization=kind, norm_eps=1e-3), 12, dtype=torch.float64)
    x = torch.randn(2, 12, dtype=torch.float64)
    y = norm(x)
    assert y.shape == x.shape
    if kind == "none":
        assert torch.equal(y, x)
        return
    assert type(norm) in NORM_TYPES or isinstance(norm, NORM_TYPES)
    assert {p.dtype for p in norm.parameters()} == {torch.float64}
    if kind not in ("dyt", "derf"):
        assert norm.eps == 1e-3


@pytest.mark.parametrize("kind", [kind for kind in NORMALIZATIONS if kind != "none"])
def test_every_kind_is_built_on_a_device(kind: str) -> None:
    norm = build_norm(NormConfig(normalization=kind), 12, device="meta")
    assert {parameter.device.type for parameter in norm.parameters()} == {"meta"}
    assert "12" in repr(norm)


def test_alpha_starts_at_the_constructors_value() -> None:
    x = torch.randn(5, 4)
    torch.testing.assert_close(omninorm.DynamicTanh(4, alpha=0.9)(x), torch.tanh(0.9 * x))
    torch.testing.assert_close(omninorm.DynamicErf(4, alpha=0.9)(x), torch.erf(0.9 * x))


def test_norms_of_torch_are_norm_types() -> None:
    assert isinstance(nn.LayerNorm(2), NORM_TYPES)
    assert isinstance(nn.RMSNorm(2), NORM_TYPES)


def test_build_norm_passes_gain_offset_and_cast() -> None:
    norm = build_norm(NormConfig(gain_offset=1.0, cast="llama", norm_eps=None), 4)
    assert isinstance(norm, omninorm.RMSNorm)
    assert (norm.gain_offset, norm.cast, norm.eps) == (1.0, "llama", None)
    with pytest.raises(ConfigError, match="integers ≥ 1"):
        build_norm(NormConfig(), 0)


@pytest.mark.parametrize("norm_type", [omninorm.CRMSNorm, omninorm.ScaleNorm, omninorm.DynamicTanh, omninorm.DynamicErf])  # fmt: skip
@pytest.mark.parametrize("shape", [(400, 500), (100_000, 2), (3, 20_000)], ids=str)
def test_every_number_of_threads_gives_the_same_gradients(norm_type, shape: tuple[int, int]) -> None:
    x, dy = torch.randn(shape), torch.randn(shape)

    def run() -> list[torch.Tensor]:
        norm = norm_type(shape[-1])
        return list(torch.autograd.grad(norm(x), list(norm.parameters()), dy))

    first, *others = on_threads(run, (1, 2, 3, 4, 2))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
