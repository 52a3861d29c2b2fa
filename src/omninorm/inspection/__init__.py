"""Static health of a checkpoint: what its weights alone say, read tensor by tensor, nothing unpickled."""

from omninorm.inspection.findings import Finding
from omninorm.inspection.inspect import Inspection, inspect_checkpoint

__all__ = ["Finding", "Inspection", "inspect_checkpoint"]
