"""Helpers for the tensors in modules' arguments and outputs, and for distributed tensors."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from omninorm.kernels.distributed import is_distributed

MOST_KEPT = 256
_kept: dict[tuple[tuple[float, ...], torch.device, torch.dtype], Tensor] = {}


def here(x: Any) -> Tensor:
    """Return the local shard of a DTensor, such as parameters and gradients of FSDP2; other tensors unchanged."""
    return x.to_local() if is_distributed(x) else x  # type: ignore[no-any-return]


def whole(x: Any) -> Tensor:
    """Return the full tensor of a DTensor, which all processes must request; other tensors unchanged."""
    return x.full_tensor() if is_distributed(x) else x  # type: ignore[no-any-return]


def reshard(model: nn.Module) -> None:
    """Reshard FSDP2 modules. A forward pass without a backward pass leaves gathered parameters in place of the sharded
    ones that the optimizer holds."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    for module in model.modules() if fsdp else ():
        if isinstance(module, fsdp.FSDPModule):  # type: ignore[union-attr]
            module.reshard()


def norms_of_whole(norms: Tensor, tensors: Sequence[Any]) -> Tensor:
    """Turn the norms of local shards into norms of full tensors, with one all-reduce per process group."""
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
        index = constant(tuple(places), squares.device)
        of_these = squares[index]
        dist.all_reduce(of_these, group=mesh.get_group(dim))
        squares[index] = of_these
    return squares.sqrt().to(norms.dtype)


def constant(values: tuple[float, ...], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """Return a tensor of these values on the device, for reading only. It is kept, because each copy would
    synchronize."""
    key = (values, device, dtype)
    tensor = _kept.pop(key, None)
    if tensor is None:
        tensor = torch.tensor(values, device=device, dtype=dtype)
        if not holds_numbers(tensor):  # inside a FakeTensorMode or a function transform, and of no use outside
            return tensor
    _kept[key] = tensor  # at the end, so that the one that was not used for longest is dropped first
    if len(_kept) > MOST_KEPT:
        del _kept[next(iter(_kept))]
    return tensor


def holds_numbers(x: Tensor) -> bool:
    """Return whether a tensor has values of its own: not one of a FakeTensorMode, of a function transform such as
    vmap, or on the meta device."""
    if type(x) is not Tensor and isinstance(x, FakeTensor):
        return False
    return not (x.is_meta or torch._C._functorch.is_functorch_wrapped_tensor(x))


def widest(device: torch.device) -> torch.dtype:
    """Return float64, or float32 where the device does not support it."""
    return torch.float32 if device.type == "mps" else torch.float64


def by_kind(values: Mapping[int, Tensor]) -> dict[tuple[torch.device, torch.dtype], set[int]]:
    """Return the keys of the tensors of each device and dtype."""
    kinds: dict[tuple[torch.device, torch.dtype], set[int]] = {}
    for key, value in values.items():
        kinds.setdefault((value.device, value.dtype), set()).add(key)
    return kinds


def stack(scalars: Sequence[Tensor], device: torch.device) -> Tensor:
    """Stack scalars of any device and precision into one tensor, in float64 where the device supports it."""
    wide = widest(device)
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for at, scalar in enumerate(scalars):
        kinds.setdefault((scalar.device, scalar.dtype), []).append(at)
    parts = [
        torch.stack([scalars[at] for at in places]).to(device, wide, non_blocking=True) for places in kinds.values()
    ]
    if len(parts) == 1:
        return parts[0]
    places = [at for of_kind in kinds.values() for at in of_kind]
    order = sorted(range(len(places)), key=places.__getitem__)
    return torch.cat(parts)[constant(tuple(order), device)]


def version_of(x: Tensor) -> int:
    """Return how often a tensor has been written in place; −1 for an inference tensor, which does not count this."""
    return -1 if x.is_inference() else x._version


def some_tensors(value: object) -> Iterator[Tensor]:
    """Yield the floating-point tensors of two or more dimensions in a module's arguments or output, in order."""
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
    """Return the first floating-point tensor of two or more dimensions in a module's arguments or output."""
    if isinstance(value, Tensor):
        return value if value.is_floating_point() and value.ndim >= 2 else None
    return next(some_tensors(value), None)


def first_argument(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the first such tensor among a module's arguments."""
    found = first_tensor(args[0]) if args else None
    return next(some_tensors([*args, *kwargs.values()]), None) if found is None else found


def with_first_tensor(output: Any, tensor: Tensor) -> Any:
    """Return the output with its first tensor replaced; None, for no change, if it is no tensor or tuple."""
    if isinstance(output, Tensor):
        return tensor
    if type(output) is tuple and output and isinstance(output[0], Tensor):
        return (tensor, *output[1:])
    return None


def find_logits(output: Any, vocabularies: set[int]) -> Tensor | None:
    """Return the logits in a model's output: its attribute or item "logits", or a tensor as wide as a vocabulary."""
    named = None
    if not isinstance(output, Tensor):
        named = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", None)
    if isinstance(named, Tensor) and named.is_floating_point() and named.ndim >= 2:
        return named
    first = first_tensor(output)
    return first if first is not None and first.shape[-1] in vocabularies else None
