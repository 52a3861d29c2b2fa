"""Compare the weights of two checkpoints, tensor by tensor, and explain what differs."""

from omninorm.inspection.against.compare import Comparison, compare_weights
from omninorm.inspection.against.explain import Difference

__all__ = ["Comparison", "Difference", "compare_weights"]
