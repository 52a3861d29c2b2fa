"""NormConfig: reading and writing dictionaries, numbers of all kinds, and the errors for invalid settings."""

import dataclasses
import json
from typing import NamedTuple

import numpy
import pytest
import torch

from omninorm import NormConfig
from omninorm.config import CASTS, NORMALIZATIONS, PLACEMENTS, read_count, store_python_numbers
from omninorm.errors import ConfigError

SHORTEST = {"normalization": "rmsnorm", "norm_placement": "pre", "norm_eps": 1e-6}


def test_the_three_key_dictionary_is_read_and_written_back() -> None:
    config = NormConfig.from_dict(SHORTEST)
    assert config == NormConfig()
    assert (config.normalization, config.norm_placement, config.norm_eps) == ("rmsnorm", "pre", 1e-6)
    assert config.to_dict() == SHORTEST


@pytest.mark.parametrize(
    "config",
    [
        NormConfig(gain_offset=1.0, cast="llama", qk_norm=True),
        NormConfig("layernorm", "mix", None, mix_fraction=0.5),
        NormConfig("scalenorm", "keel", residual_scale=3.0, qk_norm=False),
    ],
)
def test_to_dict_and_from_dict_are_inverse(config: NormConfig) -> None:
    assert NormConfig.from_dict(config.to_dict()) == config


def test_a_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        NormConfig().norm_eps = 1.0  # type: ignore[misc]


