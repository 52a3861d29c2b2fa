"""Finds what consumes the outputs of norms, by following them through the operations of a run.

Every element of a norm's output is marked with its feature. Marks move along with views, copies, indexing and products
with other tensors, until a matrix product contracts them with a parameter: that parameter consumes the norm along one
of its dimensions, whatever the module, and however many experts lie in one tensor. Any other operation on marked
elements is a consumer that nothing can be folded into.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from omninorm.surgery.modes import Mode, aten, is_view, storage, tensors_in
from omninorm.surgery.runs import Run, call

# Operations that move elements and compute nothing.
MOVES = {
    aten.clone, aten._to_copy, aten.index, aten.index_select, aten.repeat, aten.gather, aten._unsafe_view, aten.flip,
    aten.roll, aten.lift_fresh, aten._reshape_copy, aten.view_copy, aten.slice_copy,
}  # fmt: skip
# Views that depend on how elements are stored.
NO_MOVES = {aten.as_strided.default, aten.view.dtype}
_PRODUCTS = {aten.mul, aten.div}
_CONTRACTIONS = {aten.mm, aten.bmm, aten.addmm, aten.baddbmm, aten.linear, aten.matmul, aten.mv}
# Operations that read no values.
NEUTRAL = {aten.empty_like, aten.zeros_like, aten.ones_like, aten.new_zeros, aten.new_empty, aten.new_ones,
            aten.new_full, aten.full_like, aten.sym_size, aten.is_same_size}  # fmt: skip


@dataclass(frozen=True)
class Reader:
    """A parameter that consumes a norm's output.

    Args:
        module, own: the parameter.
        dim: the parameter's dimension that is contracted.
        features: for each index of that dimension, the norm's feature.
    """

    module: str
    own: str
    dim: int
    features: tuple[int, ...]

    @property
    def name(self) -> str:
        """The module, or the parameter if its name says more."""
        return self.module if self.own == "weight" else f"{self.module}.{self.own}".lstrip(".")


@dataclass
class Reading:
    """The consumers of norms' outputs.

    Args:
        readers: norm's name → parameters that consume its output.
        others: norm's name → the first other consumer, an operation and the module that computes it.
        strangers: parameters that also take part in something else, (module, name) → what.
    """

    readers: dict[str, list[Reader]] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)
    strangers: dict[tuple[str, str], str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Marked:
    """A tensor whose elements are a norm's, with the feature of each."""

    tensor: Tensor  # kept alive, so that no identity or storage is reused
    norm: str
    features: Tensor


