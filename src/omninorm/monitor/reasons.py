"""Reasons for missing signals, so that a gap is not mistaken for a healthy value."""

from __future__ import annotations

from omninorm.monitor.history import Facts, Sample
from omninorm.record.signals import SIGNALS

NO_BLOCKS = "the model has no recognizable stack of blocks"
NO_NORMS = "the model has no recognizable norm"
NO_ATTENTION = "no block called scaled_dot_product_attention or a softmax over keys"
NO_EXPERTS = "no router that assigns tokens to experts was recognized"
NO_ADAM = "the optimizer has no second moments in the format of torch.optim.Adam"


def not_seen(sample: Sample, facts: Facts, has_optimizer: bool) -> dict[str, str]:
    """Return the signals that the first sample lacks, with their reasons."""
    return {name: reason(name, facts, has_optimizer) for name in SIGNALS if name not in sample.signals}


def reason(name: str, facts: Facts, has_optimizer: bool) -> str:
    """Return why a signal is missing."""
    axis = SIGNALS[name].axis
    if axis == "block" and not facts.blocks:
        return NO_BLOCKS
    if axis == "norm" and not facts.norms:
        return NO_NORMS
    if name in ("update_ratio", "adam_ratio", "adam_eps_ratio") and not has_optimizer:
        return "no optimizer was passed to watch"
    if name in ("adam_ratio", "adam_eps_ratio"):
        return NO_ADAM
    return _SPECIAL.get(name, "it had no value in the first sample")


_SPECIAL = {
    "attention_logit": NO_ATTENTION,
    "attention_entropy": NO_ATTENTION,
    "attention_ratio": "the blocks have no recognizable attention",
    "feed_forward_ratio": "the blocks have no recognizable feed-forward",
    "dead_units": "the blocks have no recognizable feed-forward",
    "branch_ratio": "the blocks' inputs and outputs differ in shape, or the inputs are overwritten in place",
    "angle": "the blocks' inputs and outputs differ in shape, or the inputs are overwritten in place",
    "expert_load": NO_EXPERTS,
    "expert_least": NO_EXPERTS,
    "mean_share": "the model has no LayerNorm",
    "saturation": "the model has no DyT or Derf",
    "logz": "the model's output has no logits over a vocabulary",
    "logz_mean": "the model's output has no logits over a vocabulary",
    "stream_grad": "no gradient reached the blocks' outputs",
    "grad_norm": "no parameter had a gradient",
    "noise_scale": "no norm with a trainable gain received several examples, or noise dominates the gradient",
    "norm_rms": "no norm ran in a forward pass with gradients",
    "eps_share": "no norm with an ε ran in a forward pass with gradients",
    "gain_max": "the norms have no gain",
    "gain_ratio": "the norms have no gain",
    "gain_small": "the norms have no gain",
}
