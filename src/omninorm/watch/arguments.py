"""What `watch` and its steps are given: read and checked."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from numbers import Real

import torch
from torch import Tensor, nn

from omninorm.errors import ConfigError, InputError
from omninorm.record import Record
from omninorm.watch.alarm import Alarm


def read_optimizers(
    optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] | None,
) -> tuple[torch.optim.Optimizer, ...]:
    """The optimizers as a tuple."""
    if optimizer is None:
        return ()
    found = tuple(optimizer) if isinstance(optimizer, Iterable) else (optimizer,)
    for item in found:
        if not isinstance(item, torch.optim.Optimizer):
            remedy = "pass a torch.optim.Optimizer, several, or None"
            raise ConfigError("watch needs optimizers of torch", type(item).__name__, remedy)
    return found


def check_places(folder: object, scaler: object, sinks: Sequence[object]) -> None:
    """Raises ConfigError unless the folder, the scaler and the sinks are what `watch` takes."""
    if not isinstance(folder, (str, os.PathLike, Record, type(None))):
        raise ConfigError("folder must be a path or None", repr(folder), 'pass e.g. "runs/mine"')
    if scaler is not None and not callable(getattr(scaler, "get_scale", None)):
        raise ConfigError("scaler must be a GradScaler or None", repr(scaler), "pass the torch.amp.GradScaler")
    for sink in sinks if isinstance(sinks, Iterable) and not isinstance(sinks, str) else [sinks]:
        if not all(callable(getattr(sink, name, None)) for name in ("log", "alarm", "close")):
            remedy = "pass e.g. [TensorBoard(folder)], from omninorm.watch.sinks"
            raise ConfigError("each of sinks must have log, alarm and close", repr(sink), remedy)


def uncovered(
    named: Sequence[tuple[str, nn.Parameter]], optimizers: Sequence[torch.optim.Optimizer], step: int
) -> list[Alarm]:
    """A warning about parameters that learn and are in no optimizer, if optimizers were given."""
    held = {
        id(parameter) for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"]
    }
    missing = [name for name, parameter in named if parameter.requires_grad and id(parameter) not in held]
    if not optimizers or not missing:
        return []
    found = f"{len(missing)} of {len(named)} parameters that require gradients, {missing[0]} first"
    if len(missing) == len(named):
        found = "it holds no parameter of this model"
    evidence = f"Weights without an optimizer: {found}."
    remedy = "Pass every optimizer to watch, and these parameters to one of them; or freeze them."
    return [
        Alarm(step, "warn", "optimizer-coverage", missing[0], evidence, remedy, "every weight that learns needs one")
    ]


def read_loss(loss: Tensor | float | None) -> Tensor | None:
    """The loss as a tensor.

    Raises:
        InputError: neither a real tensor nor a number.
    """
    if loss is None:
        return None
    if isinstance(loss, Tensor) and loss.numel() > 0 and not loss.is_complex():
        return loss.detach()
    if isinstance(loss, Real) and not isinstance(loss, bool):  # NumPy's numbers, too
        return torch.tensor(float(loss))
    received = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
    raise InputError("the loss must be a real tensor, a number or None", received, "pass the loss of the step")


def printable(text: str) -> str:
    """Without what would steer a terminal; names of modules may hold anything."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