class _Follow(Mode):
    """Follows marked tensors."""

    def __init__(self, model: nn.Module, norms: Sequence[str]) -> None:
        super().__init__()
        self.found = Reading({name: [] for name in norms})
        self.marked: dict[int, _Marked] = {}
        self.storages: dict[int, str] = {}
        self.active: list[str] = []  # the modules that are running
        self.streaming = 0
        self.owners: dict[int, list[tuple[str, str, nn.Parameter]]] = {}
        for name, module in model.named_modules():
            for own, parameter in module._parameters.items():
                if parameter is not None and parameter.numel():
                    self.owners.setdefault(storage(parameter), []).append((name, own, parameter))

    def mark(self, norm: str, output: Tensor) -> None:
        """Mark a norm's output."""
        features = torch.arange(output.shape[-1]).expand(output.shape)
        self._put(_Marked(output, norm, features))

    def clear(self) -> None:
        """Forget a run's tensors."""
        self.marked.clear()
        self.storages.clear()

    def other(self, norm: str, func: Any) -> None:
        """Record a consumer that is no matrix product with a parameter."""
        where = self.active[-1] if self.active else ""
        self.found.others.setdefault(norm, f"{func} in {where or 'the model'}")

    def read(self, norm: str, reader: Reader) -> None:
        """Record a parameter that consumes a norm's output."""
        if reader not in self.found.readers[norm]:
            self.found.readers[norm].append(reader)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self.streaming:
            return result
        touched = [mark for tensor in tensors_in((args, kwargs)) if (mark := self._mark_of(tensor)) is not None]
        known = [mark for mark in touched if isinstance(mark, _Marked)]
        used = self._parameters(func, args, kwargs)
        for mark in touched:
            if isinstance(mark, str):  # a view that could not be followed
                self.other(mark, func)
        if known:
            self._consume(func, args, kwargs, result, known, used)
        else:
            for module, own, _, _ in used:
                self.found.strangers.setdefault((module, own), f"{func} in {self._where()}")
        return result

    def _consume(self, func: Any, args: Any, kwargs: Any, result: Any, known: list[_Marked], used: Any) -> None:
        packet = func.overloadpacket
        norms = {mark.norm for mark in known}
        if packet in NEUTRAL:
            return
        if is_view(func) or packet in MOVES:
            moved = len(known) == 1 and self._mark_of(args[0]) is known[0] and func not in NO_MOVES
            if moved and self._move(func, args, kwargs, result, known[0]):
                return
        elif packet is aten.cat and self._cat(args, result):
            return
        elif packet in _PRODUCTS and len(known) == 1 and not (packet is aten.div and args[0] is not known[0].tensor):
            features = known[0].features.expand(result.shape) if isinstance(result, Tensor) else None
            if features is not None:
                self._put(_Marked(result, known[0].norm, features))
                return
        elif packet in _CONTRACTIONS and len(known) == 1 and self._contract(func, args, known[0], used):
            return
        for norm in norms:
            self.other(norm, func)
        for module, own, _, _ in used:
            self.found.strangers.setdefault((module, own), f"{func} in {self._where()}")

    def _move(self, func: Any, args: Any, kwargs: Any, result: Any, mark: _Marked) -> bool:
        """Move the marks as the operation moves elements; return whether it can move marks."""
        keywords = {name: value for name, value in kwargs.items() if name not in ("dtype", "memory_format")}
        if func.overloadpacket is aten._to_copy:
            moved: Any = mark.features
        elif func.overloadpacket in (aten.view, aten._unsafe_view):
            moved = mark.features.reshape(result.shape)
        else:
            try:
                moved = func(mark.features, *args[1:], **keywords)
            except RuntimeError:  # a view of integers that does not exist, such as one of complex numbers
                return False
        results = result if isinstance(result, (tuple, list)) else [result]
        for each, features in zip(results, moved if isinstance(moved, (tuple, list)) else [moved], strict=True):
            self._put(_Marked(each, mark.norm, features))
        return True

    def _cat(self, args: Any, result: Tensor) -> bool:
        """Move the marks of tensors of one norm that are put together, as a cache does; return whether they are."""
        marks = [self._mark_of(tensor) for tensor in args[0] if tensor.numel()]
        known = [mark for mark in marks if isinstance(mark, _Marked)]
        if len(known) < len(marks) or len({mark.norm for mark in known}) != 1:
            return False
        features = torch.cat([mark.features for mark in known], *args[1:])
        self._put(_Marked(result, known[0].norm, features))
        return True

    def _contract(self, func: Any, args: Any, mark: _Marked, used: Any) -> bool:
        """Record the parameter with which a matrix product contracts the marked tensor; return whether there is one."""
        packet = func.overloadpacket
        first = 1 if packet in (aten.addmm, aten.baddbmm) else 0
        left, right = args[first], args[first + 1]
        if packet in (aten.addmm, aten.baddbmm) and self._mark_of(args[0]) is not None:
            return False
        rows = mark.features
        if left is mark.tensor:
            operand, dim = right, -1 if packet is aten.linear else max(-2, -right.ndim)
        elif right is mark.tensor and packet is not aten.linear:
            operand, dim = left, -1
            rows = rows.transpose(-1, -2) if rows.ndim > 1 else rows
        else:
            return False
        features = rows.reshape(-1, rows.shape[-1])
        matches = [each for each in used if each[3] is operand]
        if len(features) == 0:
            return True
        if not matches or bool((features != features[0]).any()):
            return False
        module, own, parameter, _ = matches[0]
        axis = axis_of(parameter, operand, dim)
        if axis is None:
            return False
        self.read(mark.norm, Reader(module, own, axis, tuple(features[0].tolist())))
        for other, name, _, tensor in used:
            if tensor is not operand and tensor is not (args[0] if first else None):
                self.found.strangers.setdefault((other, name), f"{func} in {self._where()}")
        return True

    def _parameters(self, func: Any, args: Any, kwargs: Any) -> list[tuple[str, str, nn.Parameter, Tensor]]:
        """Return the parameters that an operation reads, each with the view that it gets."""
        if is_view(func):
            return []
        found = []
        for tensor in tensors_in((args, kwargs)):
            owners = self.owners.get(storage(tensor))
            if owners:
                module, own, parameter = max(owners, key=lambda owner: self._depth(owner[0]))
                found.append((module, own, parameter, tensor))
        return found

    def _depth(self, module: str) -> int:
        """Return how deep among the running modules one is; of the owners of a tied parameter, that one reads it."""
        return self.active.index(module) if module in self.active else -1

    def _where(self) -> str:
        return (self.active[-1] if self.active else "") or "the model"

    def _put(self, mark: _Marked) -> None:
        self.marked[id(mark.tensor)] = mark
        self.storages[storage(mark.tensor)] = mark.norm

    def _mark_of(self, tensor: Tensor) -> _Marked | str | None:
        """Return a tensor's mark; the norm's name if only its memory is known; None if it is not marked."""
        mark = self.marked.get(id(tensor))
        return mark if mark is not None else self.storages.get(storage(tensor))


