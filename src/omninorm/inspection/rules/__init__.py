"""Rules for single tensors, for channels, and for the whole model."""

from omninorm.inspection.rules.channels import channel_findings
from omninorm.inspection.rules.model import model_findings
from omninorm.inspection.rules.tensor import tensor_findings

__all__ = ["channel_findings", "model_findings", "tensor_findings"]
