"""What a norm knows anyway, for whoever watches it: r and the mean of each row, and the parts that dγ was summed from.

The operators of `cpu` compute these numbers in any case. A watcher sets `current` right before a norm runs and takes it
away right after, and so receives them without another pass over the data; with None there, as usual, nothing is done
for it. The norm keeps the probe that saw its forward pass and shows it the backward pass too.

Only `cpu`'s norms that will be differentiated show anything: not the reference, not a norm under torch.compile, nor one
in no_grad, nor a backward pass that is itself differentiated (create_graph).
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Probe(Protocol):
    """Receives a norm's numbers, in no_grad. They are the norm's own tensors, only to be read, and only at once:
    to keep them would keep the activations. What it raises reaches who called the norm, or backward().
    """

    def forward(self, x: Tensor, scale: Tensor, mean: Tensor | None, eps: float) -> None:
        """After a norm's forward pass.

        Args:
            x: (..., d), what was normalized: for the add_ variants the sum. Of any strides.
            scale: r = 1/√(mean square + ε), of the deviations for LayerNorm; (rows,), float64 for float64 rows, else
                float32. As the backward pass will use it: 0 or NaN for rows that are not finite.
            mean: of each row, like `scale`; None for RMSNorm.
            eps: ε.
        """

    def backward(self, dy: Tensor, dgain: Tensor | None, blocks: Tensor | None, rows_per_block: int) -> None:
        """After its backward pass; each, if there are several, and none if y had no part in the loss.

        Args:
            dy: (..., d), the gradient of the output. Of any strides.
            dgain: dγ, (d,), in the gain's dtype; None where it was not computed: without a gain, or where neither it
                nor a bias learns.
            blocks: (number of blocks, d), float64: row b is Σ dy · x̂ over the rows from b · rows_per_block on, as many
                or, in the last block, what is left of them. dγ is their sum, rounded. None where dγ is.
            rows_per_block: of one call's rows; it depends on their number alone.
        """


# Who watches the norm that runs next, in whichever thread.
current: Probe | None = None
