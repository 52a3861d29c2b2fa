"""Runs of a model in a proof: its probes, in evaluation and in training mode, with every expert, and their outputs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from omninorm.errors import InputError
from omninorm.surgery.modes import EveryExpert, InDouble, expert_counts

_DEPTH = 6  # the levels of nested outputs that are compared, such as a cache's layers
_MOST_TURNS = 64  # of experts; those that are not chosen by then count as unreached
_REMEDY = "pass inputs=[…] that it takes: tensors, or dictionaries of keyword arguments"
# Outputs that operations may change by design: what is on the residual stream, and what a model caches for itself.
_BY_DESIGN = ("hidden_states", "past_key_values", "cache_params")


@dataclass(frozen=True)
class Run:
    """A call of the model.

    Args:
        name: for reports.
        probe: a tensor, or keyword arguments.
        training: whether the model is in training mode.
        turn: which experts are chosen; None leaves the choice to the routers.
        cached: whether the last token is passed alone, with the cache of the others.
        flags: keyword arguments to add.
    """

    name: str
    probe: Any
    training: bool = False
    turn: int | None = None
    cached: bool = False
    flags: tuple[tuple[str, bool], ...] = ()


def call(model: nn.Module, run: Run) -> Any:
    """Return whatever the model returns, with the same random numbers each time and buffers as before.

    Raises:
        InputError: the model failed.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(_in_mode(model, run.training))
        if in_float64(model):
            stack.enter_context(InDouble())
        if run.turn is not None:
            stack.enter_context(EveryExpert(expert_counts(model), run.turn))
        try:
            return _next_token(model, run.probe) if run.cached else _called(model, run)
        except InputError:
            raise
        except Exception as error:  # whatever the model needs
            said = f"{type(error).__name__}: {' '.join(str(error).split()):.200}"
            precision = " in float64" if in_float64(model) else ""
            problem = f"{type(model).__name__} failed on the inputs{precision} ({said})"
            raise InputError(problem, "", _REMEDY) from error


def _called(model: nn.Module, run: Run) -> Any:
    flags = dict(run.flags)
    return model(**dict(run.probe) | flags) if isinstance(run.probe, Mapping) else model(run.probe, **flags)


def flag_runs(model: nn.Module, run: Run) -> list[Run]:
    """Return the run with each keyword argument of the model that is true or false by default, the other way."""
    try:
        known = inspect.signature(type(model).forward).parameters.values()
    except (TypeError, ValueError):
        return []
    given = run.probe if isinstance(run.probe, Mapping) else {}
    flags = [
        (each.name, not each.default) for each in known if isinstance(each.default, bool) and each.name not in given
    ]
    return [replace(run, name=f"{run.name} with {name}={value}", flags=((name, value),)) for name, value in flags]


def _next_token(model: nn.Module, tokens: Tensor) -> Any:
    """Return the outputs for the last token, given the cache that the model returns for the others."""
    before = model(tokens[:, :-1], use_cache=True)
    for name in ("past_key_values", "cache_params"):
        if getattr(before, name, None) is not None:
            return model(tokens[:, -1:], use_cache=True, **{name: getattr(before, name)})
    raise ValueError("it returns no cache")


def in_float64(model: nn.Module) -> bool:
    """Return whether all parameters are in float64."""
    return all(parameter.dtype == torch.float64 for parameter in model.parameters())


@contextmanager
def _in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Put a copy of a model into training mode, and back, with its buffers and the random numbers."""
    if not training:
        yield
        return
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    model.train()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            yield
    finally:
        model.eval()
        with torch.no_grad():
            for buffer, values in before:
                buffer.copy_(values)


def outputs(model: nn.Module, run: Run) -> dict[str, Tensor]:
    """Return every floating-point output, by its name or position.

    Raises:
        InputError: the model failed, or returned no floating-point tensor.
    """
    result = call(model, run)
    found = {name or "output": value.double() for name, value in tensors_of(result) if value.is_floating_point()}
    if not any(value.numel() for value in found.values()):
        received = "an empty tensor" if found else f"a {type(result).__name__}"
        raise InputError(f"{type(model).__name__} must return a tensor, or logits", received, _REMEDY)
    return {name: value for name, value in found.items() if value.numel()}


def by_design(name: str) -> bool:
    """Return whether operations may change an output of this name."""
    return any(each in name.split("[")[0] for each in _BY_DESIGN)


def tensors_of(value: Any, name: str = "", depth: int = _DEPTH) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in nested outputs or arguments, each with its name or position."""
    if isinstance(value, Tensor):
        yield name, value
    elif depth and isinstance(value, Mapping):
        for key, each in value.items():
            yield from tensors_of(each, f"{name}.{key}".lstrip("."), depth - 1)
    elif depth and isinstance(value, (tuple, list)):
        for position, each in enumerate(value):
            yield from tensors_of(each, f"{name}[{position}]", depth - 1)
    elif depth and hasattr(value, "__dict__") and not isinstance(value, (nn.Module, type)):
        yield from tensors_of(vars(value), name, depth - 1)


def expert_runs(model: nn.Module, probe: Any) -> tuple[list[Run], str]:
    """Return the runs in which every expert is chosen, or the reason why that is impossible."""
    mode = EveryExpert(expert_counts(model), 0)
    try:
        with mode:
            call(model, Run("", probe))
    except InputError as error:
        return [], f"experts could not be chosen in turn: {error}"
    turns = min(mode.turns, _MOST_TURNS)
    return [Run(f"experts in turn, {turn + 1} of {turns}", probe, turn=turn) for turn in range(turns)], ""