def trace(model: nn.Module, norms: Sequence[str], streamed: Sequence[str], runs: Sequence[Run]) -> Reading:
    """Run the model and record what consumes each norm's output.

    Args:
        model: a copy in float64.
        norms: names of modules.
        streamed: names of modules whose matrix is in a file; they are called as a whole.
        runs: what to run.
    """
    follow = _Follow(model, norms)

    def enters(name: str, is_streamed: bool) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            follow.active.append(name)
            if is_streamed:
                _enter_streamed(follow, name, args)

        return hook

    def leaves(name: str, is_streamed: bool, is_norm: bool) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            follow.active.pop()
            follow.streaming -= is_streamed
            if is_norm and isinstance(output, Tensor):
                follow.mark(name, output)

        return hook

    with ExitStack() as stack:
        for name, module in model.named_modules():
            for hook in (
                module.register_forward_pre_hook(enters(name, name in streamed), with_kwargs=True),
                module.register_forward_hook(leaves(name, name in streamed, name in norms)),
            ):
                stack.callback(hook.remove)
        for run in runs:
            with follow:
                call(model, run)
            follow.clear()
            follow.active.clear()
    return follow.found


def _enter_streamed(follow: _Follow, name: str, args: Any) -> None:
    """Record what a module reads whose matrix is in a file, and let its own operations alone."""
    follow.streaming += 1
    mark = follow._mark_of(args[0]) if args and isinstance(args[0], Tensor) else None
    if isinstance(mark, _Marked):
        features = mark.features.reshape(-1, mark.features.shape[-1])
        if len(features) and not bool((features != features[0]).any()):
            follow.read(mark.norm, Reader(name, "weight", 1, tuple(features[0].tolist())))
        elif len(features):
            follow.other(mark.norm, "linear")
    elif isinstance(mark, str):
        follow.other(mark, "linear")
    else:
        follow.found.strangers.setdefault((name, "weight"), f"linear in {name}")


def axis_of(parameter: nn.Parameter, operand: Tensor, dim: int) -> int | None:
    """Return the dimension of a parameter that is the dimension of its view, by its stride."""
    size, stride = operand.shape[dim], operand.stride(dim)
    axes = [
        axis for axis in range(parameter.ndim) if parameter.shape[axis] == size and parameter.stride(axis) == stride
    ]
    return axes[0] if len(axes) == 1 or (axes and size > 1) else None


def mean_shares(model: nn.Module, norms: Sequence[str], runs: Sequence[Run]) -> Mapping[str, float]:
    """Return the largest mean² over mean square of each norm's input, over its rows."""
    found = dict.fromkeys(norms, 0.0)

    def look(name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            found[name] = max(found[name], _mean_share(args[0]))

        return hook

    hooks = [model.get_submodule(name).register_forward_pre_hook(look(name)) for name in norms]
    try:
        for run in runs:
            call(model, run)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _mean_share(x: Tensor) -> float:
    if not x.numel():
        return 0.0
    x = x.detach().double()
    power = x.square().mean(-1).clamp_min(torch.finfo(torch.float64).tiny)
    return float((x.mean(-1).square() / power).max())
