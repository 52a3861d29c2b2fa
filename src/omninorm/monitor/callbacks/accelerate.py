"""`watch` for Accelerate: prepared models and optimizers, `accelerator.accumulate`, mixed precision."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from omninorm.errors import ConfigError, MissingExtraError
from omninorm.monitor.arguments import read_facts, read_loss
from omninorm.monitor.callbacks.driver import Total
from omninorm.monitor.rules import Rule
from omninorm.monitor.session import Watch
from omninorm.monitor.sinks import Sink
from omninorm.monitor.writer import rank

try:
    from accelerate import Accelerator  # type: ignore[import-untyped]
    from accelerate.optimizer import AcceleratedOptimizer  # type: ignore[import-untyped]
except ImportError as error:
    remedy = "Install it with pip install accelerate"
    raise MissingExtraError("Watching an Accelerate loop needs the package accelerate", "", remedy) from error

SETTINGS = ("mixed_precision", "gradient_accumulation_steps", "num_processes")
"""The attributes of the Accelerator that the report page shows."""


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
    replicas: bool = True,
    config: Mapping[str, Any] | None = None,
    name: str | None = None,
) -> AcceleratedWatch:
    """Monitor a loop whose model and optimizer were returned by `accelerator.prepare`, as `omninorm.watch` does.

    Call `step(loss)` once per batch, with the loss before `accelerator.backward`. A step ends only when
    `accelerator.accumulate` completes an optimizer step; its loss is the mean over its batches. The GradScaler is taken
    from the accelerator.

    Args:
        accelerator: the Accelerator of the loop.
        model: as returned by `prepare`. Shards of FullyShardedDataParallel and DeepSpeed are not supported.
        optimizer: as returned by `prepare`; one, several, or None.
        every, folder, step, sinks, rules, replicas, config, name: as for `omninorm.watch`; steps are optimizer steps.
            Only the first process writes to sinks. The accelerator's settings are added to `config`.

    Raises:
        ConfigError: an argument has the wrong type, or the model is already being watched.
    """
    if not isinstance(accelerator, Accelerator):
        remedy = "pass the Accelerator of the loop as the first argument"
        raise ConfigError("accelerator must be an accelerate.Accelerator", type(accelerator).__name__, remedy)
    given = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer or ())
    found = [inner for one in given if (inner := inner_optimizer(one)) is not None]
    own_sinks = tuple(sinks) if rank() == 0 else ()
    read_facts(config, name)
    return AcceleratedWatch(
        accelerator,
        model,
        found,
        every,
        folder,
        step=step,
        sinks=own_sinks,
        rules=rules,
        replicas=replicas,
        config={**{setting: getattr(accelerator, setting) for setting in SETTINGS}, **(config or {})},
        name=name,
    )


class AcceleratedWatch(Watch):
    """A Watch whose `step` is called for every batch, in a loop that may accumulate gradients."""

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
        """End a batch, and a training step if the gradients are complete.

        Raises:
            InputError: the loss is neither a real tensor nor a number.
            RunError: the watch is not open.
        """
        value = read_loss(loss)
        if value is not None:
            self._losses.add(value)
        if self._accelerator.sync_gradients:
            super().step(self._losses.take(mean=True))


def inner_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer | None:
    """Return the torch optimizer that `prepare` has wrapped; None if there is none, as with DeepSpeed.

    Accelerate's wrapper is a subclass of torch.optim.Optimizer but has no hooks.
    """
    if not isinstance(optimizer, AcceleratedOptimizer):
        return optimizer
    inner = optimizer.optimizer
    return inner if isinstance(inner, torch.optim.Optimizer) else None
