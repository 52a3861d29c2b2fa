"""odd-block: a block that differs from the others by an order of magnitude."""

from __future__ import annotations

import pytest
import torch
from helpers.histories import Signals, facts, first, give_samples, last, layers, numbers_in
from helpers.tiny_runs import TinyGPT, named, of_rule, train_tiny, transformers_model

from omninorm.monitor import Alarm, History, NormFacts
from omninorm.monitor.rules.odd_block import OddBlock

pytestmark = pytest.mark.usefixtures("words")
COUNT = 6


def judge(signals: Signals, blocks: int = COUNT, samples: int = 5) -> list[Alarm]:
    return give_samples(OddBlock(), [signals] * samples, History(facts=facts(blocks)))[-1]


@pytest.mark.parametrize(
    ("signal", "beyond", "short"),
    [
        ("branch_ratio", 10.1, 9.9), ("branch_ratio", 1 / 10.1, 1 / 9.9), ("attention_ratio", 10.1, 9.9),
        ("feed_forward_ratio", 10.1, 9.9), ("attention_entropy", 1 / 4.1, 1 / 3.9), ("attention_logit", 10.1, 9.9),
        ("attention_entropy", None, 20.0), ("attention_logit", None, 1 / 20),
    ],
)  # fmt: skip
def test_inner_block_is_reported_beyond_the_limit(signal: str, beyond: float | None, short: float) -> None:
    if beyond is not None:
        (alarm,) = judge({signal: layers(0.3, 0.3 * beyond, count=COUNT)})
        assert (alarm.severity, alarm.layer) == ("warn", "blocks.2")
        assert numbers_in(alarm.evidence)[1] == pytest.approx(max(beyond, 1 / beyond), rel=1e-2)
    assert judge({signal: layers(0.3, 0.3 * short, count=COUNT)}) == []


@pytest.mark.parametrize("signal", ["weight_rms", "update_ratio", "grad_norm"])
def test_parameter_groups_outside_the_blocks_do_not_count(signal: str) -> None:
    limit = 5.0 if signal == "weight_rms" else 10.0
    assert judge({signal: [*layers(0.02, count=COUNT), 100.0]}) == []
    assert [alarm.layer for alarm in judge({signal: [*layers(0.02, 0.0205 * limit, count=COUNT), 0.02]})] == [
        "blocks.2"
    ]
    assert judge({signal: [*layers(0.02, 0.0195 * limit, count=COUNT), 0.02]}) == []


