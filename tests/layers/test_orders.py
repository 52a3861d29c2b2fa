"""The casting orders, against the implementations that they are named after: bitwise or one ulp."""

import oracle
import pytest
import torch
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

import omninorm

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def assert_within_one_ulp(y: torch.Tensor, peer: torch.Tensor) -> None:
    assert y.dtype == peer.dtype
    difference = (y.double() - peer.double()).abs()
    assert (difference <= oracle.ulp(peer.double().abs(), y.dtype)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("peer_class", [LlamaRMSNorm, Qwen3RMSNorm])
def test_llamas_order(peer_class, dtype: torch.dtype) -> None:
    peer = peer_class(768, eps=1e-5).to(dtype)
    peer.weight.data.copy_(torch.randn(768))
    norm = omninorm.RMSNorm(768, 1e-5, dtype=dtype, cast="llama")
    norm.load_state_dict(peer.state_dict())
    x = torch.randn(50, 768).to(dtype)
    assert_within_one_ulp(norm(x), peer(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gemmas_order(dtype: torch.dtype) -> None:
    peer = GemmaRMSNorm(768, eps=1e-6).to(dtype)
    peer.weight.data.copy_(torch.randn(768))
    norm = omninorm.RMSNorm(768, 1e-6, dtype=dtype, gain_offset=1.0)
    norm.load_state_dict(peer.state_dict())
    x = torch.randn(50, 768).to(dtype)
    assert_within_one_ulp(norm(x), peer(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torchs_order(dtype: torch.dtype) -> None:
    peer = torch.nn.RMSNorm(768, 1e-5, dtype=dtype)
    peer.weight.data.copy_(torch.randn(768))
    norm = omninorm.RMSNorm(768, 1e-5, dtype=dtype)
    norm.load_state_dict(peer.state_dict())
    x = torch.randn(50, 768).to(dtype)
    assert_within_one_ulp(norm(x), peer(x))


def test_the_orders_differ_where_they_should() -> None:
    """Otherwise the tests above could not tell them apart."""
    x, weight = torch.randn(50, 768).bfloat16(), torch.randn(768).bfloat16()
    llama = omninorm.functional.rms_norm(x, weight, cast="llama")
    assert not torch.equal(llama, omninorm.functional.rms_norm(x, weight))
    y, expected = llama.double(), oracle.rms_norm(x.double(), None, 1e-6).bfloat16().double() * weight.double()
    assert_within_one_ulp(y.bfloat16(), expected.bfloat16())


def test_llamas_gain_gradient_uses_the_rounded_vector() -> None:
    x, dy = torch.randn(20, 16).bfloat16(), torch.randn(20, 16).bfloat16()
    weight = torch.randn(16, requires_grad=True)
    omninorm.functional.rms_norm(x, weight, cast="llama").backward(dy)
    terms = dy.double() * oracle.rms_norm(x.double(), None, 1e-6).bfloat16().double()
    oracle.assert_gain_gradient(weight.grad, terms.sum(0), terms, torch.zeros_like(terms), torch.float32)
