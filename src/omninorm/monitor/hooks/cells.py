"""The cells of a sample: which raw signals there are for each block, each norm and the run."""

from __future__ import annotations

from omninorm.monitor.model_map.structure import Structure

BLOCK_CELLS = (
    "stream_ms",
    "stream_max",
    "stream_median",
    "input_ms",
    "difference_ms",
    "angle",
    "attention_ms",
    "feed_forward_ms",
    "stream_grad_ms",
    "attention_logit",
    "attention_entropy",
    "dead_units",
    "hidden_future",
)
NORM_CELLS = ("norm_ms", "eps_share", "mean_share", "saturation", "noise_small", "noise_big", "examples")
RUN_CELLS = ("logz", "logz_mean", "zero_rows", "probabilities", "next_tokens", "shifted_tokens", "same_tokens")


def cell_sizes(structure: Structure) -> dict[str, int]:
    """Return how many cells each raw signal needs."""
    blocks, norms = len(structure.blocks), len(structure.norms)
    return {**dict.fromkeys(BLOCK_CELLS, blocks), **dict.fromkeys(NORM_CELLS, norms), **dict.fromkeys(RUN_CELLS, 1)}
