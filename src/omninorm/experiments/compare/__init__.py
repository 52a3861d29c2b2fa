"""Comparisons of norms and placements: plans, their runs (cells), outcomes and verdicts."""

from omninorm.experiments.compare import needs  # noqa: F401  imported first, for a readable error
from omninorm.experiments.compare.cells import Cell, Measurement
from omninorm.experiments.compare.plan import ComparePlan, Study, parse_plan, read_plan
from omninorm.experiments.compare.presets import PRESETS, preset

__all__ = ["PRESETS", "Cell", "ComparePlan", "Measurement", "Study", "parse_plan", "preset", "read_plan"]
