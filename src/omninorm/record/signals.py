"""The signals of a monitored run, each with its formula and the axis along which it has values."""

from __future__ import annotations

from typing import NamedTuple


class Signal(NamedTuple):
    """A signal: its axis, title and formula, whether its scale is logarithmic, and its fixed scale if it has one.

    A signal has one value per sample (axis "run"), one per transformer block ("block"), one per norm ("norm"), or one
    per group of parameters ("group"): each block, and each part of the model outside the blocks.
    """

    axis: str
    title: str
    formula: str
    logarithmic: bool = False
    scale: tuple[float, float] | None = None


class Limit(NamedTuple):
    """A limit of an alarm rule on one signal, as it is stored in the record and drawn on the page.

    Args:
        signal: the signal's name.
        rule: the rule's name.
        warn: the value at which the rule warns, or None.
        fail: the value at which the rule reports a failure, or None.
        below: whether values below the limits are the problem.
        condition: a further condition of the rule as text; "" without one.
        dtype: the only dtype of the residual stream in which the rule is active; "" for any.
    """

    signal: str
    rule: str
    warn: float | None = None
    fail: float | None = None
    below: bool = False
    condition: str = ""
    dtype: str = ""


SHARE = (0.0, 1.0)
TINY_SHARE = (1e-6, 1.0)

SIGNALS: dict[str, Signal] = {
    # Measured in the forward pass.
    "stream_rms": Signal("block", "residual stream", "RMS(x) of the block's output", True),
    "stream_max": Signal("block", "largest activation", "max |x| of the block's output", True),
    "stream_median": Signal("block", "median activation", "median |x| of the block's output", True),
    "branch_ratio": Signal("block", "branch / stream", "RMS(output − input) / RMS(input) of the block", True),
    "attention_ratio": Signal("block", "attention / stream", "RMS(attention's output) / RMS(block's input)", True),
    "feed_forward_ratio": Signal("block", "feed-forward / stream", "RMS(its output) / RMS(block's input)", True),
    "angle": Signal("block", "angular distance", "arccos cos(input, output) / π, mean over tokens", scale=SHARE),
    "attention_logit": Signal("block", "largest attention logit", "max |q·k| / √d_head", True),
    "attention_entropy": Signal(
        "block", "attention entropy", "−Σ p ln p / ln(keys in sight), mean over heads", scale=SHARE
    ),
    "dead_units": Signal(
        "block", "dead hidden units", "share of the feed-forward's units that are ≈ 0 for all tokens", scale=SHARE
    ),
    "expert_load": Signal(
        "block", "load of the busiest experts", "share of the choices that the k most chosen experts get", scale=SHARE
    ),
    "expert_least": Signal("block", "load of the idlest expert", "its share of the choices / that of a balanced load"),
    "norm_rms": Signal("norm", "norm's input", "RMS(x)", True),
    "eps_share": Signal("norm", "ε share", "ε / (mean(x²) + ε); a LayerNorm's with var(x)", True, scale=TINY_SHARE),
    "mean_share": Signal("norm", "mean share", "mean(x)² / mean(x²) at a LayerNorm", True, scale=TINY_SHARE),
    "saturation": Signal("norm", "saturation", "share of |αx| > 2 at a DyT or Derf", scale=SHARE),
    "logz": Signal("run", "output normalizer", "log Z, of the largest magnitude among tokens"),
    "logz_mean": Signal("run", "mean output normalizer", "log Z, mean over tokens"),
    # Measured in the backward pass.
    "stream_grad": Signal("block", "gradient of the stream", "RMS(∂loss/∂x) at the block's output", True),
    "grad_norm": Signal("group", "gradient norm", "‖∂loss/∂w‖ of the group's parameters, before clipping", True),
    "noise_scale": Signal("run", "gradient noise scale", "tr Σ / |G|² in examples, from the norms' gains", True),
    # Measured on the parameters and the optimizer.
    "gain_max": Signal("norm", "largest gain", "max |γ|", True),
    "gain_ratio": Signal("norm", "gain drift", "max |γ| / median |γ|", True),
    "gain_small": Signal("norm", "silent gains", "share of |γ| < 1e-3", scale=SHARE),
    "weight_rms": Signal("group", "weights", "RMS(w) of the group's matrices", True),
    "update_ratio": Signal("group", "update / weight", "RMS(Δw) / RMS(w) of a step, median over matrices", True),
    "adam_ratio": Signal("group", "Adam under-estimation", "√mean(g² / max(v, ε²)), largest of the tensors", True),
    "adam_eps_ratio": Signal("group", "gradient / Adam's ε", "RMS(g) / ε, smallest of the matrices", True),
}

STEP_SERIES = ("loss", "grad_norm", "lr")
"""The values that are recorded for every step, not only for samples: the loss, the total gradient norm before clipping,
and the largest learning rate among the optimizer's groups."""
