"""Static checks of a checkpoint. Its weights are read tensor by tensor, and nothing is unpickled."""

from omninorm.inspection.against.compare import Comparison, compare_weights
from omninorm.inspection.against.explain import Difference
from omninorm.inspection.findings import Finding
from omninorm.inspection.inspect import Inspection, inspect_checkpoint

__all__ = ["Comparison", "Difference", "Finding", "Inspection", "compare_weights", "inspect_checkpoint"]
