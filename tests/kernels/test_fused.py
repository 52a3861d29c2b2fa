"""The back end "torch": PyTorch's norm operators against float64, what they refuse, and where they are the choice."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers.norm_checks import DTYPES, check_layer_norm, check_rms_norm, spread
from torch import Tensor
from torch._subclasses import FakeTensorMode

import omninorm
from omninorm import functional
from omninorm.errors import InputError
from omninorm.kernels import dispatch, gpu, measured

SHAPES = [(3, 64), (2, 5, 33), (1, 1000), (300, 48), (7,)]


@pytest.fixture
def by_torch() -> Iterator[None]:
    with omninorm.use_backend("torch"):
        yield


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_gains", [True, False], ids=["gains", "no gains"])
def test_results_and_gradients_match_float64(
    by_torch, shape: tuple[int, ...], dtype: torch.dtype, has_gains: bool
) -> None:
    x, dy = spread(*shape, dtype=dtype), torch.randn(shape).to(dtype)
    weight, bias = ((torch.randn(shape[-1]) + 1).to(dtype) if has_gains else None for _ in range(2))
    check_rms_norm(x, weight, dy)
    check_layer_norm(x, weight, bias, dy)


def test_second_derivatives_are_right(by_torch) -> None:
    x, weight, bias = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in [(2, 5), (5,), (5,)])
    assert torch.autograd.gradgradcheck(functional.rms_norm, (x, weight))
    assert torch.autograd.gradgradcheck(functional.layer_norm, (x, weight, bias))


def test_autocast_keeps_the_dtype(by_torch) -> None:
    """torch.nn.functional's norms return float32 under autocast."""
    x, weight = torch.randn(2, 8).bfloat16(), torch.ones(8).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert functional.rms_norm(x, weight).dtype == torch.bfloat16
        assert functional.layer_norm(x, weight, weight).dtype == torch.bfloat16


X = torch.ones(2, 4)
HALF = X.bfloat16()
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "Llama's rounding order": (lambda: functional.rms_norm(X, cast="llama"), "no rounding order 'llama'"),
    "an offset of 16-bit gains": (
        lambda: functional.rms_norm(HALF, HALF[0], gain_offset=1.0),
        "round the sum of gain and offset to bfloat16",
    ),
    "a float32 gain of 16-bit rows": (lambda: functional.rms_norm(HALF, X[0]), "x's dtype, bfloat16, not float32"),
    "a float32 bias of 16-bit rows": (lambda: functional.layer_norm(HALF, HALF[0], X[0]), "not float32"),
    "a float32 gain after an addition": (lambda: functional.add_rms_norm(HALF, HALF, X[0]), "not float32"),
    "an empty batch": (lambda: functional.layer_norm(X[:0]), "1 to 2,147,483,647 elements"),
    "torch.func": (lambda: torch.func.vmap(functional.rms_norm)(X), "not used in torch.func"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_its_operators_lack_is_refused_with_the_reason(by_torch, name: str) -> None:
    call, reason = REFUSED[name]
    with pytest.raises(InputError, match="'torch' can't compute this norm") as caught:
        call()
    assert reason in caught.value.invariant


def test_an_offset_is_added_in_float32(by_torch) -> None:
    weight = torch.randn(4)
    expected = X * (weight + 1.0)
    torch.testing.assert_close(functional.rms_norm(X, weight, 0.0, gain_offset=1.0), expected)


# The choice on GPUs, by tensors without values ------------------------------------------------------------------


def on_gpu(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU whose tensors have no values, with Triton."""
    monkeypatch.setattr(dispatch, "PLAIN", dispatch.TRACED)
    monkeypatch.setattr(gpu, "unavailable", lambda: "")
    monkeypatch.setattr(measured, "device_name", lambda device: "NVIDIA H100 80GB HBM3")
    with FakeTensorMode():
        yield


def test_pytorchs_operators_are_the_choice_until_ours_are_measured_to_be_better(fake_gpu) -> None:
    chosen = omninorm.backend_for(on_gpu(3, 8), on_gpu(8))
    assert chosen.name == "torch"
    assert "the default 'torch': on no GPU was another measured to be better" in chosen.reason
    assert omninorm.backend_for(on_gpu(3, 8), on_gpu(8), on_gpu(8), operator="layer_norm").name == "torch"


@pytest.mark.parametrize(
    ("options", "dtype", "reason"),
    [
        ({"cast": "llama"}, torch.bfloat16, "'llama'"),
        ({"gain_offset": 1.0}, torch.bfloat16, "sum of gain and offset"),
        ({}, torch.float32, "gains of x's dtype"),
    ],
)
def test_what_pytorchs_operators_lack_is_computed_by_triton(
    fake_gpu, monkeypatch, options: dict[str, Any], dtype: torch.dtype, reason: str
) -> None:
    chosen = omninorm.backend_for(on_gpu(3, 8), on_gpu(8, dtype=dtype), **options)
    assert chosen.name == "triton"
    assert reason in chosen.reason
    monkeypatch.setattr(gpu, "unavailable", lambda: "Triton is not installed")
    with pytest.warns(UserWarning, match="several times slower without Triton"):
        assert omninorm.backend_for(on_gpu(3, 8), on_gpu(8, dtype=dtype), **options).name == "reference"
    dispatch._warn.cache_clear()


def test_explained_choice_names_a_requested_back_end() -> None:
    with omninorm.use_backend("torch"):
        assert omninorm.backend_for(X) == dispatch.Backend("torch", True, "use_backend('torch')")
    assert omninorm.backend_for(X).name != "torch"
    assert "GPUs only" in omninorm.backend_for(X).reason


# On a GPU --------------------------------------------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU")


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_and_gradients_on_a_gpu_match_float64(dtype: torch.dtype) -> None:
    for shape in SHAPES:
        x, dy = spread(*shape, dtype=dtype).cuda(), torch.randn(shape).to(dtype).cuda()
        weight, bias = ((torch.randn(shape[-1]) + 1).to(dtype).cuda() for _ in range(2))
        assert omninorm.backend_for(x, weight).name == "torch"
        check_rms_norm(x, weight, dy)
        check_layer_norm(x, weight, bias, dy)


@needs_gpu
def test_second_derivatives_on_a_gpu_are_right() -> None:
    x, weight = (torch.randn(shape, dtype=torch.float64, device="cuda", requires_grad=True) for shape in [(2, 5), (5,)])
    assert torch.autograd.gradgradcheck(functional.rms_norm, (x, weight))
    assert torch.autograd.gradgradcheck(functional.layer_norm, (x, weight, weight.detach()))
