"""What a model is made of, found by structure: blocks, norms, attention, what writes to the stream, groups of parameters.

No list of models: a stack of blocks is a container of like modules that are made of parts; a norm is a leaf with a gain for
each feature, and what it does (does it centre, is its gain stored as γ − 1) is measured on two small vectors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from omninorm.errors import ConfigError
from omninorm.layers import NORM_TYPES
from omninorm.layers.pointwise import Pointwise
from omninorm.watch.history import NormFacts

CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
EPS_NAMES = ("eps", "variance_epsilon", "epsilon")
GAIN_NAMES = ("weight", "scale", "gamma", "gain", "g")
# Layers that read the stream, for feed-forwards as wide as it: they are not the one that writes to it.
READERS = ("gate", "up", "gate_proj", "up_proj", "w1", "w3", "fc1")
# Beside the blocks' groups at most so many; a model with more parts is grouped by its first-level modules.
MOST_OTHER_GROUPS = 32


@dataclass
class Norm:
    """A norm: its facts, module, whether it subtracts the mean, what must be added to its stored gain, and along which
    dimension of its input the examples are counted."""

    facts: NormFacts
    module: nn.Module
    centred: bool
    offset: float
    batch_dim: int = 0

    @property
    def gain(self) -> Tensor | None:
        """γ as it is stored."""
        return find_gain(self.module)

    @property
    def dims(self) -> int:
        """Over how many trailing dimensions it normalizes."""
        return len(getattr(self.module, "normalized_shape", (1,)))


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
    """The members of every outermost stack: a container whose members are mostly of one class, made of parts themselves."""
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
    attention = next((part for part in block.named_modules() if part[0] and _is_attention(*part)), None)
    width = None
    if attention is not None:
        parts.attention = f"{name}.{attention[0]}"
        parts.attention_module = parts.attention_writer = attention[1]
        last = _last_linear(attention[1], None, None)
        width = None if last is None else _out_features(last[1])
        if last is not None and not isinstance(attention[1], nn.MultiheadAttention):  # which never calls its last layer
            parts.attention_writer = _wrapper(attention[1], last)[1]
    if width is None:
        norms = [find_gain(part) for part in block.modules() if is_norm(part)]
        width = next((gain.numel() for gain in norms if gain is not None and gain.numel() > 1), None)
    skipped = None if attention is None else attention[1]
    writer = _last_linear(block, skipped, width)
    writer = _last_sublayer(block, skipped) if writer is None else _wrapper(block, writer)
    if writer is not None and writer[0]:
        parts.feed_forward_writer = writer[1]
        owner = writer[0].rpartition(".")[0] if _is_linear(writer[1]) or _is_adapted(writer[1]) else ""
        parts.feed_forward = f"{name}.{owner or writer[0]}"
    return parts


def _wrapper(root: nn.Module, linear: tuple[str, nn.Module]) -> tuple[str, nn.Module]:
    """The module inside `root` that stands for the linear layer: itself, what adapts it, or the mixture it is one of."""
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


def _is_linear(module: nn.Module) -> bool:
    """Linear layers, GPT-2's Conv1D and their quantized or adapted relatives: a leaf with one matrix named weight."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 2 and not isinstance(module, (nn.Embedding, *NORM_TYPES))


def _out_features(module: nn.Module) -> int:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return int(getattr(module, "out_features", None) or getattr(module, "nf", None) or weight.shape[0])


def _last_linear(module: nn.Module, skip: nn.Module | None, width: int | None) -> tuple[str, nn.Module] | None:
    """The last linear layer, in the order of registration, that is not in `skip` and has `width` outputs (None: any)."""
    skipped = set() if skip is None else {id(part) for part in skip.modules()}
    linears = [part for part in module.named_modules() if _is_linear(part[1]) and id(part[1]) not in skipped]
    fitting = [part for part in linears if width is None or _out_features(part[1]) == width]
    writers = [part for part in fitting if part[0].rpartition(".")[2] not in READERS]
    return (writers or fitting or [None])[-1]


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


