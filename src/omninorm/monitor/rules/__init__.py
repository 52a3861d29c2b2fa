"""Alarm rules: one file per rule, with its thresholds, the reasons for them, and their sources."""

from omninorm.monitor.rules.adam_betas import AdamBetas
from omninorm.monitor.rules.adam_eps import AdamEps
from omninorm.monitor.rules.adam_state import AdamState
from omninorm.monitor.rules.adam_underestimation import AdamUnderestimation
from omninorm.monitor.rules.attention_entropy import AttentionEntropy
from omninorm.monitor.rules.attention_logits import AttentionLogits
from omninorm.monitor.rules.attention_not_causal import AttentionNotCausal
from omninorm.monitor.rules.autocast_lost import AutocastLost
from omninorm.monitor.rules.base import Rule, Threshold
from omninorm.monitor.rules.branch_silent import BranchSilent
from omninorm.monitor.rules.dead_experts import DeadExperts
from omninorm.monitor.rules.dead_units import DeadUnits
from omninorm.monitor.rules.depth_growth import DepthGrowth
from omninorm.monitor.rules.double_softmax import DoubleSoftmax
from omninorm.monitor.rules.dropout import DropoutRule
from omninorm.monitor.rules.embedding_scale import EmbeddingScale
from omninorm.monitor.rules.eps_share import EpsShare
from omninorm.monitor.rules.evaluation_mode import EvaluationMode
from omninorm.monitor.rules.gain_drift import GainDrift
from omninorm.monitor.rules.gradient_clipped import GradientClipped
from omninorm.monitor.rules.gradient_jump import GradientJump
from omninorm.monitor.rules.gradient_noise import GradientNoise
from omninorm.monitor.rules.gradient_spike import GradientSpike
from omninorm.monitor.rules.gradient_underflow import GradientUnderflow
from omninorm.monitor.rules.gradients_not_cleared import GradientsNotCleared
from omninorm.monitor.rules.headroom import Headroom
from omninorm.monitor.rules.held_out_rising import HeldOutRising
from omninorm.monitor.rules.identical_batches import IdenticalBatches
from omninorm.monitor.rules.initialization import Initialization
from omninorm.monitor.rules.input_scale import InputScale
from omninorm.monitor.rules.label_order import LabelOrder
from omninorm.monitor.rules.layer_jump import LayerJump
from omninorm.monitor.rules.learning_rate import LearningRate
from omninorm.monitor.rules.learning_rate_rises import LearningRateRises
from omninorm.monitor.rules.learning_rate_zero import LearningRateZero
from omninorm.monitor.rules.logz import LogZ
from omninorm.monitor.rules.loss_rising import LossRising
from omninorm.monitor.rules.loss_spike import LossSpike
from omninorm.monitor.rules.massive_activation import MassiveActivation
from omninorm.monitor.rules.no_gradient import NoGradientRule
from omninorm.monitor.rules.no_norm import NoNorm
from omninorm.monitor.rules.no_progress import NoProgress
from omninorm.monitor.rules.nonfinite import NonFiniteRule
from omninorm.monitor.rules.norm_missing import NormMissing
from omninorm.monitor.rules.odd_block import OddBlock
from omninorm.monitor.rules.post_norm_depth import PostNormDepth
from omninorm.monitor.rules.replicas_differ import ReplicasDiffer
from omninorm.monitor.rules.residual_missing import ResidualMissing
from omninorm.monitor.rules.router_collapse import RouterCollapse
from omninorm.monitor.rules.saturation import Saturation
from omninorm.monitor.rules.stale_parameters import StaleParameters
from omninorm.monitor.rules.steps_skipped import StepsSkipped
from omninorm.monitor.rules.stream_growth import StreamGrowth
from omninorm.monitor.rules.suspicious_loss import SuspiciousLoss
from omninorm.monitor.rules.unrecovered_spike import UnrecoveredSpike
from omninorm.monitor.rules.updates_lost import UpdatesLost
from omninorm.monitor.rules.weights_vanish import WeightsVanish

__all__ = ["Rule", "Threshold", "default_rules"]


def default_rules() -> list[Rule]:
    """Return new instances of all rules, causes before consequences."""
    return [
        NoNorm(),
        NonFiniteRule(),
        StaleParameters(),
        NoGradientRule(),
        LearningRateZero(),
        LearningRateRises(),
        GradientsNotCleared(),
        StepsSkipped(),
        UpdatesLost(),
        ReplicasDiffer(),
        DoubleSoftmax(),
        AttentionNotCausal(),
        LabelOrder(),
        Initialization(),
        InputScale(),
        EmbeddingScale(),
        NormMissing(),
        ResidualMissing(),
        LayerJump(),
        RouterCollapse(),
        DeadExperts(),
        WeightsVanish(),
        GainDrift(),
        BranchSilent(),
        EpsShare(),
        PostNormDepth(),
        LearningRate(),
        StreamGrowth(),
        GradientUnderflow(),
        GradientNoise(),
        GradientJump(),
        AdamEps(),
        OddBlock(),
        DepthGrowth(),
        AttentionLogits(),
        AttentionEntropy(),
        Headroom(),
        UnrecoveredSpike(),
        GradientClipped(),
        IdenticalBatches(),
        EvaluationMode(),
        AdamBetas(),
        AdamState(),
        AutocastLost(),
        DropoutRule(),
        NoProgress(),
        SuspiciousLoss(),
        HeldOutRising(),
        LossRising(),
        LossSpike(),
        GradientSpike(),
        AdamUnderestimation(),
        MassiveActivation(),
        LogZ(),
        DeadUnits(),
        Saturation(),
    ]
