"""The numbers in each alarm's evidence and remedy follow from the history that was judged."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.histories import Signals, facts, give_samples, give_steps, layers, numbers_in

from omninorm.monitor import Alarm, History, NormFacts, Step
from omninorm.monitor.rules import Rule
from omninorm.monitor.rules.adam_eps import AdamEps
from omninorm.monitor.rules.adam_underestimation import AdamUnderestimation
from omninorm.monitor.rules.attention_entropy import AttentionEntropy
from omninorm.monitor.rules.attention_logits import AttentionLogits
from omninorm.monitor.rules.branch_silent import BranchSilent
from omninorm.monitor.rules.dead_units import DeadUnits
from omninorm.monitor.rules.depth_growth import DepthGrowth
from omninorm.monitor.rules.gain_drift import GainDrift
from omninorm.monitor.rules.headroom import Headroom
from omninorm.monitor.rules.layer_jump import LayerJump
from omninorm.monitor.rules.logz import LogZ
from omninorm.monitor.rules.loss_spike import LossSpike
from omninorm.monitor.rules.massive_activation import MassiveActivation
from omninorm.monitor.rules.no_norm import NoNorm
from omninorm.monitor.rules.saturation import Saturation

pytestmark = pytest.mark.usefixtures("words")


def powers(ratio: float, blocks: int) -> list[float]:
    """Exponential growth from 1 to `ratio`."""
    return [ratio ** (index / (blocks - 1)) for index in range(blocks)]


GAIN_FROZEN = NormFacts("blocks.0.norm", "RMSNorm", 1e-6, 0, frozen=True)
JUMPED = {"branch_ratio": layers(1.0, 20.0)}
# Name: rule, the samples' signals, the history, numbers in the evidence, numbers in the remedy.
CASES: dict[str, tuple[type[Rule], list[Signals], dict[str, Any], list[float], list[float]]] = {
    # The smallest ratio and ε; 4 of 5 groups are below 10; the suggestion is a hundredth of the gradient.
    "adam-eps": (
        AdamEps, [{"adam_eps_ratio": [0.6, 0.5, 0.7, 1e4, 9.0]}] * 4, {}, [0.5, 1e-8, 4, 5, 10], [5e-11],
    ),
    "adam-eps, tiny": (
        AdamEps, [{"adam_eps_ratio": [1e-6] * 5}] * 4, {}, [1e-6, 1e-8, 5, 5, 10], [1e-15],
    ),
    "adam-eps, unknown ε": (
        AdamEps, [{"adam_eps_ratio": [0.5] * 5}] * 4, {"facts": facts(adam_eps=None)}, [0.5, 5, 5, 10], [1e-15],
    ),
    "adam-underestimation": (
        AdamUnderestimation, [{"adam_ratio": layers(1.0, 2.53, count=5)}] * 8, {}, [2.53], [0.95, 0.999],
    ),
    "attention-entropy": (AttentionEntropy, [{"attention_entropy": layers(0.8, 0.021)}] * 4, {}, [0.021], []),
    "attention-logits": (AttentionLogits, [{"attention_logit": layers(10.0, 2.5e4)}] * 2, {}, [2.5e4], []),
    # From 40 to 200 in at most 8 samples.
    "attention-logits, growing": (
        AttentionLogits,
        [{"attention_logit": layers(10.0, value)} for value in (50.0, 40.0, 80.0, 120.0, 160.0, 200.0)],
        {}, [200, 5, 8], [],
    ),
    "branch-silent, weak": (BranchSilent, [{"branch_ratio": layers(0.05, 0.0091)}] * 8, {}, [0.0091], [1]),
    "branch-silent, weaker": (BranchSilent, [{"branch_ratio": layers(0.3, 0.0091)}] * 8, {}, [0.0091], []),
    "branch-silent, dead": (BranchSilent, [{"attention_ratio": layers(0.3, 2e-7)}] * 8, {}, [2e-7], [0]),
    "dead-units": (DeadUnits, [{"dead_units": layers(0.0, 0.754)}] * 4, {}, [75, 0, 75, 1], []),
    # ln(200)/24 = 0.22
    "depth-growth": (
        DepthGrowth, [{"stream_rms": powers(200.0, 24)}] * 5, {"facts": facts(24)}, [200, 24, 0.22], [2],
    ),
    "depth-growth, gradient": (
        DepthGrowth, [{"stream_grad": powers(200.0, 24)}] * 5, {"facts": facts(24)}, [200, 24, 0.22], [],
    ),
    "gain-drift, ratio": (
        GainDrift, [{"gain_ratio": layers(1.0, ratio)} for ratio in (2.0, *[11.0] * 4)], {}, [2, 11], [],
    ),
    "gain-drift, small": (
        GainDrift, [{"gain_small": layers(0.0, share)} for share in (0.0, *[0.62] * 4)], {}, [62, 1e-3], [],
    ),
    "gain-drift, frozen": (GainDrift, [{"gain_max": [0.0]}], {"facts": facts(norms=(GAIN_FROZEN,))}, [0], [1]),
    "headroom": (Headroom, [{"stream_max": layers(1.0, 7120.0)}], {"dtype": "float16"}, [7120, 65504], []),
    # 20-fold by step 40, from 1 to 20; updates of 5.1 %.
    "layer-jump, updates": (
        LayerJump,
        [{"branch_ratio": layers(1.0), "update_ratio": [0.051] * 5}] * 4
        + [{**JUMPED, "update_ratio": [0.051] * 5}] * 2,
        {}, [20, 40, 1, 20, 5.1], [],
    ),
    "layer-jump": (LayerJump, [{"branch_ratio": layers(1.0)}] * 4 + [JUMPED] * 2, {}, [20, 40, 1, 20], [40]),
    "logz": (LogZ, [{"logz_mean": [10.5 + 3.0 * count]} for count in range(20)], {}, [10.5, 67.5], [1e-4]),
    "massive-activation": (
        MassiveActivation, [{"stream_max": layers(1.0, 2510.0), "stream_median": layers(0.5, 0.5)}] * 4,
        {}, [2510, 0.5], [],
    ),
    "no-norm": (
        NoNorm, [{"stream_rms": powers(101.0, 8), "stream_grad": powers(50.0, 8)[::-1]}],
        {"facts": facts(8), "placement": "none"}, [8, 101, 8, 50, 8], [0],
    ),
    "saturation": (Saturation, [{"saturation": layers(0.1, 0.619)}] * 4, {}, [62, 2], []),
}  # fmt: skip


@pytest.mark.parametrize(("rule", "samples", "history", "evidence", "remedy"), CASES.values(), ids=list(CASES))
def test_numbers_of_an_alarm_about_samples(
    rule: type[Rule], samples: list[Signals], history: dict[str, Any], evidence: list[float], remedy: list[float]
) -> None:
    (alarm,) = give_samples(rule(), samples, History(**{"facts": facts(), **history}))[-1]
    assert numbers_in(alarm.evidence) == pytest.approx(evidence, rel=1e-3)
    assert numbers_in(alarm.remedy) == pytest.approx(remedy, rel=1e-3)


def test_jump_with_a_rising_loss_reports_both_means() -> None:
    history = History(facts=facts())
    # 10 steps up to the sample before the jump, and the newest 5.
    losses = [*[9.0] * 20, *[20.0] * 10, *[9.0] * 9, *[9.0] * 16, *[21.5] * 5]
    history.steps.extend(Step(step, loss, 1.0, 1e-3) for step, loss in enumerate(losses, start=1))
    (alarm,) = give_samples(LayerJump(), [{"branch_ratio": layers(1.0)}] * 4 + [JUMPED] * 2, history)[-1]
    assert numbers_in(alarm.evidence) == [20, 40, 1, 20, 20, 21.5]


def test_loss_spike_reports_its_height_in_sigma() -> None:
    # σ² is half the mean squared difference of neighbours, 0.2²/2; the mean is 3.
    alarms: list[Alarm] = give_steps(LossSpike(), [*[3.1, 2.9] * 20, 6.0])
    assert numbers_in(alarms[0].evidence) == pytest.approx([6, 3 / 0.02**0.5, 40, 3, 2.9], rel=1e-3)
    assert numbers_in(alarms[0].remedy) == [1, 41]
