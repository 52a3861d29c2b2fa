"""The CPU benchmark: compares omninorm's operators with other implementations and the memory-bandwidth bound."""

from omninorm.bench.config import BenchConfig
from omninorm.bench.process import measure_all

__all__ = ["BenchConfig", "measure_all"]
