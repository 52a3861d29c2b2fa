"""Why a signal was not seen: a silent gap would look like health."""

from __future__ import annotations

from omninorm.record.signals import SIGNALS
from omninorm.watch.history import Facts, Sample

NO_BLOCKS = "no stack of blocks was found in the model"
NO_NORMS = "no norm was found in the model"
NO_ATTENTION = "no call of scaled_dot_product_attention or of a softmax over keys was seen inside a block"
NO_ADAM = "the optimizer keeps no second moment of the model's weights, as Adam does"


def not_seen(sample: Sample, facts: Facts, has_optimizer: bool) -> dict[str, str]:
    """The signals that the first sample lacks, each with its reason."""
    return {name: reason(name, facts, has_optimizer) for name in SIGNALS if name not in sample.signals}


def reason(name: str, facts: Facts, has_optimizer: bool) -> str:
    axis = SIGNALS[name].axis
    if axis == "block" and not facts.blocks:
        return NO_BLOCKS
    if axis == "norm" and not facts.norms:
        return NO_NORMS
    if name in ("update_ratio", "adam_ratio", "adam_eps_ratio") and not has_optimizer:
        return "no optimizer was given to watch"
    if name in ("adam_ratio", "adam_eps_ratio"):
        return NO_ADAM
    return _SPECIAL.get(name, "nothing was seen of it in the first sample")


_SPECIAL = {
    "attention_logit": NO_ATTENTION,
    "attention_entropy": NO_ATTENTION,
    "attention_ratio": "no attention was found in the blocks",
    "feed_forward_ratio": "no feed-forward was found in the blocks",
    "dead_units": "no feed-forward was found in the blocks",
    "branch_ratio": "the blocks' input and output differ in shape, or the input is overwritten",
    "angle": "the blocks' input and output differ in shape, or the input is overwritten",
    "mean_share": "the model has no LayerNorm",
    "saturation": "the model has no DyT or Derf",
    "logz": "the model's output has no logits over a vocabulary",
    "logz_mean": "the model's output has no logits over a vocabulary",
    "stream_grad": "no gradient reached the blocks' outputs",
    "grad_norm": "no parameter had a gradient",
    "noise_scale": "no norm with a gain saw several examples, or the gradient is lost in their noise",
    "norm_rms": "no norm ran on the model's way to the loss",
    "eps_share": "no norm with an ε ran on the model's way to the loss",
    "gain_max": "the norms have no gain",
    "gain_ratio": "the norms have no gain",
    "gain_small": "the norms have no gain",
}
