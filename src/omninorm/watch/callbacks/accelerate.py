"""`watch` for loops with Accelerate: prepared models and optimizers, `accelerator.accumulate`, mixed precision."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from omninorm.errors import ConfigError, MissingExtraError
from omninorm.watch.arguments import read_loss
from omninorm.watch.callbacks.driver import Total
from omninorm.watch.output import rank
from omninorm.watch.rules import Rule
from omninorm.watch.sinks import Sink
from omninorm.watch.watching import Watch

try:
    from accelerate import Accelerator  # type: ignore[import-untyped]
    from accelerate.optimizer import AcceleratedOptimizer  # type: ignore[import-untyped]
except ImportError as error:
    remedy = "install it with pip install accelerate"
    raise MissingExtraError("watching an Accelerate loop needs accelerate", "no such package", remedy) from error


def watch(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] | None = None,
    every: int = 10,
    folder: str | Path | None = None,
    *,
    step: int = 0,
    sinks: Sequence[Sink] = (),
    rules: Sequence[Rule] | None = None,
) -> AcceleratedWatch:
    """`omninorm.watch` for what `accelerator.prepare` returned.

    Call `step(loss)` once per batch, with the loss before `accelerator.backward`: only where `accelerator.accumulate`
    completes an optimizer's step does a step end, whose loss is the mean over its batches. A GradScaler is found.

    Args:
        accelerator: the loop's.
        model: as `prepare` returned it. Shards of FullyShardedDataParallel and DeepSpeed are not understood.
        optimizer: likewise; one, several, or None.
        every, folder, step, sinks, rules: as those of `omninorm.watch`; a step is one of the optimizer. Sinks are
            told by the first process alone.

    Raises:
        ConfigError: an argument of the wrong kind, or a model that is being watched already.
    """
    if not isinstance(accelerator, Accelerator):
        raise ConfigError("watch needs the loop's Accelerator first", type(accelerator).__name__, "pass accelerator")
    given = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer or ())
    found = [inner for one in given if (inner := inner_optimizer(one)) is not None]
    told = tuple(sinks) if rank() == 0 else ()
    return AcceleratedWatch(accelerator, model, found, every, folder, step=step, sinks=told, rules=rules)


class AcceleratedWatch(Watch):
    """A Watch whose `step` is called for every batch of a loop that may accumulate gradients."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        every: int,
        folder: str | Path | None,
        **others: Any,
    ) -> None:
        scaler = getattr(accelerator, "scaler", None)
        super().__init__(model, optimizers, every, folder, scaler=scaler, **others)
        self._accelerator = accelerator
        self._losses = Total()

    def step(self, loss: Tensor | float | None = None) -> None:
        """Ends a batch, and a training step where the gradients were complete.

        Raises:
            InputError: the loss is neither a real tensor nor a number.
            RunError: the watch has not begun or has ended.
        """
        value = read_loss(loss)
        if value is not None:
            self._losses.add(value)
        if self._accelerator.sync_gradients:
            super().step(self._losses.take(mean=True))


def inner_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer | None:
    """The optimizer of torch inside of what `prepare` made of it; None where it is none, as DeepSpeed's.

    Accelerate's wrapper passes for a torch.optim.Optimizer but has no hooks of its own.
    """
    if not isinstance(optimizer, AcceleratedOptimizer):
        return optimizer
    inner = optimizer.optimizer
    return inner if isinstance(inner, torch.optim.Optimizer) else None
