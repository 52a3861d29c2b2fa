"""ThinkerConfig: defaults, derived widths, the round trip, and every refusal."""

import dataclasses
import json

import pytest

from omninorm.config import NormConfig
from omninorm.errors import ConfigError
from omninorm.thinker import ThinkerConfig


def test_defaults_are_the_origins_norms_on_bytes():
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


def test_filled_in_widths_follow_a_changed_config():
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


def test_from_dict_reads_the_origins_dictionary_and_a_norm_config():
    norm = {"normalization": "rmsnorm", "norm_placement": "pre", "norm_eps": 1e-6}
    assert ThinkerConfig.from_dict({"norm": norm}) == ThinkerConfig()
    assert ThinkerConfig.from_dict({"norm": NormConfig(norm_eps=0.5)}).norm.norm_eps == 0.5


BAD = [
    ({"vocab_size": 0}, "vocab_size must be an integer ≥ 1, got 0"),
    ({"d_model": -4}, "d_model must be an integer ≥ 1, got -4"),
    ({"d_model": 64.0}, "d_model must be an integer ≥ 1, got 64.0"),
    ({"n_layers": True}, "n_layers must be an integer ≥ 1, got True"),
    ({"n_heads": 0}, "n_heads must be an integer ≥ 1, got 0"),
    ({"n_kv_heads": 0}, "n_kv_heads must be an integer ≥ 1, got 0"),
    ({"max_seq_len": "512"}, "max_seq_len must be an integer ≥ 1, got '512'"),
    ({"d_ff": 0}, "d_ff must be an integer ≥ 1, got 0"),
    ({"head_dim": 0}, "head_dim must be an integer ≥ 1, got 0"),
    ({"feed_forward": "relu"}, "feed_forward must be one of swiglu, gelu, got 'relu'"),
    ({"init": "zeros"}, "init must be one of xavier, normal, got 'zeros'"),
    ({"rope_theta": 0.0}, "rope_theta must be a finite number > 0, got 0.0"),
    ({"rope_theta": float("nan")}, "rope_theta must be a finite number > 0, got nan"),
    ({"init_std": -1.0}, "init_std must be a finite number > 0, got -1.0"),
    ({"tied_head": 1}, "tied_head must be true or false, got 1. Set tied_head to one"),
    ({"scaled_init": "no"}, "scaled_init must be true or false, got 'no'. Set scaled_init to one"),
    ({"d_model": 10, "n_heads": 4}, "d_model must be a multiple of n_heads, got d_model=10 with n_heads=4. Choose"),
    ({"n_kv_heads": 3}, "n_heads must be a multiple of n_kv_heads, got n_heads=4 with n_kv_heads=3. Choose"),
    ({"n_kv_heads": 8}, "n_heads must be a multiple of n_kv_heads, got n_heads=4 with n_kv_heads=8. Choose"),
    ({"head_dim": 5}, "the width of a head must be even, because RoPE turns pairs, got 5 (d_model=256, n_heads=4"),
    ({"d_model": 12, "n_heads": 4}, "the width of a head must be even, because RoPE turns pairs, got 3 ("),
]


@pytest.mark.parametrize(("settings", "message"), BAD)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ConfigError) as caught:
        ThinkerConfig(**settings)
    assert message in str(caught.value)
    with pytest.raises(ConfigError):
        ThinkerConfig.from_dict(settings)


def test_lns_and_scaled_init_exclude_each_other():
    norm = NormConfig(norm_placement="lns")
    assert ThinkerConfig(norm=norm).scaled_init is False
    with pytest.raises(ConfigError, match="'lns' already scales the norms by depth and goes without scaled_init"):
        ThinkerConfig(norm=norm, scaled_init=True)


def test_a_norm_that_is_no_norm_config_is_refused():
    with pytest.raises(ConfigError, match=r"norm must be a NormConfig, got dict. Pass NormConfig\(...\)"):
        ThinkerConfig(norm={"normalization": "rmsnorm"})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layers": 3}, "a Thinker config has the keys vocab_size, d_model, n_layers"),
        ({"norm": {"kind": "rmsnorm"}}, "a norm config has the keys normalization"),
        ({"norm": None}, "a norm config must be a dictionary, got NoneType"),
        ([1, 2], "a Thinker config must be a dictionary, got list"),
    ],
)
def test_from_dict_refuses_what_it_does_not_know(values, message):
    with pytest.raises(ConfigError) as caught:
        ThinkerConfig.from_dict(values)
    assert message in str(caught.value)
