"""TrainConfig's checks and the learning rate of every step."""

from __future__ import annotations

import json
import math

import pytest

from omninorm.errors import ConfigError
from omninorm.experiments import TrainConfig, learning_rate

BAD = [
    ("steps", 0),
    ("steps", -1),
    ("steps", 1.5),
    ("steps", True),
    ("steps", 10**12 + 1),
    ("steps", 10**20),
    ("batch_size", 0),
    ("seq_len", 0),
    ("grad_accumulation", 0),
    ("eval_every", 0),
    ("checkpoint_every", 0),
    ("keep_checkpoints", 0),
    ("log_every", 0),
    ("eval_bytes", 1),
    ("warmup_steps", -1),
    ("warmup_steps", 601),
    ("seed", -1),
    ("seed", 2**63),
    ("lr", 0.0),
    ("lr", -1e-3),
    ("lr", math.nan),
    ("lr", math.inf),
    ("lr", "fast"),
    ("lr", 1e-39),
    ("lr", 1e39),
    ("adam_eps", 1e-46),
    ("adam_eps", 1e39),
    ("grad_clip", 1e-46),
    ("grad_clip", 1e300),
    ("min_lr_ratio", 1.1),
    ("min_lr_ratio", math.nan),
    ("weight_decay", -0.1),
    ("weight_decay", math.nan),
    ("adam_eps", 0.0),
    ("adam_eps", math.nan),
    ("grad_clip", 0.0),
    ("grad_clip", math.nan),
    ("betas", (0.9, 1.0)),
    ("betas", (0.9, math.nan)),
    ("betas", (0.9,)),
    ("betas", 0.9),
    ("schedule", "linear"),
    ("optimizer", "sgd"),
    ("decay_norms", 1),
    ("precision", "fp8"),
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_bad_value_is_refused_by_name(name, value):
    with pytest.raises(ConfigError) as caught:
        TrainConfig(**{name: value})
    expected = "warmup_steps=601" if value == 601 else name
    assert expected in str(caught.value)


def test_an_unknown_key_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"steps.*grad_clip.*'clip'"):
        TrainConfig.from_dict({"clip": 1.0})


def test_a_config_survives_json():
    config = TrainConfig(steps=7, betas=(0.8, 0.9), grad_clip=None, warmup_steps=3, precision="bf16")
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_the_default_warmup_is_a_tenth_and_at_most_a_hundred():
    assert [TrainConfig(steps=steps).warmup for steps in (5, 600, 5000)] == [0, 60, 100]


def test_warmup_rises_linearly_to_the_peak():
    config = TrainConfig(steps=100, lr=2.0, warmup_steps=4)
    assert [learning_rate(step, config) for step in (1, 2, 3, 4)] == [0.5, 1.0, 1.5, 2.0]


def test_cosine_passes_the_middle_and_ends_at_its_ratio():
    config = TrainConfig(steps=104, lr=2.0, warmup_steps=4, min_lr_ratio=0.25)
    assert learning_rate(54, config) == pytest.approx((2.0 + 0.5) / 2, rel=1e-15)
    assert learning_rate(104, config) == 0.5
    rates = [learning_rate(step, config) for step in range(4, 105)]
    assert rates == sorted(rates, reverse=True)


def test_the_constant_schedule_stays_at_the_peak():
    config = TrainConfig(steps=10, lr=0.125, warmup_steps=2, schedule="constant")
    assert {learning_rate(step, config) for step in range(2, 11)} == {0.125}


def test_a_run_of_warmup_only_ends_at_the_peak_learning_rate():
    assert learning_rate(5, TrainConfig(steps=5, warmup_steps=5, lr=0.5)) == 0.5
