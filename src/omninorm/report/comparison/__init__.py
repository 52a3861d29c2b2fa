"""A comparison's page, generated from its results.json and timings.json alone."""

from omninorm.report.comparison.markdown import write_markdown
from omninorm.report.comparison.page import write_comparison_page
from omninorm.report.comparison.reading import Comparison, is_comparison, read_comparison

__all__ = ["Comparison", "is_comparison", "read_comparison", "write_comparison_page", "write_markdown"]