# Norms -----------------------------------------------------------------------------------------------------------


def is_norm(module: nn.Module) -> bool:
    """LayerNorm, RMSNorm and their relatives over the last dimension, whoever wrote them."""
    if isinstance(module, NORM_TYPES):
        return True
    if any(True for _ in module.children()) or "norm" not in type(module).__name__.lower():
        return False
    gain = find_gain(module)
    normalizes_batches = isinstance(module, (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LocalResponseNorm))
    return gain is not None and gain.ndim == 1 and not normalizes_batches


def find_gain(module: nn.Module) -> nn.Parameter | None:
    """A norm's γ, by the names that are in use."""
    found = (getattr(module, name, None) for name in GAIN_NAMES)
    return next((gain for gain in found if isinstance(gain, nn.Parameter) and not is_lazy(gain)), None)


def read_norm(name: str, module: nn.Module, block: int | None, batch_dim: int = 0) -> Norm:
    """The norm's facts. Its forward is called some times, without hooks and without gradients."""
    gains = list(module.parameters(recurse=False))
    ours = type(module).__module__.startswith("omninorm.")
    frozen = bool(gains) and not any(gain.requires_grad for gain in gains)
    facts = NormFacts(name, type(module).__name__, read_eps(module), block, frozen, ours)
    if isinstance(module, Pointwise):
        return Norm(facts, module, False, 0.0, batch_dim)
    return Norm(facts, module, *measure_norm(module), batch_dim)


def read_eps(module: nn.Module) -> float | None:
    """A norm's ε; None where it has none."""
    found = (getattr(module, name, None) for name in EPS_NAMES)
    eps = next(
        (float(value) for value in found if isinstance(value, (int, float)) and not isinstance(value, bool)), None
    )
    if eps is None and hasattr(module, "eps") and isinstance(module, NORM_TYPES):  # the machine epsilon
        gain = find_gain(module)
        is_double = gain is not None and gain.dtype == torch.float64
        return torch.finfo(torch.float64 if is_double else torch.float32).eps
    return eps


@torch.no_grad()
def measure_norm(module: nn.Module) -> tuple[bool, float]:
    """Whether the norm ignores a constant added to its input, and what it adds to its stored gain (0, or Gemma's 1).

    For x = ±1 by turns, N(x) − N(−x) = 2 γ x but for ε, because mean and deviation of x are 0 and 1.
    """
    by_kind, by_name = isinstance(module, nn.LayerNorm), float(getattr(module, "gain_offset", 0.0))
    gain = find_gain(module)
    known = isinstance(module, NORM_TYPES)
    # A module with buffers may count or average what it sees.
    if known or gain is None or gain.ndim != 1 or gain.numel() < 2 or any(True for _ in module.buffers()):
        return by_kind, by_name
    width = gain.numel() - gain.numel() % 2
    x = torch.ones_like(gain)
    x[1:width:2] = -1
    if width < gain.numel():
        x[-1] = 0
    try:
        plus, minus, shifted = (module.forward(row).float() for row in (64 * x, -64 * x, 64 * x + 64))
        effective = (plus - minus)[:width] / (2 * x[:width].float())
        offset = (effective - gain[:width].float()).median()
    except Exception:  # a norm that wants another shape: nothing is known of it
        return by_kind, by_name
    centred = torch.allclose(shifted, plus, rtol=1e-2, atol=1e-2 * float(plus.abs().max()) + 1e-6)
    centred = centred and bool((plus - minus).abs().max() > 0)
    return bool(centred), 1.0 if abs(float(offset) - 1.0) < 0.1 else 0.0


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


def some_tensors(value: object) -> Iterator[Tensor]:
    """The floating-point tensors of at least two dimensions in a module's arguments or output, in order."""
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.ndim >= 2:
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from some_tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from some_tensors(item)
