"""The casting orders, against the implementations that they are named after.

In 16-bit dtypes within one ulp of the peer. In float32 the peers' own sums of squares are off by several ulp, ours are not
(C++ adds beyond float32), so the test there is that ours is no further from the float64 value than the peer is.
"""

import pytest
import torch
from helpers import oracle
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

import omninorm

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def assert_like_the_peer(y: torch.Tensor, peer: torch.Tensor, exact: torch.Tensor | None = None) -> None:
    assert y.dtype == peer.dtype
    ulp = oracle.ulp(peer.double().abs(), y.dtype)
    if y.dtype == torch.float32 and exact is not None:
        ours, theirs = (((each.double() - exact).abs() / ulp).max() for each in (y, peer))
        assert ours <= theirs + 0.5
        assert theirs <= 8  # else the peer computes something else
    else:
        assert ((y.double() - peer.double()).abs() <= ulp).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("peer_class", [LlamaRMSNorm, Qwen3RMSNorm])
def test_llama_cast_equals_llama_and_qwen(peer_class, dtype: torch.dtype) -> None:
    peer = peer_class(768, eps=1e-5).to(dtype)
    peer.weight.data.copy_(torch.randn(768))
    norm = omninorm.RMSNorm(768, 1e-5, dtype=dtype, cast="llama")
    norm.load_state_dict(peer.state_dict())
    x = torch.randn(50, 768).to(dtype)
    exact = oracle.rms_norm(x.double(), peer.weight.double(), norm.eps, norm.gain_offset)
    assert_like_the_peer(norm(x), peer(x), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gain_offset_equals_gemma(dtype: torch.dtype) -> None:
    peer = GemmaRMSNorm(768, eps=1e-6).to(dtype)
    peer.weight.data.copy_(torch.randn(768))
    norm = omninorm.RMSNorm(768, 1e-6, dtype=dtype, gain_offset=1.0)
    norm.load_state_dict(peer.state_dict())
    x = torch.randn(50, 768).to(dtype)
    exact = oracle.rms_norm(x.double(), peer.weight.double(), norm.eps, norm.gain_offset)
    assert_like_the_peer(norm(x), peer(x), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_default_cast_equals_torch(dtype: torch.dtype) -> None:
    peer = torch.nn.RMSNorm(768, 1e-5, dtype=dtype)
    peer.weight.data.copy_(torch.randn(768))
    norm = omninorm.RMSNorm(768, 1e-5, dtype=dtype)
    norm.load_state_dict(peer.state_dict())
    x = torch.randn(50, 768).to(dtype)
    exact = oracle.rms_norm(x.double(), peer.weight.double(), norm.eps, norm.gain_offset)
    assert_like_the_peer(norm(x), peer(x), exact)


def test_the_rounding_orders_differ_in_16_bits() -> None:
    """Otherwise the tests above could not distinguish them."""
    x, weight = torch.randn(50, 768).bfloat16(), torch.randn(768).bfloat16()
    llama = omninorm.functional.rms_norm(x, weight, cast="llama")
    assert not torch.equal(llama, omninorm.functional.rms_norm(x, weight))
    y, expected = llama.double(), oracle.rms_norm(x.double(), None, 1e-6).bfloat16().double() * weight.double()
    assert_like_the_peer(y.bfloat16(), expected.bfloat16())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_module_passes_cast_to_the_function(dtype: torch.dtype) -> None:
    """One ulp can't distinguish the orders, but the share of equal values can: nearly all, or about two thirds."""
    peer = LlamaRMSNorm(768, eps=1e-5).to(dtype)
    peer.weight.data.copy_(torch.randn(768))
    x = torch.randn(50, 768).to(dtype)
    shares = {}
    for cast in ("llama", "fp32"):
        norm = omninorm.RMSNorm(768, 1e-5, dtype=dtype, cast=cast)
        norm.load_state_dict(peer.state_dict())
        shares[cast] = (norm(x) == peer(x)).double().mean().item()
    assert shares["llama"] > 0.99
    assert shares["fp32"] < 0.9


def test_llamas_order_has_finite_second_derivatives_in_float16() -> None:
    """They must not pass through float16, where they would overflow. The rounding counts as the identity."""
    x = (torch.randn(2, 4) * 1000).half().requires_grad_()
    weight, dy = torch.ones(4, requires_grad=True), torch.full((2, 4), 300.0).half()
    results = []
    for cast in ("fp32", "llama"):
        y = omninorm.functional.rms_norm(x, weight, cast=cast)
        (dweight,) = torch.autograd.grad(y, weight, dy, create_graph=True)
        results += torch.autograd.grad((dweight * torch.tensor([1e3, -1e3, 1e3, -1e3])).sum(), x)
    assert results[1].isfinite().all()
    torch.testing.assert_close(results[1], results[0], rtol=2e-3, atol=0.5)


def test_llamas_gain_gradient_uses_the_rounded_vector() -> None:
    x, dy = torch.randn(20, 16).bfloat16(), torch.randn(20, 16).bfloat16()
    weight = torch.randn(16, requires_grad=True)
    omninorm.functional.rms_norm(x, weight, cast="llama").backward(dy)
    terms = dy.double() * oracle.rms_norm(x.double(), None, 1e-6).bfloat16().double()
    oracle.assert_gain_gradient(weight.grad, terms.sum(0), terms, torch.zeros_like(terms), torch.float32)
