"""Calls of torch.nn.functional.dropout inside blocks, which no module hook sees."""

from __future__ import annotations

from omninorm.monitor.model_map.parts import Block


class FunctionalDropout:
    """The calls of one step. Blocks are known only in sampled steps, so others have none.

    Attributes:
        active: the largest probability in each block that trains with dropout, by name.
        is_off: whether trainable blocks have called it, and all of them in evaluation mode; None without a call.
        evaluated: whether it was active in a pass of the model without gradients, in any step.
    """

    def __init__(self) -> None:
        self.clear()
        self._trainable: dict[str, bool] = {}

    def clear(self) -> None:
        self.active: dict[str, float] = {}
        self._on = self._off = self.evaluated = False

    @property
    def is_off(self) -> bool | None:
        return self._off and not self._on if self._off or self._on else None

    def see(self, block: Block, p: float, training: bool) -> None:
        """Record a call with probability p."""
        if p <= 0.0:
            return
        if training:
            self._on = True
            self.active[block.name] = max(p, self.active.get(block.name, 0.0))
        elif not self._off:
            if block.name not in self._trainable:
                self._trainable[block.name] = any(p.requires_grad for p in block.module.parameters())
            self._off = self._trainable[block.name]
