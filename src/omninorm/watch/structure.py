"""What a model is made of, found by structure: blocks, norms, attention, what writes to the stream, groups.

No list of models: a stack of blocks is a container of like modules that are made of parts, and what writes to the
stream is the last layer as wide as it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from omninorm.errors import ConfigError
from omninorm.layers import NORM_TYPES
from omninorm.watch.norms import Norm, find_gain, is_norm, read_norm

CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
# Layers that read the stream, for feed-forwards as wide as it: they are not the one that writes to it.
READERS = ("gate", "up", "gate_proj", "up_proj", "w1", "w3", "fc1")
# Beside the blocks' groups at most so many; a model with more parts is grouped by its first-level modules.
MOST_OTHER_GROUPS = 32


@dataclass
class Block:
    """A transformer block, and the modules that write to its stream, where they could be told apart."""

    name: str
    module: nn.Module
    attention: str | None = None
    attention_module: nn.Module | None = None
    attention_writer: nn.Module | None = None
    feed_forward: str | None = None
    feed_forward_writer: nn.Module | None = None


@dataclass
class Structure:
    """A model's parts. `groups` maps a group's name to its parameters by name; frozen ones are included."""

    model: nn.Module
    blocks: list[Block]
    norms: list[Norm]
    embeddings: list[tuple[str, nn.Embedding]]
    groups: dict[str, list[tuple[str, nn.Parameter]]] = field(default_factory=dict)


def unwrap(model: nn.Module) -> nn.Module:
    """The model itself, inside of what torch.compile and DistributedDataParallel put around it."""
    while True:
        inner = getattr(model, "_orig_mod", None) or (
            model.module if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)) else None
        )
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def find_structure(model: nn.Module) -> Structure:
    """Takes a model apart; nothing is changed. The lists are empty where the model has no such parts.

    Raises:
        ConfigError: a parameter has no values yet.
    """
    check_values(model)
    blocks = [find_parts(name, module) for name, module in find_blocks(model)]
    places = {id(block.module): index for index, block in enumerate(blocks)}
    # torch.nn.MultiheadAttention's default puts the sequence before the examples.
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
    """Raises ConfigError for a lazy parameter, or one on the meta device."""
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            remedy = "call the model once before it is watched, and make the optimizer after that"
            raise ConfigError("a watched model's parameters must have their shapes", f"a lazy {name!r}", remedy)
        if parameter.is_meta:
            remedy = "load the weights first, or move the model with to_empty()"
            raise ConfigError("a watched model's parameters must have values", f"{name!r} on the meta device", remedy)


# Blocks ----------------------------------------------------------------------------------------------------------


def find_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The members of every outermost stack: a container whose members are mostly of one class and made of parts."""
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
    """Whether it is made of parts and has a matrix among its parameters."""
    return any(True for _ in module.children()) and any(parameter.ndim >= 2 for parameter in module.parameters())


def find_parts(name: str, block: nn.Module) -> Block:
    """A block's attention and feed-forward, and the last layer of each, which writes to the stream."""
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
        if last is not None and not isinstance(attention[1], nn.MultiheadAttention):  # which never calls its last layer
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
    """The module inside `root` that stands for the layer: itself, what adapts it, or the mixture that it is part of."""
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
    """Whether it is a linear layer with low-rank matrices or the like beside it, as peft writes them or others."""
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
    """Whether all of its linear layers read the stream, and make queries, keys, values and an output of it.

    Its name says nothing. A feed-forward has a layer that reads its hidden features, mostly of another width; where
    they are as wide as the stream, it has one or two layers before its last, and attention three, or one for all.
    """
    linears = {name: part for name, part in module.named_modules() if _is_linear(part)}
    if isinstance(module, CONTAINERS) or any(name.rpartition(".")[2] in READERS for name in linears):
        return False
    if width is None or any(_in_features(part) != width for part in linears.values()):
        return False
    made = [_out_features(part) for part in linears.values()][:-1]
    return len(made) >= 3 or max(made, default=0) >= 3 * width


def _is_linear(module: nn.Module) -> bool:
    """Linear layers, GPT-2's Conv1D and their quantized or adapted relatives: a leaf with one matrix named weight."""
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
    """The last linear layer, as they are registered, that is not in `skip` and has `width` outputs (None: any)."""
    skipped = set() if skip is None else {id(part) for part in skip.modules()}
    linears = [part for part in module.named_modules() if _is_linear(part[1]) and id(part[1]) not in skipped]
    fitting = [part for part in linears if width is None or _out_features(part[1]) == width]
    writers = [part for part in fitting if part[0].rpartition(".")[2] not in READERS]
    found = writers or fitting
    return found[-1] if found else None


def _last_sublayer(block: nn.Module, skip: nn.Module | None) -> tuple[str, nn.Module] | None:
    """The block's last part beside `skip` that has matrices: a mixture of experts, for example."""
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
    """Each block's parameters, and those of each module beside the blocks; a shared one belongs to the first."""
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
