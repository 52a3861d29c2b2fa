"""Checks and conversions of the arguments of `watch` and `Watch.step`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from omninorm.config import read_count
from omninorm.errors import ConfigError, InputError
from omninorm.monitor.history import Evaluation
from omninorm.record import Record
from omninorm.record.alarm import Alarm

COVERAGE = "optimizer-coverage"
NAMED = 3
"""The number of parameters and modules without an optimizer that are listed by name."""


def read_optimizers(
    optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] | None,
) -> tuple[torch.optim.Optimizer, ...]:
    """Return the optimizers as a tuple."""
    if optimizer is None:
        return ()
    found = tuple(optimizer) if isinstance(optimizer, Iterable) else (optimizer,)
    for item in found:
        if not isinstance(item, torch.optim.Optimizer):
            remedy = "pass a torch.optim.Optimizer, a list of them, or None"
            raise ConfigError("optimizer must be one or several torch.optim.Optimizer", type(item).__name__, remedy)
        if not hasattr(item, "_optimizer_step_pre_hooks"):  # its class does not call Optimizer.__init__
            remedy = "pass the optimizer that it wraps"
            raise ConfigError("optimizer must support hooks on its steps", type(item).__name__, remedy)
    return found


def check_places(folder: object, scaler: object, sinks: Sequence[object]) -> None:
    """Raise ConfigError unless the folder, the scaler and the sinks have supported types."""
    if not isinstance(folder, (str, os.PathLike, Record, type(None))):
        raise ConfigError("folder must be a path or None", repr(folder), 'for example, pass "runs/mine"')
    if scaler is not None and not callable(getattr(scaler, "get_scale", None)):
        raise ConfigError("scaler must be a torch.amp.GradScaler or None", repr(scaler), "pass the scaler of the loop")
    for sink in sinks if isinstance(sinks, Iterable) and not isinstance(sinks, str) else [sinks]:
        if not all(callable(getattr(sink, name, None)) for name in ("log", "alarm", "close")):
            remedy = "for example, pass [TensorBoard(folder)] from omninorm.monitor.sinks"
            raise ConfigError("Every sink must have the methods log, alarm and close", repr(sink), remedy)


def read_facts(config: Mapping[str, Any] | None, name: str | None, otherwise: str | None = None) -> dict[str, Any]:
    """Return the run's name and settings for the record's first event. Values without a form in JSON become text.

    Args:
        otherwise: the name of a run without one, whose page is not named after its folder.

    Raises:
        ConfigError: config is not a dictionary with text as keys, or name is not text.
    """
    if name is not None and not isinstance(name, str):
        raise ConfigError("name must be text or None", repr(name)[:80], 'for example, pass "width 512, seed 0"')
    if config is not None and (not isinstance(config, Mapping) or not all(isinstance(key, str) for key in config)):
        remedy = 'for example, pass {"batch_size": 32}, or vars(args)'
        raise ConfigError("config must be a dictionary with text as keys, or None", repr(config)[:80], remedy)
    try:
        settings = json.loads(json.dumps(dict(config or {}), default=str, skipkeys=True))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"config cannot be recorded ({error})", "", "pass numbers and text") from error
    name = name or otherwise
    return {**({"name": name} if name else {}), **({"config": settings} if settings else {})}


def uncovered(
    named: Sequence[tuple[str, nn.Parameter]], optimizers: Sequence[torch.optim.Optimizer], step: int
) -> list[Alarm]:
    """Return a warning about trainable parameters that are in no optimizer, if optimizers were given."""
    held = {
        id(parameter) for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"]
    }
    missing = [name for name, parameter in named if parameter.requires_grad and id(parameter) not in held]
    if not optimizers or not missing:
        return []
    trainable = [name for name, parameter in named if parameter.requires_grad]
    places = whole_modules(missing, trainable)
    listed = ", ".join(place if place in trainable else f"all of {place}" for place in places[:NAMED])
    more = f" and {len(places) - NAMED} more" if len(places) > NAMED else ""
    layer: str | None = places[0]
    found = f"{len(missing)} of {len(named)} parameters are trainable but in no optimizer: {listed}{more}"
    remedy = "Pass every optimizer to watch and add these parameters to one of them, or freeze them."
    if len(missing) == len(trainable) and held:
        layer, found = None, "the optimizer holds no trainable parameter of this model"
        remedy = "Create the optimizer from the model that is passed to watch, after the last change to it: a copy has "
        remedy += "other parameters."
    evidence = f"Weights without an optimizer: {found}."
    source = "every trainable parameter needs an optimizer"
    return [Alarm(step, "warn", COVERAGE, layer, evidence, remedy, source)]


def whole_modules(names: Sequence[str], among: Sequence[str]) -> list[str]:
    """Return the names of parameters, with those of the largest modules that have no other parameter `among` these and
    several of `names` replaced by the module's name."""
    others = set(among) - set(names)

    def place(name: str) -> str:
        parts = name.split(".")
        for owner in (f"{'.'.join(parts[:count])}." for count in range(1, len(parts))):
            if not any(other.startswith(owner) for other in others):
                return owner[:-1] if sum(each.startswith(owner) for each in names) > 1 else name
        return name

    return list(dict.fromkeys(map(place, names)))


def read_loss(loss: Tensor | float | None) -> Tensor | None:
    """Return the loss as a tensor.

    Raises:
        InputError: the loss is neither a real tensor nor a number.
    """
    if loss is None:
        return None
    if isinstance(loss, Tensor) and loss.numel() > 0 and not loss.is_complex():
        return loss.detach()
    if isinstance(loss, Real) and not isinstance(loss, bool):  # also NumPy scalars
        return torch.tensor(float(loss), dtype=torch.float64, device="cpu")
    received = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
    raise InputError("The loss must be a real tensor, a number or None", received, "pass the loss of the step")


def read_evaluation(loss: Tensor | float, step: int, name: str) -> Evaluation:
    """Return the arguments of `Watch.log_eval`, checked.

    Raises:
        ConfigError: the step is not a whole number of 0 or more.
        InputError: the loss is neither a real tensor nor a number.
    """
    value = read_loss(loss)
    if value is None:
        raise InputError("The loss must be a real tensor or a number", "None", "pass the loss of the evaluation")
    return Evaluation(read_count("step", step, at_least=0), str(name), float(value.double().mean()))


def printable(text: str) -> str:
    """Escape control characters: names of modules may contain anything."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
