"""The tensors in what modules take and return, and what this process has of distributed ones."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from omninorm.kernels.distributed import is_distributed


def here(x: Any) -> Tensor:
    """This process's part of a DTensor, as FSDP2's parameters and gradients are; another tensor as it is."""
    return x.to_local() if is_distributed(x) else x  # type: ignore[no-any-return]


def whole(x: Any) -> Tensor:
    """All of a DTensor, which every process must ask for; another tensor as it is."""
    return x.full_tensor() if is_distributed(x) else x  # type: ignore[no-any-return]


def reshard(model: nn.Module) -> None:
    """Ends what a forward pass without a backward pass leaves of FSDP2: gathered parameters in the place of its own,
    which no optimizer has."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    for module in model.modules() if fsdp else ():
        if isinstance(module, fsdp.FSDPModule):  # type: ignore[union-attr]
            module.reshard()


def norms_of_whole(norms: Tensor, tensors: Sequence[Any]) -> Tensor:
    """‖part‖ of each tensor → ‖whole‖: squares are summed over the processes that have other parts, all at once."""
    by_group: dict[tuple[Any, int], list[int]] = {}
    for at, tensor in enumerate(tensors):
        if is_distributed(tensor):
            for dim, placement in enumerate(tensor.placements):
                if placement.is_shard():
                    by_group.setdefault((tensor.device_mesh, dim), []).append(at)
    if not by_group:
        return norms
    squares = norms.double().square()
    for (mesh, dim), places in by_group.items():
        index = torch.tensor(places, device=squares.device)
        of_these = squares[index]
        dist.all_reduce(of_these, group=mesh.get_group(dim))
        squares[index] = of_these
    return squares.sqrt().to(norms.dtype)


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


def first_tensor(value: Any) -> Tensor | None:
    """The first floating-point tensor of two dimensions or more in a module's arguments or output."""
    return next(some_tensors(value), None)


def with_first_tensor(output: Any, tensor: Tensor) -> Any:
    """The output with `tensor` in the place of its first; None, for no change, where it is no tensor or tuple."""
    if isinstance(output, Tensor):
        return tensor
    if type(output) is tuple and output and isinstance(output[0], Tensor):
        return (tensor, *output[1:])
    return None


def find_logits(output: Any, vocabularies: set[int]) -> Tensor | None:
    """The logits in a model's output: its attribute or item "logits", or a tensor as wide as a vocabulary."""
    named = None
    if not isinstance(output, Tensor):
        named = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", None)
    if isinstance(named, Tensor) and named.is_floating_point() and named.ndim >= 2:
        return named
    first = first_tensor(output)
    return first if first is not None and first.shape[-1] in vocabularies else None
