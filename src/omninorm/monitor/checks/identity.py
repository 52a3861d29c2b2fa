"""Detects parameters that were replaced, added or removed, and optimizers that hold other tensors than the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import nn

from omninorm.kernels.distributed import is_distributed
from omninorm.monitor.checks.checksum import checksum
from omninorm.monitor.checks.facts import Stale


class Identity:
    """Compares the model's parameters with those at the beginning."""

    def __init__(
        self, model: nn.Module, named: Sequence[tuple[str, nn.Parameter]], optimizers: Sequence[torch.optim.Optimizer]
    ) -> None:
        self._model, self._before, self._optimizers = model, dict(named), optimizers
        # FSDP puts gathered parameters in place of the sharded ones, and back.
        self._known = not any(is_distributed(parameter) for _, parameter in named)
        self._sums: dict[int, float] = {}
        self._modules = list(model.modules())
        self._ids = self._ids_now()
        if self._known:
            self._foreign(self._before)

    def changed(self) -> Stale | None:
        """Return what was replaced, added or removed since the beginning; None if nothing was."""
        return None if not self._known or self._ids_now() == self._ids else self._compare(look_for_foreign=False)

    def compare(self) -> Stale | None:
        """Return what differs, including tensors that only the optimizers hold; None if nothing does."""
        if not self._known:
            return None
        if self._ids_now() == self._ids:
            foreign = self._foreign(self._before)
            return self._stale([], [], [], foreign, self._before) if foreign else None
        return self._compare(look_for_foreign=True)

    def _compare(self, look_for_foreign: bool) -> Stale | None:
        now = dict(self._model.named_parameters())
        old, new = {id(p) for p in self._before.values()}, {id(p) for p in now.values()}
        # By identity, because pruning gives the same parameter another name.
        added = [name for name, parameter in now.items() if id(parameter) not in old]
        removed = [name for name, parameter in self._before.items() if id(parameter) not in new]
        replaced = [name for name in added if name in removed]
        added, removed = [name for name in added if name not in replaced], [n for n in removed if n not in replaced]
        foreign = self._foreign(now) if look_for_foreign else 0
        if not (replaced or added or removed or foreign):
            return None
        return self._stale(replaced, added, removed, foreign, now)

    def _stale(
        self, replaced: list[str], added: list[str], removed: list[str], foreign: int, now: dict[str, nn.Parameter]
    ) -> Stale:
        held = self.held()
        candidates = now if foreign else [*replaced, *added]
        unheld = [name for name in candidates if now[name].requires_grad and id(now[name]) not in held]
        if not self._optimizers:
            unheld = []
        return Stale(tuple(replaced), tuple(added), tuple(removed), tuple(unheld), foreign)

    def _ids_now(self) -> list[int]:
        """Return the ids of all modules and parameters that the modules of the beginning hold."""
        tables = (table for module in self._modules for table in (module._modules, module._parameters))
        return [id(each) for table in tables for each in table.values()]

    def gone(self) -> frozenset[int]:
        """Return the indices of the parameters at the beginning that are no longer in the model."""
        if not self._known:
            return frozenset()
        now = {id(parameter) for parameter in self._model.parameters()}
        return frozenset(at for at, parameter in enumerate(self._before.values()) if id(parameter) not in now)

    def held(self) -> set[int]:
        """Return the ids of all tensors in the optimizers."""
        return {id(p) for optimizer in self._optimizers for group in optimizer.param_groups for p in group["params"]}

    def _foreign(self, now: dict[str, nn.Parameter]) -> int:
        """Return how many tensors the optimizers hold that are not the model's, while trainable parameters of the same
        shapes and dtypes are in no optimizer; 0 if one of them has no such counterpart, or if those parameters have
        changed: then the optimizer's tensors are master weights that are copied to the model."""
        held = [p for optimizer in self._optimizers for group in optimizer.param_groups for p in group["params"]]
        ours = {id(parameter) for parameter in now.values()}
        strangers = Counter((tuple(p.shape), p.dtype) for p in held if id(p) not in ours)
        if not strangers:
            return 0
        ids = {id(p) for p in held}
        missing = [p for p in now.values() if p.requires_grad and id(p) not in ids]
        if strangers - Counter((tuple(p.shape), p.dtype) for p in missing) or self._change(missing):
            return 0
        return strangers.total()

    def _change(self, parameters: Sequence[nn.Parameter]) -> bool:
        """Return whether some elements have changed since the last call, or True if they are seen for the first time.
        Only for parameters that seem not to be trained, because this reads numbers from the device."""
        before, self._sums = self._sums, {id(p): float(checksum([p])) for p in parameters if p.numel() > 0}
        return any(before.get(at) != value for at, value in self._sums.items())
