"""Norm placements: one small class per placement, and the Block that applies a placement to its two sublayers."""

from omninorm.placement.base import Placement, Position, Stream, Sublayer
from omninorm.placement.block import PLACEMENT_TYPES, Block, FinalNorm, enter, init_gain, inner_norms
from omninorm.placement.ngpt import keep_normalized, normalize_weights

__all__ = [
    "PLACEMENT_TYPES",
    "Block",
    "FinalNorm",
    "Placement",
    "Position",
    "Stream",
    "Sublayer",
    "enter",
    "init_gain",
    "inner_norms",
    "keep_normalized",
    "normalize_weights",
]
