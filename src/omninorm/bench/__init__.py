"""The benchmark: our operators against their peers and against what memory allows, on this machine."""

from omninorm.bench.config import BenchConfig
from omninorm.bench.process import measure_all

__all__ = ["BenchConfig", "measure_all"]
