"""The model of a cell: a Thinker, or what the user's own factory builds.

A factory is a function build(norm: NormConfig, depth: int, vocab_size: int) -> Module, from int64 tokens
(batch, sequence) to logits (batch, sequence, vocab_size). It is named "package.module:build".
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
_PROBED_DEPTH = 4  # at one or two blocks some placements are the same
_PROBED_TOKENS = 8


def build_cell(cell: Cell, norm: NormConfig | None = None) -> nn.Module:
    """The cell's model, or the same with another norm. Its weights depend on the seed alone.

    Raises:
        ConfigError: the factory can't be found, or does not build a model of its kind.
    """
    chosen = cell.norm if norm is None else norm
    if cell.model is None:
        plan = cell.plan
        config = plan.model if norm is None else plan.change(**chosen.to_dict()).model
        return build_model(config, cell.seed)
    return call(cell.model, chosen, cell.depth, cell.seed)


def load_factory(name: str) -> Factory:
    """Imports a factory; modules in the current folder are found, behind the installed ones.

    Raises:
        ConfigError: there is none of this name, or its module can't be imported.
    """
    invariant = "a model's factory is named package.module:function"
    remedy = "check the name, and that the module can be imported from here"
    module_name, _, function = name.partition(":")
    if not module_name or not function:
        raise ConfigError(invariant, repr(name), "write for example mymodels.small:build")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        factory = getattr(importlib.import_module(module_name), function)
    except Exception as error:  # whatever the user's module does when it is imported
        raise ConfigError(invariant, f"{name!r} ({type(error).__name__}: {error})", remedy) from error
    if not callable(factory):
        raise ConfigError(invariant, f"{name!r}, a {type(factory).__name__}", remedy)
    found: Factory = factory
    return found


def call(name: str, norm: NormConfig, depth: int, seed: int) -> nn.Module:
    """A model of the user's factory, whose weights depend on the seed.

    Raises:
        ConfigError: it can't be found, raises an error, or returns no module with logits of the right shape.
    """
    factory = load_factory(name)
    torch.manual_seed(seed)
    what = _words(norm, depth)
    remedy = "mend the factory, or leave this configuration out"
    try:
        model = factory(norm, depth, VOCABULARY)
        logits = _logits(model)
    except OmninormError:
        raise
    except Exception as error:  # whatever the user's code does
        received = f"{name} for {what}: {type(error).__name__}: {error}"
        raise ConfigError("a factory builds a model that maps tokens to logits", received, remedy) from error
    if tuple(logits.shape) != (1, _PROBED_TOKENS, VOCABULARY):
        received = f"logits of shape {tuple(logits.shape)} from {name} for {what}"
        raise ConfigError("a model's logits are (batch, sequence, vocab_size)", received, remedy)
    return model


def check_factory(name: str, cells: Iterable[Cell]) -> None:
    """Finds factories that ignore what they are told: two settings, one model. Settings for which it fails are left to
    their cells.

    Raises:
        ConfigError: the factory can't be found, fails for all settings, or ignores its norm config or its depth.
    """
    load_factory(name)
    asked = list(cells)
    models = []
    errors = []
    for told in _told(asked):
        try:
            models.append((told, call(name, *told, seed=0)))
        except ConfigError as error:
            errors.append(error)
    if errors and not models:
        raise errors[0]
    for (one, a), (other, b) in itertools.combinations(models, 2):
        if _same(a, b):
            received = (
                f"{name} builds the same parameters with the same outputs for {_words(*one)} and {_words(*other)}"
            )
            remedy = "let it build its norms from `norm`, for example by omninorm.Block, and as many blocks as `depth`"
            raise ConfigError("a factory must follow its norm config and its depth", received, remedy)


def _told(cells: Sequence[Cell]) -> list[tuple[NormConfig, int]]:
    """What a factory is told to see whether it listens: every norm and placement at one depth, and a second depth."""
    depths = sorted({cell.depth for cell in cells})
    pairs = sorted({(cell.norm.normalization, cell.norm.norm_placement) for cell in cells})
    told = [(NormConfig(*pair), max(_PROBED_DEPTH, depths[0])) for pair in pairs]
    other = next((depth for depth in depths if depth != told[0][1]), None)
    return told if other is None else [*told, (told[0][0], other)]


def _words(norm: NormConfig, depth: int) -> str:
    return f"{norm.normalization}, {norm.norm_placement}, {depth} blocks"


def _same(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = dict(a.named_parameters()), dict(b.named_parameters())
    if ours.keys() != theirs.keys() or any(not torch.equal(ours[key], theirs[key]) for key in ours):
        return False
    return torch.equal(_logits(a), _logits(b))


def _logits(model: nn.Module) -> Tensor:
    was_training = model.training
    model.eval()
    with torch.no_grad():
        logits = model(torch.arange(_PROBED_TOKENS)[None])
    model.train(was_training)
    if not isinstance(logits, Tensor):
        raise TypeError(f"the model returns a {type(logits).__name__}, no tensor of logits")
    return logits
