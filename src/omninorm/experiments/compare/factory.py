"""The model of a cell: a Thinker, or one from the user's own factory.

A factory is a function build(norm: NormConfig, depth: int, vocab_size: int) -> Module, from int64 tokens
(batch, sequence) to logits (batch, sequence, vocab_size). Its name has the form "package.module:build".
"""

from __future__ import annotations

import importlib
import itertools
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from omninorm.config import NormConfig
from omninorm.errors import ConfigError, OmninormError
from omninorm.experiments.compare.cells import Cell
from omninorm.experiments.runs import build_model

Factory = Callable[[NormConfig, int, int], nn.Module]
VOCABULARY = 256  # bytes
CPU = torch.device("cpu")
_PROBED_DEPTH = 4  # with one or two blocks, some placements are the same
_PROBED_TOKENS = 8


def build_cell(cell: Cell, norm: NormConfig | None = None, device: torch.device = CPU) -> nn.Module:
    """Build the cell's model on a device, or the same model with another norm. Its weights depend only on the seed.

    Raises:
        ConfigError: the factory can't be found or does not build a valid model.
    """
    chosen = cell.norm if norm is None else norm
    if cell.model is None:
        plan = cell.plan
        config = plan.model if norm is None else plan.change(**chosen.to_dict()).model
        return build_model(config, cell.seed).to(device)
    return call(cell.model, chosen, cell.depth, cell.seed).to(device)


def check_factory_name(name: str) -> None:
    """Raise ConfigError unless a factory's name has the form package.module:function."""
    module_name, _, function = name.partition(":")
    if not module_name or not function:
        invariant = "A model factory's name must have the form package.module:function"
        raise ConfigError(invariant, f"{name!r:.100}", "write for example mymodels.small:build")


def load_factory(name: str) -> Factory:
    """Import a factory. Modules in the current folder are found after the installed ones.

    Raises:
        ConfigError: the factory does not exist, or its module can't be imported.
    """
    check_factory_name(name)
    remedy = "check the name, and that Python can import the module from the current folder"
    module_name, _, function = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        factory = getattr(importlib.import_module(module_name), function)
    except Exception as error:  # the user's module may raise anything when it is imported
        raise ConfigError(f"Cannot import {name!r}: {type(error).__name__}: {error}", "", remedy) from error
    if not callable(factory):
        raise ConfigError(f"{name} must be a function", f"an object of type {type(factory).__name__}", remedy)
    found: Factory = factory
    return found


def call(name: str, norm: NormConfig, depth: int, seed: int) -> nn.Module:
    """Build a model with the user's factory, with weights that depend on the seed.

    Raises:
        ConfigError: the factory can't be found, raises an error, or does not return a module with logits of the right
            shape.
    """
    factory = load_factory(name)
    torch.manual_seed(seed)
    what = _words(norm, depth)
    remedy = "fix the factory, or remove this configuration from the plan"
    try:
        model = factory(norm, depth, VOCABULARY)
        logits = _logits(model)
    except OmninormError:
        raise
    except Exception as error:  # the user's code may raise anything
        invariant = f"The factory {name} failed for {what}: {type(error).__name__}: {error}"
        raise ConfigError(invariant, "", remedy) from error
    if tuple(logits.shape) != (1, _PROBED_TOKENS, VOCABULARY):
        invariant = f"The model of {name} for {what} must return logits of shape (batch, sequence, vocab_size)"
        expected = f"{(1, _PROBED_TOKENS, VOCABULARY)} expected here"
        raise ConfigError(f"{invariant}, {expected}", tuple(logits.shape), remedy)
    return model


def check_factory(name: str, cells: Iterable[Cell]) -> None:
    """Raise ConfigError if a factory ignores its arguments: if it builds the same model for two settings.

    Settings for which the factory fails are skipped; their cells will report the error.

    Raises:
        ConfigError: the factory can't be found, fails for all settings, or ignores its norm config or its depth.
    """
    load_factory(name)
    models = []
    errors = []
    for arguments in _probed(list(cells)):
        try:
            models.append((arguments, call(name, *arguments, seed=0)))
        except ConfigError as error:
            errors.append(error)
    if errors and not models:
        raise errors[0]
    for (one, a), (other, b) in itertools.combinations(models, 2):
        if _same(a, b):
            invariant = (
                f"The factory {name} ignores its norm or its depth: it builds the same parameters with the same "
                f"outputs for {_words(*one)} and {_words(*other)}"
            )
            remedy = "build the norms from `norm`, for example with omninorm.Block, and as many blocks as `depth`"
            raise ConfigError(invariant, "", remedy)


def _probed(cells: Sequence[Cell]) -> list[tuple[NormConfig, int]]:
    """Return the arguments to probe a factory with: every norm and placement at one depth, and a second depth."""
    depths = sorted({cell.depth for cell in cells})
    pairs = sorted({(cell.norm.normalization, cell.norm.norm_placement) for cell in cells})
    probed = [(NormConfig(*pair), max(_PROBED_DEPTH, depths[0])) for pair in pairs]
    other = next((depth for depth in depths if depth != probed[0][1]), None)
    return probed if other is None else [*probed, (probed[0][0], other)]


def _words(norm: NormConfig, depth: int) -> str:
    return f"{norm.normalization}, {norm.norm_placement}, {depth} block{'' if depth == 1 else 's'}"


def _same(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = dict(a.named_parameters()), dict(b.named_parameters())
    if ours.keys() != theirs.keys() or any(not torch.equal(ours[key], theirs[key]) for key in ours):
        return False
    return torch.equal(_logits(a), _logits(b))


def _logits(model: nn.Module) -> Tensor:
    """Return the logits of a few tokens, on the device on which the factory has built the model."""
    place = next(itertools.chain(model.parameters(), model.buffers()), torch.empty(0)).device
    was_training = model.training
    model.eval()
    with torch.no_grad():
        logits = model(torch.arange(_PROBED_TOKENS, device=place)[None])
    model.train(was_training)
    if not isinstance(logits, Tensor):
        raise TypeError(f"the model returned a {type(logits).__name__} instead of a tensor of logits")
    return logits
