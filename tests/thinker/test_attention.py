"""Attention against a literal loop over heads and positions, with every combination of inner norms."""

import math

import pytest
import torch

from omninorm.config import NormConfig
from omninorm.thinker import ThinkerConfig
from omninorm.thinker.attention import Attention
from omninorm.thinker.rotary import Rotary, rotate

INNER = {
    "pre": set(),
    "reordered": {"q", "k"},
    "hybrid": {"q", "k", "v"},
    "normformer": {"heads"},
}


def literal(attention, x, config):
    """One head and one query at a time."""
    batch, length, _ = x.shape
    h, group = config.head_width, config.n_heads // config.kv_heads
    rotation = Rotary(h, length, config.rope_theta)(0, length)
    q, k, v = (getattr(attention, name)(x).view(batch, length, -1, h) for name in "qkv")
    if "q" in attention.inner_norms:
        q, k = attention.q_norm(q), attention.k_norm(k)
    if "v" in attention.inner_norms:
        v = attention.v_norm(v)
    q, k = rotate(q, rotation), rotate(k, rotation)
    y = torch.zeros(batch, length, config.n_heads, h, dtype=x.dtype)
    for b in range(batch):
        for head in range(config.n_heads):
            gain = attention.head_gain[head] if "heads" in attention.inner_norms else 1.0
            for t in range(length):
                scores = k[b, : t + 1, head // group] @ q[b, t, head] / math.sqrt(h)
                y[b, t, head] = gain * (scores.softmax(0) @ v[b, : t + 1, head // group])
    return attention.out(y.reshape(batch, length, -1))


@pytest.mark.parametrize("placement", INNER)
@pytest.mark.parametrize(("n_kv_heads", "head_dim"), [(4, None), (2, None), (1, 6)])
def test_attention_is_its_formula(placement, n_kv_heads, head_dim):
    norm = NormConfig("layernorm", placement)
    config = ThinkerConfig(d_model=16, n_heads=4, n_kv_heads=n_kv_heads, head_dim=head_dim, norm=norm)
    attention = Attention(config).double()
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.copy_(torch.randn_like(parameter) + (parameter.ndim == 1))
    assert attention.inner_norms == INNER[placement]
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    with torch.no_grad():
        got = attention(x, Rotary(config.head_width, 7, config.rope_theta)(0, 7))
        torch.testing.assert_close(got, literal(attention, x, config), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("placement", "wanted"), [("pre", {"q", "k"}), ("hybrid", {"q", "k", "v"})])
def test_qk_norm_adds_to_the_norms_of_the_placement(placement, wanted):
    attention = Attention(ThinkerConfig(norm=NormConfig(norm_placement=placement, qk_norm=True)))
    assert attention.inner_norms == wanted
    names = {name for name, _ in attention.named_parameters() if "norm" in name}
    assert names == {f"{name}_norm.weight" for name in wanted}


def test_the_weights_have_their_shapes():
    attention = Attention(ThinkerConfig(d_model=48, n_heads=6, n_kv_heads=2, head_dim=10))
    shapes = {name: tuple(weight.shape) for name, weight in attention.state_dict().items()}
    assert shapes == {"q.weight": (60, 48), "k.weight": (20, 48), "v.weight": (20, 48), "out.weight": (48, 60)}


def test_head_gains_start_at_one():
    attention = Attention(ThinkerConfig(norm=NormConfig(norm_placement="normformer")))
    assert torch.equal(attention.head_gain, torch.ones(4))
