"""Finds blocks, norms, embeddings and parameter groups, from the module structure. There is no list of models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn
from torch.nn.parameter import is_lazy

from omninorm.errors import ConfigError
from omninorm.layers.recognize import Form
from omninorm.monitor.model_map.norms import Norm, Recognizer, read_norm
from omninorm.monitor.model_map.parts import Block, find_parts
from omninorm.monitor.model_map.stacks import LISTS, Stacks, called_parts

# Largest number of groups outside the blocks; a model with more parts is grouped by its top-level modules.
MOST_OTHER_GROUPS = 32


@dataclass
class Structure:
    """The parts of a model. `groups` maps a group's name to its named parameters, including frozen ones. `chains` holds
    the indices of blocks that follow each other: one chain for each tower, stage, encoder or decoder."""

    model: nn.Module
    blocks: list[Block]
    norms: list[Norm]
    embeddings: list[tuple[str, nn.Embedding]]
    groups: dict[str, list[tuple[str, nn.Parameter]]] = field(default_factory=dict)
    chains: list[list[int]] = field(default_factory=list)


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside the wrappers of torch.compile and DistributedDataParallel."""
    while True:
        inner = getattr(model, "_orig_mod", None) or (
            model.module if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)) else None
        )
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def find_structure(model: nn.Module) -> Structure:
    """Analyze a model without changing it. Lists are empty if the model has no such parts.

    Raises:
        ConfigError: a parameter is not initialized.
    """
    check_values(model)
    known = Recognizer().find(model)
    stacks = Stacks({id(module) for module, _, _ in known.values()}).find(model)
    chains: list[list[int]] = []
    blocks: list[Block] = []
    for stack in stacks:
        chains.append(list(range(len(blocks), len(blocks) + len(stack))))
        blocks += [_read_block(name, module, known) for name, module in stack]
    places = {id(block.module): index for index, block in enumerate(blocks)}
    # By default torch.nn.MultiheadAttention has the sequence before the batch dimension.
    attentions = [module for module in model.modules() if isinstance(module, nn.MultiheadAttention)]
    batch_dim = 0 if all(module.batch_first for module in attentions) else 1
    norms = [
        read_norm(name, module, _block_of(name, blocks), batch_dim, (form, measured))
        for name, (module, form, measured) in known.items()
    ]
    embeddings = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and id(module) not in places and _block_of(name, blocks) is None
    ]
    return Structure(model, blocks, norms, embeddings, group_parameters(model, blocks), chains)


def check_values(model: nn.Module) -> None:
    """Raise ConfigError for a lazy parameter, or one on the meta device."""
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            remedy = "call the model once, then create the optimizer, then watch the model"
            raise ConfigError(f"The parameter {name!r} is lazy and has no shape yet", "", remedy)
        if parameter.is_meta:
            remedy = "load the weights first, or move the model with to_empty()"
            raise ConfigError(f"The parameter {name!r} is on the meta device and has no values", "", remedy)


def _read_block(name: str, module: nn.Module, norms: Mapping[str, tuple[nn.Module, Form, bool]]) -> Block:
    gains = (getattr(norm, form.gain) for at, (norm, form, _) in norms.items() if form.gain and _is_in(at, name))
    block = find_parts(name, module, next((gain.numel() for gain in gains if gain.numel() > 1), None))
    block.parts = list(called_parts(module)) if isinstance(module, LISTS) else []
    return block


def matrix_names(module: nn.Module) -> tuple[str, ...]:
    """Return the names of a module's matrices. Gains may have more than one dimension, but only one that is not 1."""
    named = module.named_parameters()
    return tuple(name for name, tensor in named if tensor.numel() > max(tensor.shape, default=1))


def _is_in(name: str, owner: str) -> bool:
    return name == owner or name.startswith(f"{owner}.")


def _block_of(name: str, blocks: list[Block]) -> int | None:
    return next((index for index, block in enumerate(blocks) if _is_in(name, block.name)), None)


# Parameters ------------------------------------------------------------------------------------------------------


def group_parameters(model: nn.Module, blocks: list[Block]) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Group parameters by block, and by module outside the blocks. A shared parameter belongs to the first."""
    groups: dict[str, list[tuple[str, nn.Parameter]]] = {block.name: [] for block in blocks}
    others: list[tuple[str, nn.Parameter]] = []
    for name, parameter in model.named_parameters():
        index = _block_of(name, blocks)
        if index is None:
            others.append((name, parameter))
        else:
            groups[blocks[index].name].append((name, parameter))
    owners = {name.rpartition(".")[0] or name for name, _ in others}
    for name, parameter in others:
        owner = name.rpartition(".")[0] or name
        if len(owners) > MOST_OTHER_GROUPS:
            owner = owner.partition(".")[0]
        groups.setdefault(owner, []).append((name, parameter))
    return {name: group for name, group in groups.items() if group}
