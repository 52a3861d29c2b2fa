"""Probe interface: row statistics and dγ partial sums that a norm computes anyway.

A monitor sets `current` to a probe right before a norm runs and resets it right after. The probe receives these numbers
without another pass over the data. If `current` is None, as usual, there is no cost. The backward pass calls the same
probe as the forward pass.

Only norms that omninorm's operators compute and that will be differentiated call a probe. The reference, norms under
torch.compile or no_grad, and backward passes that are themselves differentiated (create_graph) do not.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Probe(Protocol):
    """Receives a norm's statistics, under no_grad.

    The tensors belong to the norm: read them immediately and do not store them, which would keep activations alive.
    Exceptions propagate to the caller of the norm or of backward().
    """

    def forward(self, x: Tensor, scale: Tensor, mean: Tensor | None, eps: float) -> None:
        """Called after a norm's forward pass.

        Args:
            x: (..., d), the norm's input, with any strides; for the add_ variants the sum.
            scale: (rows,), r = 1/√(mean square + ε), where LayerNorm takes the mean square of x − μ. float64 for
                float64 rows, otherwise float32. The backward pass uses the same values: 0 or NaN for rows that are
                not finite.
            mean: the mean of each row, in the shape and dtype of `scale`; None for RMSNorm.
            eps: ε.
        """

    def backward(self, dy: Tensor, dgain: Tensor | None, blocks: Tensor | None, rows_per_block: int) -> None:
        """Called after each backward pass through the norm; never if the loss does not depend on y.

        Args:
            dy: (..., d), the gradient of the output, with any strides.
            dgain: dγ, (d,), in the gain's dtype; None if it was not computed: there is no gain, or neither the gain
                nor the bias requires a gradient.
            blocks: (number of blocks, d), float64 (from Triton in x's compute dtype): row b is Σ dy · x̂ over the rows
                b · rows_per_block to (b + 1) · rows_per_block − 1. dγ is the sum of the blocks, rounded. None if dγ is
                None.
            rows_per_block: the number of rows in each block but the last; it depends only on the number of rows.
        """


# The probe that the next norm calls, in any thread.
current: Probe | None = None
