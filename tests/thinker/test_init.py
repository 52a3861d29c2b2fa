"""Weight initialization: standard deviations, factors of placements, and the same draws for the same seed."""

import math

import pytest
import torch

from omninorm.config import NORMALIZATIONS, PLACEMENTS, NormConfig
from omninorm.thinker import Thinker, ThinkerConfig


def build(seed=0, **settings):
    torch.manual_seed(seed)
    shape = {"vocab_size": 300, "d_model": 96, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 8}
    return Thinker(ThinkerConfig(**{**shape, **settings}))


def matrices(model):
    return {name: weight for name, weight in model.state_dict().items() if weight.ndim == 2}


def check_spread(weight, std):
    """Check that the standard deviation and the mean of a sample are within 5 standard errors."""
    assert weight.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * weight.numel()))
    assert abs(weight.mean().item()) < 5 * std / math.sqrt(weight.numel())


@pytest.mark.parametrize("feed_forward", ["swiglu", "gelu"])
def test_xavier_weights_have_their_standard_deviation(feed_forward):
    weights = matrices(build(tied_head=False, feed_forward=feed_forward))
    assert len(weights) == 2 + 4 * (7 if feed_forward == "swiglu" else 6)
    check_spread(weights.pop("embedding.weight"), 96**-0.5)
    for weight in weights.values():
        check_spread(weight, math.sqrt(2 / sum(weight.shape)))


def test_normal_weights_have_init_std():
    for weight in matrices(build(init="normal", init_std=0.3, tied_head=False)).values():
        check_spread(weight, 0.3)


@pytest.mark.parametrize("init", ["xavier", "normal"])
def test_scaled_init_divides_the_matrices_that_write_to_the_residual_stream(init):
    plain, scaled = matrices(build(init=init)), matrices(build(init=init, scaled_init=True))
    for name, weight in plain.items():
        writes = name.endswith(("attention.out.weight", "feed_forward.down.weight"))
        torch.testing.assert_close(scaled[name], weight / math.sqrt(8) if writes else weight, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("placement", "normalization"),
    [
        (placement, norm)
        if norm == "rmsnorm" or placement == "pre"
        else pytest.param(placement, norm, marks=pytest.mark.exhaustive)
        for placement in PLACEMENTS
        for norm in NORMALIZATIONS
        if placement != "ngpt" or norm == "rmsnorm"
    ],
)
def test_the_same_seed_gives_every_norm_and_placement_the_same_weights(normalization, placement):
    shape = {"vocab_size": 20, "d_model": 24, "n_layers": 2}
    reference, model = (
        matrices(build(norm=norm, **shape)) for norm in (NormConfig(), NormConfig(normalization, placement))
    )
    assert set(model) >= set(reference), "gates are matrices too"
    shrunk = ("v.weight", "out.weight", "gate.weight", "up.weight", "down.weight")
    for name, weight in reference.items():
        if placement == "ngpt":  # unit columns for what writes to the stream, unit rows for the rest
            dim = 0 if name.endswith(("out.weight", "down.weight")) else 1
            weight = weight / torch.linalg.vector_norm(weight, dim=dim, keepdim=True)
            torch.testing.assert_close(model[name], weight, rtol=1e-5, atol=1e-6)
            continue
        factor = 16**-0.25 if placement == "deepnorm" and name.endswith(shrunk) else 1.0
        torch.testing.assert_close(model[name], weight * factor, rtol=1e-6 if factor != 1 else 0, atol=0)


def test_the_head_is_drawn_last_and_seeds_matter():
    tied, untied, other = matrices(build()), matrices(build(tied_head=False)), matrices(build(seed=1))
    assert set(untied) - set(tied) == {"head.weight"}
    for name, weight in tied.items():
        assert torch.equal(untied[name], weight)
        assert not torch.equal(other[name], weight)


def test_all_matrices_have_different_draws():
    weights = [weight.flatten()[:5].tolist() for weight in matrices(build(tied_head=False)).values()]
    assert len({tuple(weight) for weight in weights}) == len(weights) == 2 + 4 * 7
