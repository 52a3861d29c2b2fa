"""Finds a block's attention, feed-forward, experts and router, and the layers that write to the residual stream.

There is no list of models. The writer to the residual stream is the last layer with as many outputs as the stream is
wide.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from omninorm.layers import NORM_TYPES

CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
# Names of layers that read the stream. In a feed-forward as wide as the stream, they are not the writer.
FEED_FORWARDS = ("mlp", "ffn", "feed_forward", "feedforward")
READERS = ("gate", "up", "gate_proj", "up_proj", "w1", "w3", "fc1")


@dataclass
class Block:
    """A transformer block, with its attention, its feed-forward and their writers to the stream, where identified.

    `router` is the name and module of the layer that assigns tokens to the `experts`. `parts` are the modules that are
    called in order if the block is a list, which is never called itself.
    """

    name: str
    module: nn.Module
    attention: str | None = None
    attention_module: nn.Module | None = None
    attention_writer: nn.Module | None = None
    feed_forward: str | None = None
    feed_forward_writer: nn.Module | None = None
    router: tuple[str, nn.Module] | None = None
    experts: int = 0
    parts: list[nn.Module] = field(default_factory=list)


def find_parts(name: str, block: nn.Module, norm_width: int | None = None) -> Block:
    """Find a block's attention and feed-forward, and the last layer of each, which writes to the stream.

    Args:
        norm_width: the features of a norm in the block, if there is one.
    """
    parts = Block(name, block)
    width = norm_width
    attention = attention_in(block, width)
    if attention is not None:
        width = _set_attention(parts, *attention) or width
    mixture = find_mixture(block)
    if mixture is not None:
        owner, router, parts.experts = mixture
        parts.router = f"{name}.{router}", block.get_submodule(router)
        parts.feed_forward, parts.feed_forward_writer = f"{name}.{owner}", block.get_submodule(owner)
        return parts
    skipped = None if attention is None else attention[1]
    writer = _last_linear_of_feed_forward(block, width) or _last_linear(block, skipped, width)
    writer = _last_sublayer(block, skipped) if writer is None else _wrapper(block, writer)
    if writer is not None and writer[0]:
        parts.feed_forward_writer = writer[1]
        owner = writer[0].rpartition(".")[0] if _is_linear(writer[1]) or _is_adapted(writer[1]) else ""
        parts.feed_forward = f"{name}.{owner or writer[0]}"
    return parts


def _set_attention(parts: Block, name: str, module: nn.Module) -> int | None:
    """Set a block's attention and its writer, and return the writer's number of outputs."""
    parts.attention = f"{parts.name}.{name}"
    parts.attention_module = parts.attention_writer = module
    last = _last_linear(module, None, None)
    # nn.MultiheadAttention never calls its last layer as a module.
    if last is not None and not isinstance(module, nn.MultiheadAttention):
        parts.attention_writer = _wrapper(module, last)[1]
    return None if last is None else _out_features(last[1])


def attention_in(block: nn.Module, width: int | None = None) -> tuple[str, nn.Module] | None:
    """Return the name and module of a block's attention, by its name or class, or by how it is built."""
    inside = [part for part in block.named_modules() if part[0]]
    named = next((part for part in inside if _is_attention(*part)), None)
    return named or next((part for part in inside if _is_built_like_attention(part[1], width)), None)


def find_mixture(block: nn.Module) -> tuple[str, str, int] | None:
    """Return the names of a mixture of experts in a block and of its router, and the number of experts; None without.

    The router is next to the experts and has one output for each: its last matrix is (experts, width).
    """
    for name, module in block.named_modules():
        for part, experts in module.named_children() if name else ():
            count = _count_experts(experts)
            for other, router in module.named_children() if count > 1 else ():
                matrices = [weight for weight in router.parameters() if weight.ndim > 1]
                if other != part and matrices and matrices[-1].ndim == 2 and matrices[-1].shape[0] == count:
                    return name, f"{name}.{other}", count
    return None


def _count_experts(module: nn.Module) -> int:
    """Return the number of experts that a module holds, as a list or in parameters (experts, …, …); 0 for others."""
    if isinstance(module, nn.ModuleList):
        return len(module) if len({type(expert) for expert in module}) == 1 else 0
    if isinstance(module, _ConvNd):
        return 0
    sizes = {each.shape[0] for each in module.parameters(recurse=False) if each.ndim == 3}
    return sizes.pop() if len(sizes) == 1 else 0


def is_matrix(module: nn.Module) -> bool:
    """Return whether a module is a linear layer, or holds experts' matrices."""
    return _is_linear(module) or _count_experts(module) > 1


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


def _last_linear_of_feed_forward(block: nn.Module, width: int | None) -> tuple[str, nn.Module] | None:
    """Return the last layer of a child that is named as a feed-forward; a layer after it may be an adapter."""
    for name, child in reversed(list(block.named_children())):
        if any(word in name.lower() for word in FEED_FORWARDS) and any(True for _ in child.children()):
            found = _last_linear(child, None, width)
            return None if found is None else (f"{name}.{found[0]}", found[1])
    return None


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
