"""Finds stacks of blocks: containers whose members are transformer blocks, or any other residual blocks.

There is no list of models. A stage is a member that contains a stack of complete blocks, such as a backbone in a
Sequential or a stage of a vision model; its inner blocks are taken instead.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator

from torch import nn
from torch.nn.modules.conv import _ConvNd

from omninorm.monitor.model_map.parts import attention_in, is_matrix

CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
LISTS = (nn.ModuleList, nn.ModuleDict)  # containers that are never called
Stack = list[tuple[str, nn.Module]]


class Stacks:
    """The stacks of a model.

    Args:
        norms: the ids of the model's norms.
    """

    def __init__(self, norms: Collection[int]) -> None:
        self._norms = norms
        self._seen: set[int] = set()

    def find(self, module: nn.Module, name: str = "") -> list[Stack]:
        """Return the stacks in a module, first to last, each with the names and modules of its blocks."""
        children = [(f"{name}.{part}".lstrip("."), child) for part, child in module.named_children()]
        if not isinstance(module, CONTAINERS):
            return [stack for part, child in children for stack in self._once(part, child)]
        members = [(part, child) for part, child in children if _is_composite(child)]
        inner = {part: self._once(part, child) for part, child in members}
        stages = [stack for stacks in inner.values() for stack in stacks if self._is_complete(stack)]
        if stages:
            return stages
        own = self._blocks_among(module, members, len(children))
        return [own] if own else [stack for stacks in inner.values() for stack in stacks]

    def _once(self, name: str, module: nn.Module) -> list[Stack]:
        if id(module) in self._seen:  # shared by several parents
            return []
        self._seen.add(id(module))
        return self.find(module, name)

    def _blocks_among(self, container: nn.Module, members: Stack, children: int) -> Stack:
        """Return the members that are blocks; none if the container is not a stack."""
        if not members:
            return []
        kind, count = Counter(type(child) for _, child in members).most_common(1)[0]
        normed = [(name, child) for name, child in members if self._has_norm(child) or attention_in(child)]
        if kind in CONTAINERS:
            whole = len(normed) == len(members) and len(members) > 1
            return normed if whole and count == len(members) else []
        if len(members) == 1:
            return members if self._has_norm(members[0][1]) and children <= 2 else []
        alike = [(name, child) for name, child in members if type(child) is kind]
        if count == len(members):
            return alike if 2 * count >= children or len(normed) == count else []
        mixed = isinstance(container, nn.ModuleList) or count > 1
        if mixed and len(normed) >= 2:
            return normed
        return alike if 2 * count >= children and count > 1 else []

    def _is_complete(self, stack: Stack) -> bool:
        """Return whether at least half of the members mix tokens and features: no sublayers, experts or heads."""
        complete = [member for _, member in stack if _mixes_both(member)]
        return 2 * len(complete) >= len(stack)

    def _has_norm(self, module: nn.Module) -> bool:
        return any(id(part) in self._norms for part in module.modules())


def called_parts(block: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that a list of sublayers, which is never called itself, calls."""
    for child in block.children():
        if isinstance(child, LISTS):
            yield from called_parts(child)
        else:
            yield child


def _is_composite(module: nn.Module) -> bool:
    """Return whether a module has submodules and matrices. A single convolution is a layer of a feature extractor."""
    # Tables of positions and class tokens, with a first dimension of 1, are no layers.
    matrices = [parameter for parameter in module.parameters() if parameter.ndim >= 2 and parameter.shape[0] > 1]
    convolutions = {id(part.weight) for part in module.modules() if isinstance(part, _ConvNd)}
    is_layer = len(matrices) == 1 and id(matrices[0]) in convolutions
    return any(True for _ in module.children()) and bool(matrices) and not is_layer


def _mixes_both(block: nn.Module) -> bool:
    """Return whether a block has attention and other matrices, or a convolution over positions and at least two."""
    found = attention_in(block)
    if found is not None:
        inside = {id(part) for part in found[1].modules()}
        return any(is_matrix(part) and id(part) not in inside for part in block.modules())
    convolutions = [part for part in block.modules() if isinstance(part, _ConvNd)]
    pointwise = sum(math.prod(part.kernel_size) == 1 for part in convolutions)
    matrices = pointwise + sum(is_matrix(part) for part in block.modules())
    return len(convolutions) > pointwise and matrices >= 2
