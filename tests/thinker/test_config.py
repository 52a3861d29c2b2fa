"""ThinkerConfig: defaults, derived widths, the round trip, and every refusal."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from omninorm.config import NormConfig
from omninorm.errors import ConfigError
from omninorm.thinker import ThinkerConfig


def test_the_default_is_a_byte_level_model_with_pre_norm_rmsnorm():
    config = ThinkerConfig()
    assert config.vocab_size == 256
    assert config.norm == NormConfig("rmsnorm", "pre", 1e-6)
    assert (config.kv_heads, config.head_width, config.hidden_width) == (4, 64, 688)


@pytest.mark.parametrize(
    ("settings", "width"),
    [
        ({"d_model": 6}, 16),  # 8/3 · 6 = 16 exactly
        ({"d_model": 7, "head_dim": 2}, 32),  # 18.7
        ({"d_model": 64}, 176),  # 170.7
        ({"d_model": 576}, 1536),
        ({"d_model": 64, "feed_forward": "gelu"}, 256),
        ({"d_model": 64, "d_ff": 5}, 5),
    ],
)
def test_the_hidden_width_follows_its_rule(settings, width):
    assert ThinkerConfig(**{"n_heads": 1, **settings}).hidden_width == width


def test_derived_widths_follow_a_changed_config():
    changed = dataclasses.replace(ThinkerConfig(), d_model=64, n_heads=2)
    assert (changed.kv_heads, changed.head_width, changed.hidden_width) == (2, 32, 176)


def test_round_trip_through_json():
    norm = NormConfig("layernorm", "deepnorm", 1e-5, qk_norm=True, residual_scale=1.5)
    shape = {"vocab_size": 7, "d_model": 24, "n_layers": 2, "n_heads": 3, "n_kv_heads": 1, "head_dim": 10, "d_ff": 11}
    choices = {"feed_forward": "gelu", "tied_head": False, "init": "normal", "init_std": 0.5, "scaled_init": True}
    config = ThinkerConfig(**shape, **choices, norm=norm, max_seq_len=9, rope_theta=5.5)
    unchanged = [
        field.name
        for field in dataclasses.fields(config)
        if getattr(config, field.name) == getattr(ThinkerConfig(), field.name)
    ]
    assert unchanged == []
    assert ThinkerConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert ThinkerConfig.from_dict(ThinkerConfig().to_dict()) == ThinkerConfig()


def test_from_dict_accepts_a_norm_as_dictionary_and_as_config():
    norm = {"normalization": "rmsnorm", "norm_placement": "pre", "norm_eps": 1e-6}
    assert ThinkerConfig.from_dict({"norm": norm}) == ThinkerConfig()
    assert ThinkerConfig.from_dict({"norm": NormConfig(norm_eps=0.5)}).norm.norm_eps == 0.5


BAD = [
    ({"vocab_size": 0}, "vocab_size", "0"),
    ({"d_model": -4}, "d_model", "-4"),
    ({"d_model": 64.0}, "d_model", "64.0"),
    ({"n_layers": True}, "n_layers", "True"),
    ({"n_heads": 0}, "n_heads", "0"),
    ({"n_kv_heads": 0}, "n_kv_heads", "0"),
    ({"max_seq_len": "512"}, "max_seq_len", "'512'"),
    ({"d_ff": 0}, "d_ff", "0"),
    ({"head_dim": 0}, "head_dim", "0"),
    ({"feed_forward": "relu"}, "feed_forward must be one of swiglu, gelu", "'relu'"),
    ({"init": "zeros"}, "init must be one of xavier, normal", "'zeros'"),
    ({"rope_theta": 0.0}, "rope_theta", "0.0"),
    ({"rope_theta": float("nan")}, "rope_theta", "nan"),
    ({"init_std": -1.0}, "init_std", "-1.0"),
    ({"tied_head": 1}, "tied_head", "1"),
    ({"scaled_init": "no"}, "scaled_init", "'no'"),
    ({"d_model": 10, "n_heads": 4}, "multiple of n_heads", "d_model=10 with n_heads=4"),
    ({"n_kv_heads": 3}, "multiple of n_kv_heads", "n_heads=4 with n_kv_heads=3"),
    ({"n_kv_heads": 8}, "multiple of n_kv_heads", "n_heads=4 with n_kv_heads=8"),
    ({"head_dim": 5}, "even", "5 (d_model=256, n_heads=4, head_dim=5)"),
    ({"d_model": 12, "n_heads": 4}, "even", "3 (d_model=12"),
]


@pytest.mark.parametrize(("settings", "invariant", "received"), BAD)
def test_a_bad_setting_is_refused_with_its_name_and_value(settings, invariant, received):
    for build in (lambda: ThinkerConfig(**settings), lambda: ThinkerConfig.from_dict(settings)):
        with pytest.raises(ConfigError) as caught:
            build()
        assert invariant in caught.value.invariant
        assert received in str(caught.value.received)


def test_lns_with_scaled_init_is_refused():
    norm = NormConfig(norm_placement="lns")
    assert ThinkerConfig(norm=norm).scaled_init is False
    with pytest.raises(ConfigError, match=r"'lns'.*scaled_init=True"):
        ThinkerConfig(norm=norm, scaled_init=True)


def test_a_norm_of_another_type_is_refused():
    with pytest.raises(ConfigError, match=r"norm must be a NormConfig, got dict"):
        ThinkerConfig(norm={"normalization": "rmsnorm"})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layers": 3}, "'layers'"),
        ({"norm": {"kind": "rmsnorm"}}, "'kind'"),
        ({"norm": None}, "NoneType"),
        ([1, 2], "list"),
    ],
)
def test_from_dict_refuses_unknown_keys(values, message):
    with pytest.raises(ConfigError) as caught:
        ThinkerConfig.from_dict(values)
    assert message in str(caught.value)


def test_numpy_scalars_and_scalar_tensors_become_python_numbers():
    given = {
        "d_model": np.int64(32),
        "n_layers": torch.tensor(2),
        "rope_theta": np.float32(500),
        "tied_head": np.bool_(False),
    }
    config = ThinkerConfig(**given)
    assert config == ThinkerConfig(d_model=32, n_layers=2, rope_theta=500.0, tied_head=False)
    assert [type(getattr(config, name)) for name in given] == [int, int, float, bool]
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict()
    with pytest.raises(ConfigError, match="d_model"):
        ThinkerConfig(d_model=np.float32(32))
