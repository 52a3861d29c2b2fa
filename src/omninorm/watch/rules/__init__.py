"""Alarm rules: one file per rule, with its thresholds, the reasons for them, and their sources."""

from omninorm.watch.rules.adam_eps import AdamEps
from omninorm.watch.rules.adam_underestimation import AdamUnderestimation
from omninorm.watch.rules.attention_entropy import AttentionEntropy
from omninorm.watch.rules.attention_logits import AttentionLogits
from omninorm.watch.rules.base import Rule, Threshold
from omninorm.watch.rules.branch_silent import BranchSilent
from omninorm.watch.rules.dead_units import DeadUnits
from omninorm.watch.rules.depth_growth import DepthGrowth
from omninorm.watch.rules.eps_share import EpsShare
from omninorm.watch.rules.gain_drift import GainDrift
from omninorm.watch.rules.gradient_spike import GradientSpike
from omninorm.watch.rules.headroom import Headroom
from omninorm.watch.rules.layer_jump import LayerJump
from omninorm.watch.rules.learning_rate import LearningRate
from omninorm.watch.rules.logz import LogZ
from omninorm.watch.rules.loss_spike import LossSpike
from omninorm.watch.rules.massive_activation import MassiveActivation
from omninorm.watch.rules.no_norm import NoNorm
from omninorm.watch.rules.no_progress import NoProgress
from omninorm.watch.rules.nonfinite import NonFiniteRule
from omninorm.watch.rules.post_norm_depth import PostNormDepth
from omninorm.watch.rules.saturation import Saturation
from omninorm.watch.rules.unrecovered_spike import UnrecoveredSpike
from omninorm.watch.rules.weights_vanish import WeightsVanish

__all__ = ["Rule", "Threshold", "default_rules"]


def default_rules() -> list[Rule]:
    """Return new instances of all rules, causes before consequences."""
    return [
        NoNorm(),
        NonFiniteRule(),
        LayerJump(),
        WeightsVanish(),
        GainDrift(),
        BranchSilent(),
        EpsShare(),
        PostNormDepth(),
        LearningRate(),
        AdamEps(),
        DepthGrowth(),
        AttentionLogits(),
        AttentionEntropy(),
        Headroom(),
        UnrecoveredSpike(),
        NoProgress(),
        LossSpike(),
        GradientSpike(),
        AdamUnderestimation(),
        MassiveActivation(),
        LogZ(),
        DeadUnits(),
        Saturation(),
    ]
