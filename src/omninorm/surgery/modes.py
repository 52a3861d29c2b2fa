"""Modes under which a proof runs a model: all in float64, every expert chosen, and the parameters that are read.

They intercept PyTorch's operations below the modules, so it does not matter how a class spells its computation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

_LOWER = (torch.float32, torch.bfloat16, torch.float16)
aten = torch.ops.aten


class Mode(TorchDispatchMode):
    """Intercepts operations; not for compiled code, so PyTorch need not keep its compiler out at every one."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class InDouble(Mode):
    """Computes in float64 where a model asks for a narrower dtype, as routers and norms do, and drops nothing out.

    Where training would draw a mask, every element is kept and scaled alike.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") in _LOWER:
            kwargs["dtype"] = torch.float64
        if func is aten._to_copy.default and _needs_no_copy(args[0], kwargs):
            return args[0]
        if func is aten.bernoulli_.float:
            return args[0].fill_(1.0)
        if func is aten.native_dropout.default:
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        return func(*args, **kwargs)


def _needs_no_copy(x: Tensor, kwargs: Mapping[str, Any]) -> bool:
    """Return whether a conversion has become one of float64 to float64."""
    others = any(kwargs.get(name) is not None for name in ("layout", "device", "memory_format", "pin_memory"))
    return x.dtype == kwargs.get("dtype") == torch.float64 and not others


class EveryExpert(Mode):
    """Chooses experts in turn, whatever a router prefers; the scores stay the router's.

    Args:
        counts: numbers of experts. Choices among fewer are left alone, such as those of groups, and choices among more
            than twice as many; a router may know some more than have weights.
        turn: which experts the first token gets.

    Attributes:
        turns: how many turns it takes until every expert was chosen; 0 if nothing is chosen.
    """

    def __init__(self, counts: set[int], turn: int = 0) -> None:
        super().__init__()
        self.counts, self.turn, self.turns = counts, turn, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        chosen = _chosen(func, args, kwargs)
        if chosen is None or not self.counts or not min(self.counts) <= args[0].shape[-1] <= 2 * max(self.counts):
            return func(*args, **kwargs)
        scores, (number, keep) = args[0], chosen
        indices = self._indices(scores, number)
        indices = indices if keep else indices[..., 0]
        if func is aten.argmax.default:
            return indices
        index = indices if keep else indices[..., None]
        values = scores.gather(-1, index)
        return values if keep else values[..., 0], indices

    def _indices(self, scores: Tensor, number: int) -> Tensor:
        """Return consecutive experts for consecutive tokens."""
        experts = scores.shape[-1]
        tokens = max(1, scores.numel() // experts)
        self.turns = max(self.turns, -(-experts // (tokens * number)))
        first = torch.arange(tokens, device=scores.device) * number + self.turn * tokens * number
        indices = (first[:, None] + torch.arange(number, device=scores.device)) % experts
        return indices.view(*scores.shape[:-1], number)


def _chosen(func: Any, args: Any, kwargs: Any) -> tuple[int, bool] | None:
    """Return how many of the last dimension are chosen, and whether that dimension stays; None for other operations."""
    if func not in (aten.topk.default, aten.argmax.default, aten.max.dim) or not args[0].ndim:
        return None
    if func is aten.topk.default:
        dim = kwargs.get("dim", args[2] if len(args) > 2 else -1)
        number, keep = int(args[1]), True
    else:
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        number, keep = 1, bool(kwargs.get("keepdim", args[2] if len(args) > 2 else False))
    return (number, keep) if dim in (-1, args[0].ndim - 1) else None


def expert_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that may hold a matrix for each expert: those of three dimensions, but no convolution's."""
    return {
        f"{name}.{own}".lstrip("."): value
        for name, module in model.named_modules()
        for own, value in module._parameters.items()
        if value is not None and value.ndim == 3 and not isinstance(module, nn.modules.conv._ConvNd)
    }


def expert_counts(model: nn.Module) -> set[int]:
    """Return the numbers that may be a model's number of experts: of tensors for each, or of modules."""
    return {value.shape[0] for value in expert_tensors(model).values()} | {
        len(module) for module in model.modules() if isinstance(module, nn.ModuleList)
    } - {1}


class Touched(Mode):
    """Records which parameters an operation other than a view reads; of experts in one tensor, which of them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.parameters: dict[str, nn.Parameter] = dict(model.named_parameters())
        self.stacks = set(expert_tensors(model))
        self.read: dict[str, Tensor] = {
            name: torch.zeros(value.shape[0] if name in self.stacks else 1, dtype=torch.bool)
            for name, value in self.parameters.items()
        }
        self._by_storage = {storage(value): name for name, value in self.parameters.items() if value.numel()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not is_view(func):
            for tensor in tensors_in((args, kwargs or {})):
                name = self._by_storage.get(storage(tensor))
                if name is not None:
                    self.touch(name, tensor)
        return func(*args, **(kwargs or {}))

    def touch(self, name: str, view: Tensor) -> None:
        """Record that a view of a parameter was read."""
        read, each = self.read[name], self.parameters[name].numel() // len(self.read[name])
        if not view.numel():
            return
        first = view.storage_offset()
        last = first + sum((size - 1) * abs(stride) for size, stride in zip(view.shape, view.stride(), strict=True))
        read[first // each : last // each + 1] = True

    def unread(self) -> dict[str, str]:
        """Return the parameters that were not read as a whole: name → which experts are missing, or an empty text."""
        found = {}
        for name, read in self.read.items():
            missing = [str(number) for number in (~read).nonzero().flatten().tolist()]
            if missing:
                few = ", ".join(missing[:3]) + (", …" if missing[3:] else "")
                found[name] = "" if len(missing) == len(read) else f"{len(missing)} of {len(read)} experts ({few})"
        return found

    def share(self) -> float:
        """Return the share of all parameters that were read."""
        sizes = {name: self.parameters[name].numel() for name in self.read}
        read = sum(float(mask.double().mean()) * sizes[name] for name, mask in self.read.items())
        return read / max(1, sum(sizes.values()))

    def experts(self) -> tuple[int, int]:
        """Return how many experts' matrices in shared tensors were read, and how many there are."""
        masks = [mask for name, mask in self.read.items() if name in self.stacks]
        return sum(int(mask.sum()) for mask in masks), sum(len(mask) for mask in masks)


def storage(tensor: Tensor) -> int:
    """Return the address of a tensor's memory, or of the object if it has no memory, such as a wrapper."""
    try:
        return tensor.untyped_storage().data_ptr() or id(tensor)
    except (RuntimeError, NotImplementedError):
        return id(tensor)


def is_view(func: Any) -> bool:
    """Return whether an operation returns a view of its argument and reads no element."""
    returns = func._schema.returns
    return bool(returns) and all(each.alias_info is not None and not each.alias_info.is_write for each in returns)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested arguments."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from tensors_in(each)
    elif isinstance(value, dict):
        for each in value.values():
            yield from tensors_in(each)
