"""Sampling against literal computations: the kept set, the frequencies, and what is refused."""

import math

import numpy as np
import pytest
import torch

from omninorm.errors import InputError
from omninorm.thinker import Sampling
from omninorm.thinker.sampling import keep_probable, sample


def kept_literally(logits, top_k, top_p):
    """Indices of the tokens that stay: the k likeliest, then the fewest of them that reach top_p."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])[:top_k]
    weights = [math.exp(logits[i]) for i in order]
    if top_p is None:
        return set(order)
    kept, mass = set(), 0.0
    for index, weight in zip(order, weights, strict=True):
        kept.add(index)
        mass += weight / sum(weights)
        if mass >= top_p:
            break
    return kept


@pytest.mark.parametrize("top_k", [None, 1, 2, 7, 30, 99])
@pytest.mark.parametrize("top_p", [None, 1e-50, 1e-9, 0.1, 0.5, 0.9, 0.999])
def test_top_k_and_top_p_keep_the_right_set(top_k, top_p):
    logits = torch.randn(20, 30) * 2
    kept = keep_probable(logits, top_k, top_p).isfinite()
    sizes = set()
    for row, mask in zip(logits.tolist(), kept, strict=True):
        want = kept_literally(row, top_k, top_p)
        assert set(mask.nonzero().flatten().tolist()) == want
        sizes.add(len(want))
    assert len(sizes) > 1 or top_k is not None or top_p not in (0.5, 0.9, 0.999)


def test_kept_tokens_keep_their_logits():
    logits = torch.randn(4, 10)
    kept = keep_probable(logits, 4, 0.8)
    assert torch.equal(kept[kept.isfinite()], logits[kept.isfinite()])


def test_ties_with_the_last_kept_token_are_kept():
    assert keep_probable(torch.tensor([[1.0, 3.0, 1.0, 0.0]]), 2, None).isfinite().tolist() == [
        [True, True, True, False]
    ]


def test_top_p_one_keeps_everything():
    assert bool(keep_probable(torch.tensor([[0.0, -50.0]]), None, 1.0).isfinite().all())


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_temperature_gives_the_softmax_frequencies(temperature):
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0, -3.0])
    draws = 40_000
    drawn = sample(logits.expand(draws, 5), Sampling(temperature), torch.Generator().manual_seed(0))
    wanted = [math.exp(x / temperature) for x in logits.tolist()]
    for token, weight in enumerate(wanted):
        p = weight / sum(wanted)
        share = (drawn == token).double().mean().item()
        assert abs(share - p) < 4.5 * math.sqrt(p * (1 - p) / draws) + 1e-9


def test_draws_stay_within_the_kept_set_and_cover_it():
    logits = torch.randn(30) * 2
    drawn = sample(logits.expand(5000, 30), Sampling(1.5, top_k=6, top_p=0.9), torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == kept_literally((logits / 1.5).tolist(), 6, 0.9)


@pytest.mark.parametrize("temperature", [0, 0.0, 1e-30, 1e-320])
def test_temperature_0_takes_the_first_of_the_most_probable_tokens(temperature):
    logits = torch.tensor([[0.0, 5.0, 4.99], [7.0, -1.0, 3.0]])
    assert sample(logits, Sampling(temperature)).tolist() == [1, 0]
    assert sample(torch.tensor([[1.0, 2.0, 2.0]]), Sampling(0)).tolist() == [1]


def test_bfloat16_logits_are_sampled():
    assert sample(torch.tensor([[0.0, 90.0]]).bfloat16(), Sampling(top_p=0.5)).tolist() == [1]


@pytest.mark.parametrize("settings", [Sampling(0), Sampling(1.0)])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_refused(bad, settings):
    with pytest.raises(InputError, match="NaN or infinity"):
        sample(torch.tensor([[0.0, 1.0], [bad, 0.0]]), settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature must be a finite number ≥ 0, got -0.1"),
        ({"temperature": math.nan}, "temperature must be a finite number ≥ 0, got nan"),
        ({"temperature": math.inf}, "temperature must be a finite number ≥ 0, got inf"),
        ({"temperature": "hot"}, "temperature must be a finite number ≥ 0, got 'hot'"),
        ({"top_k": 0}, "top_k must be an integer ≥ 1, got 0"),
        ({"top_k": 2.0}, "top_k must be an integer ≥ 1, got 2.0"),
        ({"top_k": True}, "top_k must be an integer ≥ 1, got True"),
        ({"top_p": 0.0}, "top_p must be a number in (0, 1], got 0.0"),
        ({"top_p": 1.1}, "top_p must be a number in (0, 1], got 1.1"),
        ({"top_p": math.nan}, "top_p must be a number in (0, 1], got nan"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(InputError) as caught:
        Sampling(**settings)
    assert message in str(caught.value)


def test_numpy_scalars_are_accepted():
    assert Sampling(np.float32(0.5), np.int64(3), np.float64(0.25)) == Sampling(0.5, 3, 0.25)
