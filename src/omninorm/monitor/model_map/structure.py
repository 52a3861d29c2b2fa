"""Finds blocks, norms, attention, writers to the residual stream, and parameter groups, from the module structure.

There is no list of models. A stack of blocks is a container of composite modules of the same class, and the writer to
the residual stream is the last layer with as many outputs as the stream is wide.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from omninorm.errors import ConfigError
from omninorm.layers import NORM_TYPES
from omninorm.monitor.model_map.norms import Norm, find_gain, is_norm, read_norm

CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
# Names of layers that read the stream. In a feed-forward as wide as the stream, they are not the writer.
READERS = ("gate", "up", "gate_proj", "up_proj", "w1", "w3", "fc1")
# Largest number of groups outside the blocks; a model with more parts is grouped by its top-level modules.
MOST_OTHER_GROUPS = 32


@dataclass
class Block:
    """A transformer block, with its attention, its feed-forward and their writers to the stream, where identified."""

    name: str
    module: nn.Module
    attention: str | None = None
    attention_module: nn.Module | None = None
    attention_writer: nn.Module | None = None
    feed_forward: str | None = None
    feed_forward_writer: nn.Module | None = None


@dataclass
class Structure:
    """The parts of a model. `groups` maps a group's name to its named parameters, including frozen ones."""

    model: nn.Module
    blocks: list[Block]
    norms: list[Norm]
    embeddings: list[tuple[str, nn.Embedding]]
    groups: dict[str, list[tuple[str, nn.Parameter]]] = field(default_factory=dict)


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
    blocks = [find_parts(name, module) for name, module in find_blocks(model)]
    places = {id(block.module): index for index, block in enumerate(blocks)}
    # By default torch.nn.MultiheadAttention has the sequence before the batch dimension.
    attentions = [module for module in model.modules() if isinstance(module, nn.MultiheadAttention)]
    batch_dim = 0 if all(module.batch_first for module in attentions) else 1
    norms = [
        read_norm(name, module, _block_of(name, blocks), batch_dim)
        for name, module in model.named_modules()
        if is_norm(module)
    ]
    embeddings = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and id(module) not in places and _block_of(name, blocks) is None
    ]
    return Structure(model, blocks, norms, embeddings, group_parameters(model, blocks))


def check_values(model: nn.Module) -> None:
    """Raise ConfigError for a lazy parameter, or one on the meta device."""
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            remedy = "call the model once, then create the optimizer, then watch the model"
            raise ConfigError(f"The parameter {name!r} is lazy and has no shape yet", "", remedy)
        if parameter.is_meta:
            remedy = "load the weights first, or move the model with to_empty()"
            raise ConfigError(f"The parameter {name!r} is on the meta device and has no values", "", remedy)


# Blocks ----------------------------------------------------------------------------------------------------------


def find_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the members of every outermost stack: a container of composite modules that are mostly of one class."""
    found: list[tuple[str, nn.Module]] = []
    stacks: list[str] = []
    for name, module in model.named_modules():
        inside = any(name == stack or name.startswith(f"{stack}.") or not stack for stack in stacks)
        if inside or not isinstance(module, CONTAINERS):
            continue
        members = [(child_name, child) for child_name, child in module.named_children() if _is_composite(child)]
        if not members:
            continue
        kind, count = Counter(type(child) for _, child in members).most_common(1)[0]
        if 2 * count < len(list(module.children())) or kind in CONTAINERS:
            continue
        if len(members) == 1 and not any(is_norm(part) for part in members[0][1].modules()):
            continue
        stacks.append(name)
        found += [(f"{name}.{child_name}".lstrip("."), child) for child_name, child in members if type(child) is kind]
    return found


def _is_composite(module: nn.Module) -> bool:
    """Return whether a module has submodules and at least one matrix."""
    return any(True for _ in module.children()) and any(parameter.ndim >= 2 for parameter in module.parameters())


def find_parts(name: str, block: nn.Module) -> Block:
    """Find a block's attention and feed-forward, and the last layer of each, which writes to the stream."""
    parts = Block(name, block)
    width = _norm_width(block)
    inside = [part for part in block.named_modules() if part[0]]
    named = next((part for part in inside if _is_attention(*part)), None)
    attention = named or next((part for part in inside if _is_built_like_attention(part[1], width)), None)
    if attention is not None:
        parts.attention = f"{name}.{attention[0]}"
        parts.attention_module = parts.attention_writer = attention[1]
        last = _last_linear(attention[1], None, None)
        width = width if last is None else _out_features(last[1])
        if last is not None and not isinstance(
            attention[1], nn.MultiheadAttention
        ):  # nn.MultiheadAttention never calls its last layer as a module
            parts.attention_writer = _wrapper(attention[1], last)[1]
    skipped = None if attention is None else attention[1]
    writer = _last_linear(block, skipped, width)
    writer = _last_sublayer(block, skipped) if writer is None else _wrapper(block, writer)
    if writer is not None and writer[0]:
        parts.feed_forward_writer = writer[1]
        owner = writer[0].rpartition(".")[0] if _is_linear(writer[1]) or _is_adapted(writer[1]) else ""
        parts.feed_forward = f"{name}.{owner or writer[0]}"
    return parts


