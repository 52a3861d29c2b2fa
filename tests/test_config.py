"""NormConfig: μOmni's dictionary, its round trip, and what is refused."""

import dataclasses
import re

import pytest

from omninorm import NormConfig
from omninorm.config import CASTS, NORMALIZATIONS, PLACEMENTS
from omninorm.errors import ConfigError

MUOMNI = {"normalization": "rmsnorm", "norm_placement": "pre", "norm_eps": 1e-6}


def test_muomnis_dictionary_is_read_verbatim_and_written_back() -> None:
    config = NormConfig.from_dict(MUOMNI)
    assert config == NormConfig()
    assert (config.normalization, config.norm_placement, config.norm_eps) == ("rmsnorm", "pre", 1e-6)
    assert config.to_dict() == MUOMNI


@pytest.mark.parametrize(
    "config",
    [
        NormConfig(gain_offset=1.0, cast="llama", qk_norm=True),
        NormConfig("layernorm", "mix", None, mix_fraction=0.5),
        NormConfig("scalenorm", "keel", residual_scale=3.0, qk_norm=False),
    ],
)
def test_round_trip(config: NormConfig) -> None:
    assert NormConfig.from_dict(config.to_dict()) == config


def test_it_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        NormConfig().norm_eps = 1.0  # type: ignore[misc]


BAD = {
    "an unknown norm": ({"normalization": "batchnorm"}, f"normalization must be one of {', '.join(NORMALIZATIONS)}, got 'batchnorm'"),
    "an unknown placement": ({"norm_placement": "middle"}, f"norm_placement must be one of {', '.join(PLACEMENTS)}, got 'middle'"),
    "an unknown cast": ({"cast": "fp8"}, f"cast must be one of {', '.join(CASTS)}, got 'fp8'"),
    "a norm that is no string": ({"normalization": None}, "got None. Choose one of these"),
    "an unknown key": ({"norm_epsilon": 1e-6}, "a norm config has the keys normalization, norm_placement, norm_eps, gain_offset, cast, qk_norm, residual_scale, mix_fraction, got 'norm_epsilon'. Correct or remove"),
    "negative eps": ({"norm_eps": -1.0}, "norm_eps must be a finite number ≥ 0 and ≤ 3.4e+38, got -1.0"),
    "eps NaN": ({"norm_eps": float("nan")}, "norm_eps must be a finite number ≥ 0 and ≤ 3.4e+38, got nan"),
    "eps infinite": ({"norm_eps": float("inf")}, "got inf"),
    "eps beyond float32": ({"norm_eps": 1e300}, "≤ 3.4e+38, got 1e+300"),
    "eps beyond every float": ({"norm_eps": 10**400}, "got 1000000000"),
    "eps a string": ({"norm_eps": "1e-6"}, "got '1e-6'"),
    "eps a bool": ({"norm_eps": True}, "got True"),
    "an offset that is NaN": ({"gain_offset": float("nan")}, "gain_offset must be a finite number ≥ -3.4e+38 and ≤ 3.4e+38, got nan"),
    "mix_fraction above 1": ({"norm_placement": "mix", "mix_fraction": 1.5}, "mix_fraction must be a finite number ≥ 0 and ≤ 1, got 1.5"),
    "a residual scale of 0": ({"norm_placement": "keel", "residual_scale": 0}, "residual_scale must be a finite number > 0, got 0"),
    "qk_norm as a number": ({"qk_norm": 1}, "qk_norm must be true, false or None, got 1"),
    "qk_norm as a word": ({"qk_norm": "yes"}, "qk_norm must be true, false or None, got 'yes'"),
    "an offset without rmsnorm": ({"normalization": "layernorm", "gain_offset": 1.0}, "gain_offset and cast belong to normalization 'rmsnorm', got gain_offset=1.0, cast='fp32' with 'layernorm'"),
    "qk_norm without a norm": ({"normalization": "none", "qk_norm": True}, "qk_norm needs a norm, got normalization='none'"),
    "hybrid without its norms": ({"norm_placement": "hybrid", "qk_norm": False}, "placement 'hybrid' normalizes queries, keys and values, got qk_norm=False"),
    "a residual scale elsewhere": ({"residual_scale": 2.0}, "residual_scale belongs to placements 'deepnorm' and 'keel', got residual_scale=2.0 with 'pre'"),
    "mix_fraction elsewhere": ({"mix_fraction": 0.5}, "mix_fraction belongs to placement 'mix', got mix_fraction=0.5 with 'pre'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_settings_are_refused_in_one_sentence(name: str) -> None:
    values, message = BAD[name]
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        NormConfig.from_dict(values)
    assert "\n" not in str(caught.value)


def test_what_is_no_dictionary_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"a norm config must be a dictionary, got str. Use the keys normalization"):
        NormConfig.from_dict("rmsnorm")  # type: ignore[arg-type]
