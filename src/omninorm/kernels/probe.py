"""Probe interface: row statistics and dγ partial sums that a norm computes anyway.

A monitor sets `current` right before a norm runs and resets it right after. It then receives these numbers without
another pass over the data. With None, the usual value, there is no cost. The norm passes its backward pass to the probe
that received its forward pass.

Only norms of the `cpu` back end that will be differentiated call a probe: not the reference, not norms under
torch.compile or in no_grad, and no backward pass that is itself differentiated (create_graph).
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Probe(Protocol):
    """Receives a norm's statistics, in no_grad.

    The tensors belong to the norm: read them immediately and do not store them, which would keep activations alive.
    Exceptions reach the caller of the norm or of backward().
    """

    def forward(self, x: Tensor, scale: Tensor, mean: Tensor | None, eps: float) -> None:
        """Called after a norm's forward pass.

        Args:
            x: (..., d), the normalized tensor: for the add_ variants the sum. Of any strides.
            scale: r = 1/√(mean square + ε), for LayerNorm of x − μ; (rows,), float64 for float64 rows, otherwise
                float32. As the backward pass will use it: 0 or NaN for rows that are not finite.
            mean: of each row, like `scale`; None for RMSNorm.
            eps: ε.
        """

    def backward(self, dy: Tensor, dgain: Tensor | None, blocks: Tensor | None, rows_per_block: int) -> None:
        """Called after each backward pass through the norm; never if the loss does not depend on y.

        Args:
            dy: (..., d), the gradient of the output. Of any strides.
            dgain: dγ, (d,), in the gain's dtype; None if it was not computed: without a gain, or if neither it
                nor a bias requires a gradient.
            blocks: (number of blocks, d), float64: row b is Σ dy · x̂ over the rows b · rows_per_block to
                (b + 1) · rows_per_block − 1. dγ is the sum of the blocks, rounded. None if dγ is None.
            rows_per_block: rows in each block but the last; depends only on the number of rows.
        """


# The probe of the norm that runs next, in any thread.
current: Probe | None = None
