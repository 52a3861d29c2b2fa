"""Sizes that are computed from a config agree with the model that is built from it."""

from __future__ import annotations

from math import prod

import pytest

from omninorm.thinker import Thinker, ThinkerConfig
from omninorm.thinker.sizes import count_weights, matrix_shapes


@pytest.mark.parametrize(
    "settings",
    [{}, {"feed_forward": "gelu", "n_kv_heads": 2}, {"tied_head": False, "head_dim": 6, "d_ff": 10, "n_layers": 1}],
)
def test_the_computed_matrices_are_those_of_the_model(settings: dict[str, object]) -> None:
    config = ThinkerConfig.from_dict({"vocab_size": 11, "d_model": 16, "n_layers": 3, "max_seq_len": 8, **settings})
    built = {name: tuple(each.shape) for name, each in Thinker(config).named_parameters() if each.ndim == 2}
    assert matrix_shapes(config) == built
    assert count_weights(config) == sum(map(prod, built.values()))


def test_the_matrices_of_any_number_of_layers_are_counted_at_once() -> None:
    # A block of width 2 with one head and d_ff 3: four matrices of 2 × 2 and three of 2 × 3; an embedding of 5 × 2.
    config = ThinkerConfig(vocab_size=5, d_model=2, n_heads=1, d_ff=3, n_layers=10**18)
    assert count_weights(config) == 34 * 10**18 + 10
