"""Errors of a norm's results and gradients against the oracle, as shares of the allowed errors. Needs torch only."""

from __future__ import annotations

import torch
from helpers import oracle
from torch import Tensor

from omninorm import functional

EPS = 1e-6


def rms_norm(x: Tensor, weight: Tensor | None, dy: Tensor, gain_offset: float = 0.0) -> dict[str, float]:
    """Return the largest error of y, dx and dγ as a share of the allowed one: NaN, or at most 1 if it is right."""
    x, exact_x = x.detach().requires_grad_(), oracle.double(x)
    weight = None if weight is None else weight.detach().requires_grad_()
    exact_weight = oracle.double(weight)
    eps = oracle.rounded_eps(EPS, x.dtype)
    y = functional.rms_norm(x, weight, EPS, gain_offset=gain_offset)
    expected = oracle.rms_norm(exact_x, exact_weight, eps, gain_offset)
    assert y.dtype == x.dtype
    y.backward(dy)
    expected.backward(dy.double())
    normed = oracle.rms_norm(exact_x, None, eps).detach()
    g = dy.double() if weight is None else dy.double() * (exact_weight.detach() + gain_offset)
    r = torch.rsqrt(exact_x.detach().square().mean(-1, keepdim=True) + eps)
    terms = r * (g.abs() + normed.abs() * (g * normed).abs().mean(-1, keepdim=True))
    assert x.grad.dtype == x.dtype
    shares = {
        "y": oracle.forward_share(y.detach(), expected.detach()),
        "dx": oracle.input_gradient_share(x.grad, exact_x.grad, terms),
    }
    if weight is not None:
        assert weight.grad.dtype == weight.dtype
        no_floor = torch.zeros_like(normed)
        shares["dgain"] = oracle.gain_gradient_share(
            weight.grad, exact_weight.grad, dy.double() * normed, no_floor, oracle.compute_dtype(x.dtype)
        )
    return {name: float(share) for name, share in shares.items()}


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, dy: Tensor) -> dict[str, float]:
    """Return the same for y, dx, dγ and dβ."""
    x, exact_x = x.detach().requires_grad_(), oracle.double(x)
    weight, bias = (None if gain is None else gain.detach().requires_grad_() for gain in (weight, bias))
    exact_weight, exact_bias = oracle.double(weight), oracle.double(bias)
    eps = oracle.rounded_eps(EPS, x.dtype)
    y = functional.layer_norm(x, weight, bias, EPS)
    expected = oracle.layer_norm(exact_x, exact_weight, exact_bias, eps)
    assert y.dtype == x.dtype
    y.backward(dy)
    expected.backward(dy.double())
    normed = oracle.layer_norm(exact_x, None, None, eps).detach()
    g = dy.double() if weight is None else dy.double() * exact_weight.detach()
    deviation = exact_x.detach() - exact_x.detach().mean(-1, keepdim=True)
    r = torch.rsqrt(deviation.square().mean(-1, keepdim=True) + eps)
    terms = r * (g.abs() + g.abs().mean(-1, keepdim=True) + normed.abs() * (g * normed).abs().mean(-1, keepdim=True))
    shares = {
        "y": oracle.forward_share(y.detach(), expected.detach()),
        "dx": oracle.input_gradient_share(x.grad, exact_x.grad, terms),
    }
    compute = oracle.compute_dtype(x.dtype)
    if weight is not None:
        shares["dgain"] = oracle.gain_gradient_share(
            weight.grad, exact_weight.grad, dy.double() * normed, dy.double(), compute
        )
    if bias is not None:
        assert bias.grad.dtype == bias.dtype
        no_floor = torch.zeros_like(normed)
        shares["dbias"] = oracle.gain_gradient_share(bias.grad, exact_bias.grad, dy.double(), no_floor, compute)
    return {name: float(share) for name, share in shares.items()}
