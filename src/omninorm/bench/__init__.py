"""The CPU benchmark: omninorm's operators against their peers and the memory-bandwidth bound."""

from omninorm.bench.config import BenchConfig
from omninorm.bench.process import measure_all

__all__ = ["BenchConfig", "measure_all"]