# Settings, and what the error must name: the setting and the value received.
BAD = {
    "an unknown norm": ({"normalization": "batchnorm"}, "normalization", "'batchnorm'"),
    "an unknown placement": ({"norm_placement": "middle"}, "norm_placement", "'middle'"),
    "an unknown cast": ({"cast": "fp8"}, "cast", "'fp8'"),
    "a norm that is not a string": ({"normalization": None}, "normalization", "None"),
    "an unknown key": ({"norm_epsilon": 1e-6}, "norm_eps", "'norm_epsilon'"),
    "negative eps": ({"norm_eps": -1.0}, "norm_eps", "-1.0"),
    "eps NaN": ({"norm_eps": float("nan")}, "norm_eps", "nan"),
    "eps infinite": ({"norm_eps": float("inf")}, "norm_eps", "inf"),
    "eps beyond float32": ({"norm_eps": 1e300}, "norm_eps", "1e+300"),
    "eps beyond every float": ({"norm_eps": 10**400}, "norm_eps", "1000000000"),
    "eps a string": ({"norm_eps": "1e-6"}, "norm_eps", "'1e-6'"),
    "eps a bool": ({"norm_eps": True}, "norm_eps", "True"),
    "eps a NumPy bool": ({"norm_eps": numpy.bool_(True)}, "norm_eps", "True"),
    "eps a NumPy NaN": ({"norm_eps": numpy.float32("nan")}, "norm_eps", "nan"),
    "eps a duration": ({"norm_eps": numpy.timedelta64(0)}, "norm_eps", "np.timedelta64(0)"),
    "eps a date": ({"norm_eps": numpy.datetime64(5, "ns")}, "norm_eps", "np.datetime64("),
    "eps a NumPy complex number": ({"norm_eps": numpy.complex64(1)}, "norm_eps", "np.complex64(1"),
    "eps an object": ({"norm_eps": numpy.array(0.5, dtype=object)}, "norm_eps", "array(0.5, dtype=object)"),
    "eps a NumPy string": ({"norm_eps": numpy.str_("1e-6")}, "norm_eps", "'1e-6'"),
    "eps a vector": ({"norm_eps": numpy.ones(2)}, "norm_eps", "array([1., 1.])"),
    "eps a vector of one": ({"norm_eps": torch.ones(1)}, "norm_eps", "tensor([1.])"),
    "eps with a gradient": ({"norm_eps": torch.tensor(1.0, requires_grad=True)}, "norm_eps", "tensor(1., requires_grad"),
    "eps without a value": ({"norm_eps": torch.tensor(1.0, device="meta")}, "norm_eps", "tensor(..., device='meta'"),
    "eps complex": ({"norm_eps": torch.tensor(1j)}, "norm_eps", "tensor(0.+1.j)"),
    "an offset that is NaN": ({"gain_offset": float("nan")}, "gain_offset", "nan"),
    "an offset beyond float32": ({"gain_offset": -1e39}, "gain_offset", "-1e+39"),
    "mix_fraction above 1": ({"norm_placement": "mix", "mix_fraction": 1.5}, "mix_fraction", "1.5"),
    "a residual scale of 0": ({"norm_placement": "keel", "residual_scale": 0}, "residual_scale", "0"),
    "qk_norm as a number": ({"qk_norm": 1}, "qk_norm", "1"),
    "qk_norm as a word": ({"qk_norm": "yes"}, "qk_norm", "'yes'"),
    "an offset without rmsnorm": ({"normalization": "layernorm", "gain_offset": 1.0}, "gain_offset", "gain_offset=1.0 and cast='fp32' with 'layernorm'"),
    "qk_norm without a norm": ({"normalization": "none", "qk_norm": True}, "qk_norm", "normalization='none'"),
    "hybrid without its norms": ({"norm_placement": "hybrid", "qk_norm": False}, "'hybrid'", "qk_norm=False"),
    "a residual scale elsewhere": ({"residual_scale": 2.0}, "residual_scale", "residual_scale=2.0 with norm_placement='pre'"),
    "mix_fraction elsewhere": ({"mix_fraction": 0.5}, "mix_fraction", "mix_fraction=0.5 with norm_placement='pre'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_settings_are_refused_by_name_with_the_value(name: str) -> None:
    values, setting, received = BAD[name]
    with pytest.raises(ConfigError) as caught:
        NormConfig.from_dict(values)
    assert setting in caught.value.invariant
    assert str(caught.value.received).startswith(received)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("values", "bounds"), [({"norm_eps": -1.0}, "≥ 0 and ≤ 3.4e+38"), ({"mix_fraction": 2}, "≥ 0 and ≤ 1"), ({"residual_scale": 0}, "> 0")])  # fmt: skip
def test_an_error_names_the_bounds(values: dict, bounds: str) -> None:
    with pytest.raises(ConfigError) as caught:
        NormConfig.from_dict(values)
    assert caught.value.invariant.endswith(bounds)


@pytest.mark.parametrize(
    ("values", "meant"),
    [({"norm_epsilon": 1e-6}, "norm_eps"), ({"norm_placement": "Pre"}, "pre"), ({"normalization": "layer_norm"}, "layernorm")],
)  # fmt: skip
def test_an_error_suggests_the_name_that_was_probably_meant(values: dict, meant: str) -> None:
    with pytest.raises(ConfigError) as caught:
        NormConfig.from_dict(values)
    assert f"did you mean '{meant}'?" in caught.value.remedy


@pytest.mark.parametrize(("name", "choices"), [("normalization", NORMALIZATIONS), ("norm_placement", PLACEMENTS), ("cast", CASTS)])  # fmt: skip
def test_an_error_lists_the_choices(name: str, choices: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        NormConfig.from_dict({name: "zzz"})
    assert caught.value.invariant.endswith(", ".join(choices))


def test_a_config_that_is_no_dictionary_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        NormConfig.from_dict("rmsnorm")  # type: ignore[arg-type]
    assert caught.value.received == "str 'rmsnorm'"
    assert "normalization" in caught.value.remedy


@pytest.mark.parametrize("number", [numpy.float16(0.25), numpy.float32(0.25), numpy.float64(0.25), numpy.longdouble(0.25), numpy.array(0.25), torch.tensor(0.25)], ids=lambda number: type(number).__name__)  # fmt: skip
def test_numpy_scalars_and_0d_tensors_become_python_numbers(number: object) -> None:
    config = NormConfig(norm_placement="mix", norm_eps=number, gain_offset=number, mix_fraction=number)  # type: ignore[arg-type]
    keel = NormConfig(norm_placement="keel", residual_scale=number)  # type: ignore[arg-type]
    for value in (config.norm_eps, config.gain_offset, config.mix_fraction, keel.residual_scale):
        assert type(value) is float
        assert value == 0.25
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict()
    assert config == NormConfig(norm_placement="mix", norm_eps=0.25, gain_offset=0.25, mix_fraction=0.25)


def test_integers_are_read_from_numpy_and_tensors_but_not_from_floats() -> None:
    for count in (3, numpy.int8(3), numpy.uint64(3), numpy.array(3), torch.tensor(3)):
        assert type(read_count("width", count)) is int
        assert read_count("width", count) == 3
    for wrong in (3.0, numpy.float32(3.0), torch.tensor(3.0), True, numpy.bool_(True), "3", [3], numpy.array([3])):
        with pytest.raises(ConfigError, match="width"):
            read_count("width", wrong)


def test_a_dataclass_gets_python_numbers_in_its_tuples_too() -> None:
    @dataclasses.dataclass(frozen=True)
    class Settings:
        betas: tuple[float, float]
        steps: int
        name: str = "x"

        def __post_init__(self) -> None:
            store_python_numbers(self)

    made = Settings((numpy.float32(0.5), torch.tensor(0.25)), numpy.int64(7))  # type: ignore[arg-type]
    assert json.dumps(dataclasses.asdict(made)) == '{"betas": [0.5, 0.25], "steps": 7, "name": "x"}'

    class Betas(NamedTuple):
        first: float
        second: float

    made = Settings(Betas(numpy.float32(0.5), 0.25), 7, numpy.str_("y"))
    assert (type(made.betas), type(made.name)) == (tuple, str)
    assert made == Settings((0.5, 0.25), 7, "y")
    listed = Settings([numpy.float32(0.5)], 7)  # type: ignore[arg-type]
    assert json.dumps(listed.betas) == "[0.5]"


def test_numpy_strings_are_stored_as_python_strings() -> None:
    config = NormConfig(numpy.str_("layernorm"), numpy.str_("post"))
    assert (type(config.normalization), type(config.norm_placement)) == (str, str)
    assert config == NormConfig("layernorm", "post")