def test_largest_gain_of_a_blocks_norms_counts() -> None:
    names = [NormFacts(f"blocks.{index // 2}.norm{index % 2}", "RMSNorm", 1e-6, index // 2) for index in range(12)]
    history = History(facts=facts(COUNT, norms=(*names, NormFacts("final", "RMSNorm", 1e-6, None))))
    gains = [1.0] * 13
    gains[5], gains[12] = 5.1, 50.0
    (alarm,) = give_samples(OddBlock(), [{"gain_max": gains}] * 5, history)[-1]
    assert alarm.layer == "blocks.2"


@pytest.mark.parametrize("at", [0, COUNT - 1])
def test_first_and_last_block_are_judged_by_their_weights_only(at: int) -> None:
    assert judge({"branch_ratio": layers(0.3, 30.0, at, COUNT)}) == []
    assert judge({"attention_logit": layers(0.3, 30.0, at, COUNT)}) == []
    assert len(judge({"weight_rms": [*layers(0.02, 0.2, at, COUNT), 0.02]})) == 1


@pytest.mark.parametrize(
    ("ratios", "layer"),
    [
        ([35.0, 0.5, 15.1, 0.03], "blocks.2"), ([35.0, 0.5, 14.9, 0.03], None), ([35.0, 16.0, 0.5, 0.6], "blocks.1"),
        ([35.0, 3.0, 15.1, 0.6], "blocks.2"), ([35.0, 3.0, 15.1, 2.0], None), ([35.0, 0.5, 0.4, 16.0], None),
    ],
)  # fmt: skip
def test_among_four_blocks_one_that_overwrites_the_stream_is_odd(ratios: list[float], layer: str | None) -> None:
    """The first block of a healthy model writes 35 times its input, so four blocks have a large spread."""
    assert [alarm.layer for alarm in judge({"branch_ratio": ratios}, blocks=4)] == ([layer] if layer else [])


def test_blocks_that_vary_anyway_are_not_odd() -> None:
    spread = [1.0, 0.1, 30.0, 1.0, 3.0, 0.3]  # the median block is 3-fold away, 6 times that is 700-fold
    assert judge({"branch_ratio": spread}) == []


def test_at_least_four_blocks_and_three_samples_over_twenty_steps() -> None:
    assert judge({"branch_ratio": layers(0.3, 30.0, 1, 3)}, blocks=3) == []
    assert len(judge({"branch_ratio": layers(0.3, 30.0, 1, 4)}, blocks=4)) == 1
    reports = give_samples(
        OddBlock(), [{"branch_ratio": layers(0.3, 30.0, count=COUNT)}] * 5, History(facts=facts(COUNT))
    )
    assert first(reports) == 3


def judge_three(signals: Signals, alike: tuple[int, ...] = (0, 0, 0)) -> list[str | None]:
    history = History(facts=facts(3, alike=alike))
    return [alarm.layer for alarm in give_samples(OddBlock(), [signals] * 5, history)[-1]]


@pytest.mark.parametrize(
    ("weights", "layer"),
    [
        ([0.02, 0.101, 0.02], "blocks.1"), ([0.02, 0.099, 0.02], None), ([0.02, 0.0039, 0.02], "blocks.1"),
        ([0.101, 0.02, 0.02], "blocks.0"), ([0.02, 0.02, 0.101], "blocks.2"), ([0.02, 0.02, 0.0039], "blocks.2"),
        ([0.02, 0.027, 0.18], "blocks.2"), ([0.02, 0.028, 0.18], None), ([0.02, 0.02, None], None),
    ],
)  # fmt: skip
def test_among_three_equal_blocks_the_weights_of_one_are_odd(weights: list[float | None], layer: str | None) -> None:
    """The others must agree: the odd one is 6 times as far from the middle, on a logarithmic scale, as the third."""
    assert judge_three({"weight_rms": [*weights, 0.02]}) == ([layer] if layer else [])


@pytest.mark.parametrize(
    ("ratios", "layer"),
    [
        ([35.0, 15.1, 0.5], "blocks.1"), ([35.0, 14.9, 0.5], None), ([35.0, 16.0, 1.7], None),
        ([35.0, 0.5, 16.0], None), ([0.3, 0.002, 0.3], None),
    ],
)  # fmt: skip
def test_among_three_equal_blocks_one_that_overwrites_the_stream_is_odd(ratios: list[float], layer: str | None) -> None:
    assert judge_three({"branch_ratio": ratios}) == ([layer] if layer else [])


@pytest.mark.parametrize("signal", ["update_ratio", "grad_norm", "attention_logit", "attention_ratio"])
def test_three_blocks_are_compared_by_nothing_else(signal: str) -> None:
    assert judge_three({signal: [0.3, 30.0, 0.3, 0.3]}) == []


def test_three_blocks_of_other_kinds_are_not_compared() -> None:
    assert judge_three({"weight_rms": [0.02, 0.2, 0.02, 0.02]}, alike=(0, 1, 0)) == []
    assert judge_three({"branch_ratio": [35.0, 16.0, 0.5]}, alike=(0, 1, 1)) == []


def test_cause_in_the_weights_is_named_first() -> None:
    both = {
        "attention_entropy": layers(0.9, 0.05, count=COUNT),
        "weight_rms": [*layers(0.02, 0.5, count=COUNT), 0.02],
        "branch_ratio": layers(0.3, 30.0, count=COUNT),
    }
    (alarm,) = judge(both)
    assert "RMS of the weights" in alarm.evidence
    both.pop("weight_rms")
    (alarm,) = judge(both)
    assert "attention entropy" in alarm.evidence
    assert "query and key" in alarm.remedy


# Real runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("block", "parts", "factor"), [(2, ("attn.qkv",), 25.0), (1, ("attn", "mlp"), 10.0)])
def test_block_with_too_large_weights_is_named(block: int, parts: tuple[str, ...], factor: float) -> None:
    torch.manual_seed(0)
    model = TinyGPT(blocks=5)
    with torch.no_grad():
        for name, parameter in model.h[block].named_parameters():
            if parameter.ndim == 2 and name.startswith(parts):
                parameter.mul_(factor)
    watched, _ = train_tiny(model, lr=1e-3, steps=30)
    assert named(of_rule(watched, "odd-block")) == [("warn", "odd-block", f"h.{block}")]


def test_attention_with_too_large_gains_in_one_block_is_named() -> None:
    torch.manual_seed(0)
    model = TinyGPT(blocks=5)
    torch.nn.init.constant_(model.h[3].ln_1.weight, 30.0)
    watched, _ = train_tiny(model, lr=1e-3, steps=30)
    assert [alarm.layer for alarm in of_rule(watched, "odd-block")] == ["h.3"]


def test_one_of_three_blocks_with_too_large_weights_is_named() -> None:
    torch.manual_seed(0)
    model = TinyGPT(blocks=3)
    with torch.no_grad():
        for parameter in model.h[1].parameters():
            parameter.mul_(10.0 if parameter.ndim == 2 else 1.0)
    watched, _ = train_tiny(model, lr=1e-3, steps=30)
    assert named(of_rule(watched, "odd-block")) == [("warn", "odd-block", "h.1")]


@pytest.mark.parametrize("kind", ["tiny", "Llama", "Olmo2", "Gemma2", "Qwen3"])
def test_three_healthy_blocks_are_silent(kind: str) -> None:
    if kind != "tiny":
        pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = TinyGPT(blocks=3) if kind == "tiny" else transformers_model(kind, blocks=3)
    watched, _ = train_tiny(model, lr=5e-3, steps=40)
    rules = ("odd-block", "residual-missing", "norm-missing")
    assert [alarm for rule in rules for alarm in of_rule(watched, rule)] == []


@pytest.mark.parametrize("kind", ["tiny", "Qwen3Next"])
def test_healthy_models_have_no_odd_block(kind: str) -> None:
    """Qwen3-Next alternates two kinds of attention."""
    if kind != "tiny":
        pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = TinyGPT(blocks=6) if kind == "tiny" else transformers_model(kind)
    watched, _ = train_tiny(model, lr=2e-3, steps=30)
    assert of_rule(watched, "odd-block") == []


def test_blocks_are_compared_within_their_chain() -> None:
    """The stages of a vision model, or an encoder and a decoder, differ by design."""
    stages = facts(8, chains=((0, 1, 2, 3), (4, 5, 6, 7)), groups=tuple(f"blocks.{at}" for at in range(8)))
    values = [0.02, 0.021, 0.019, 0.02, 1.0, 1.1, 0.9, 1.0]
    history = History(facts=stages)
    assert last(OddBlock(), [{"weight_rms": values}] * 4, history) == []
    values[5] = 30.0
    history = History(facts=stages)
    assert last(OddBlock(), [{"weight_rms": values}] * 4, history) == [("warn", "blocks.5")]
