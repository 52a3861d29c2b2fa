"""The two feed-forwards against their formulas, with and without the norm on the hidden activation."""

import math

import pytest
import torch

from omninorm.config import NormConfig
from omninorm.thinker import ThinkerConfig
from omninorm.thinker.feed_forward import GELU, SwiGLU, build_feed_forward


def layer_norm(h, norm):
    centred = h - h.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias


@pytest.mark.parametrize("placement", ["pre", "normformer"])
@pytest.mark.parametrize(("kind", "cls"), [("swiglu", SwiGLU), ("gelu", GELU)])
def test_feed_forward_is_its_formula(kind, cls, placement):
    config = ThinkerConfig(d_model=8, d_ff=12, feed_forward=kind, norm=NormConfig("layernorm", placement))
    module = build_feed_forward(config).double()
    assert isinstance(module, cls)
    assert module.inner_norms == ({"hidden"} if placement == "normformer" else set())
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter))
        x = torch.randn(3, 5, 8, dtype=torch.float64)
        up = x @ module.up.weight.T
        if kind == "swiglu":
            gate = x @ module.gate.weight.T
            hidden = gate / (1 + torch.exp(-gate)) * up
        else:
            hidden = up * 0.5 * (1 + torch.erf(up / math.sqrt(2)))
        if placement == "normformer":
            hidden = layer_norm(hidden, module.hidden_norm)
        torch.testing.assert_close(module(x), hidden @ module.down.weight.T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("kind", "names"), [("swiglu", {"up", "gate", "down"}), ("gelu", {"up", "down"})])
def test_the_weights_have_their_names(kind, names):
    module = build_feed_forward(ThinkerConfig(feed_forward=kind))
    assert set(module.state_dict()) == {f"{name}.weight" for name in names}