def _norm_width(block: nn.Module) -> int | None:
    gains = [find_gain(part) for part in block.modules() if is_norm(part)]
    return next((gain.numel() for gain in gains if gain is not None and gain.numel() > 1), None)


def _wrapper(root: nn.Module, linear: tuple[str, nn.Module]) -> tuple[str, nn.Module]:
    """Return the module of `root` that represents the layer: itself, its adapter, or its mixture of experts."""
    names = linear[0].split(".")
    for end in range(1, len(names)):
        name = ".".join(names[:end])
        module = root.get_submodule(name)
        if _is_adapted(module):
            return name, module
        if isinstance(module, nn.ModuleList) and len(module) > 1 and len({type(expert) for expert in module}) == 1:
            above = ".".join(names[: end - 1])
            return above, root.get_submodule(above)
    return linear


def _is_adapted(module: nn.Module) -> bool:
    """Return whether a module is a linear layer with an adapter such as LoRA, from peft or another library."""
    inside = [name for name, _ in module.named_children()]
    named = "base_layer" in inside or any("lora" in name.lower() for name in inside)
    kind = type(module).__name__.lower()
    return named or bool(inside and ("lora" in kind or "adapter" in kind))


def _is_attention(name: str, module: nn.Module) -> bool:
    leaf = name.rpartition(".")[2].lower()
    kind = type(module).__name__.lower()
    has_matrices = any(parameter.ndim >= 2 for parameter in module.parameters())
    return has_matrices and not _is_linear(module) and ("attn" in leaf or "attention" in leaf or "attention" in kind)


def _is_built_like_attention(module: nn.Module, width: int | None) -> bool:
    """Return whether all linear layers read the stream and compute queries, keys, values and an output from it.

    This needs no names. A feed-forward has a layer that reads its hidden features, usually of another width. If they
    are as wide as the stream, a feed-forward has one or two layers before its last, and attention has three or a fused
    one.
    """
    linears = {name: part for name, part in module.named_modules() if _is_linear(part)}
    if isinstance(module, CONTAINERS) or any(name.rpartition(".")[2] in READERS for name in linears):
        return False
    if width is None or any(_in_features(part) != width for part in linears.values()):
        return False
    made = [_out_features(part) for part in linears.values()][:-1]
    return len(made) >= 3 or max(made, default=0) >= 3 * width


def _is_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear layer, GPT-2's Conv1D or a quantized variant, by its matrix `weight`."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 2 and not isinstance(module, (nn.Embedding, *NORM_TYPES))


def _in_features(module: nn.Module) -> int:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return int(getattr(module, "in_features", None) or weight.shape[0 if hasattr(module, "nf") else 1])


def _out_features(module: nn.Module) -> int:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return int(getattr(module, "out_features", None) or getattr(module, "nf", None) or weight.shape[0])


def _last_linear(module: nn.Module, skip: nn.Module | None, width: int | None) -> tuple[str, nn.Module] | None:
    """Return the last registered linear layer that is not in `skip` and has `width` outputs (None: any number)."""
    skipped = set() if skip is None else {id(part) for part in skip.modules()}
    linears = [part for part in module.named_modules() if _is_linear(part[1]) and id(part[1]) not in skipped]
    fitting = [part for part in linears if width is None or _out_features(part[1]) == width]
    writers = [part for part in fitting if part[0].rpartition(".")[2] not in READERS]
    found = writers or fitting
    return found[-1] if found else None


def _last_sublayer(block: nn.Module, skip: nn.Module | None) -> tuple[str, nn.Module] | None:
    """Return the block's last part with matrices that is not in `skip`, such as a mixture of experts."""
    skipped = set() if skip is None else {id(part) for part in skip.modules()}
    found = [
        (name, child)
        for name, child in block.named_children()
        if any(parameter.ndim >= 2 for parameter in child.parameters())
        and not skipped & {id(part) for part in child.modules()}
    ]
    return found[-1] if found else None


def _block_of(name: str, blocks: list[Block]) -> int | None:
    return next((i for i, block in enumerate(blocks) if name == block.name or name.startswith(f"{block.name}.")), None)


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
