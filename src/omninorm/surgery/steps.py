"""How operations of PyTorch move, join, read and break the vectors of spaces; see spaces.py.

Each function returns whether it could follow the vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from omninorm.surgery.flow import axis_of
from omninorm.surgery.modes import aten, tensors_in
from omninorm.surgery.spaces import OTHERS, Mark

if TYPE_CHECKING:
    from omninorm.surgery.walk import Walk

_SUMS = {aten.add, aten.add_, aten.sub, aten.sub_}
_PRODUCTS = {aten.mul, aten.mul_, aten.div, aten.div_}
_CONTRACTIONS = {aten.mm, aten.addmm, aten.bmm}
_INSERTIONS = {aten.index_add, aten.index_add_, aten.index_put, aten.index_put_}
_ATTENTIONS = {
    aten._scaled_dot_product_flash_attention_for_cpu, aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_efficient_attention, aten._scaled_dot_product_cudnn_attention,
    aten._scaled_dot_product_fused_attention_overrideable,
}  # fmt: skip
DOES_NOT_COMMUTE = "does not commute with a rotation"


def move(walk: Walk, func: Any, args: Any, kwargs: Any, result: Any) -> bool:
    mark = walk.mark_of(args[0])
    if mark is None or any(each in walk.marks for each in tensors_in((args[1:], kwargs))):
        return False
    keywords = {name: value for name, value in kwargs.items() if name not in ("dtype", "memory_format", "device")}
    if func.overloadpacket in (aten._to_copy, aten.clone, aten.lift_fresh):
        moved: Any = mark.features
    elif func.overloadpacket in (aten.view, aten._unsafe_view, aten._reshape_copy, aten.view_copy):
        moved = mark.features.reshape(result.shape)
    else:
        moved = func(mark.features, *args[1:], **keywords)
    results = result if isinstance(result, (tuple, list)) else [result]
    for each, features in zip(results, moved if isinstance(moved, (tuple, list)) else [moved], strict=True):
        walk.put(each, Mark(mark.space, features, mark.sources))
    return True


def _embedding(walk: Walk, func: Any, args: Any, kwargs: Any, result: Any) -> bool:
    parameter = walk.parameter(args[0])
    if parameter is None or args[0].shape != parameter.shape or args[0] in walk.marks:
        return False
    walk.put(result, walk.written(parameter, 1, result.shape, -1, result.device))
    return True


def _sum(walk: Walk, func: Any, args: Any, kwargs: Any, result: Any) -> bool:
    """Join the spaces of the terms, whose features must agree; zeros have any."""
    terms = [each for each in args[:2] if not (walk.is_zero(each) if isinstance(each, Tensor) else each == 0)]
    marks = [walk.mark_of(each) for each in terms]
    return _joined(walk, marks, result, func)


def _joined(walk: Walk, marks: Sequence[Mark | None], result: Tensor, func: Any) -> bool:
    """Mark a sum. If something else computes a term, the others stay one space, but a broken one."""
    known = [mark for mark in marks if mark is not None]
    if not known or any(mark.features.shape[-1:] != result.shape[-1:] for mark in known):
        return False
    expanded = [mark.features.expand(result.shape) for mark in known]
    if any(not torch.equal(expanded[0], each) for each in expanded[1:]):
        return False
    space = known[0].space.root()
    for mark in known[1:]:
        space = walk.union(space, mark.space)
    partial = len(known) < len(marks)
    if partial or len({mark.sources for mark in known}) > 1:
        for mark in known:
            walk.use(mark, "added to others")
    sources = frozenset([OTHERS] if partial else []).union(*(mark.sources for mark in known))
    joined = Mark(space, expanded[0], sources)
    if partial:
        walk.lose(joined, f"{walk.where(func)} adds something that no linear layer computes")
    walk.put(result, joined)
    return True


def _product(walk: Walk, func: Any, args: Any, kwargs: Any, result: Any) -> bool:
    """Scale vectors: by a number, or by one factor for each."""
    sides = [each for each in args[:2] if isinstance(each, Tensor) and each in walk.marks]
    if len(sides) != 1 or (func.overloadpacket in (aten.div, aten.div_) and sides[0] is not args[0]):
        return False
    mark = walk.marks[sides[0]]
    other = args[1] if sides[0] is args[0] else args[0]
    if isinstance(other, Tensor) and other.numel() > 1 and not _uniform(other):
        if other.shape[-1] != 1 and other.stride(-1) != 0:
            return False
        walk.together(mark)
        walk.strange(other, func)
    walk.put(result, Mark(mark.space, mark.features.expand(result.shape), mark.sources))
    return True


def _uniform(tensor: Tensor) -> bool:
    """Return whether all elements are equal, as those of dropout's mask are in a proof."""
    return bool((tensor == tensor.flatten()[0]).all())


def _negative(walk: Walk, func: Any, args: Any, kwargs: Any, result: Any) -> bool:
    mark = walk.mark_of(args[0])
    if mark is not None:
        walk.put(result, mark)
    return mark is not None


def _contraction(walk: Walk, func: Any, args: Any, kwargs: Any, result: Any) -> bool:
    """Read and write with a parameter's matrix, or mix the vectors of tokens."""
    first = 1 if func.overloadpacket is aten.addmm else 0
    left, right = args[first], args[first + 1]
    matrix = walk.parameter(right)
    if matrix is None:
        return not first and _mix(walk, left, right, result)
    if right in walk.marks or walk.parameter(left) is not None:
        return False
    reads, writes = axis_of(matrix, right, -2), axis_of(matrix, right, -1)
    if reads is None or writes is None or reads == writes:
        return False
    read(walk, walk.marks.get(left), matrix, reads, func)
    mark = walk.written(matrix, writes, result.shape, -1, result.device)
    if not first:
        walk.put(result, mark)
        return True
    bias = walk.mark_of(args[0])
    return _joined(walk, [mark, bias], result, func)


def read(walk: Walk, mark: Mark | None, matrix: nn.Parameter, axis: int, func: Any) -> None:
    """Record what a parameter's dimension is contracted with."""
    if mark is None:
        walk.foreign.setdefault((id(matrix), axis), f"{walk.where(func)}, on other vectors")
        return
    rows = walk.rows(mark.features)
    if not rows:
        return
    if len(rows) > 1:
        walk.lose(mark, f"{walk.where(func)} reads different features at different times")
        walk.foreign.setdefault((id(matrix), axis), walk.where(func))
        return
    walk.together(mark)
    walk.slot(matrix, axis, rows[0], mark.space.root())
    walk.use(mark, f"read by {'.'.join(walk.owner(matrix)).lstrip('.')}")


def _mix(walk: Walk, left: Tensor, right: Tensor, result: Tensor) -> bool:
    """Average the rows of the right factor."""
    mark = walk.marks.get(right)
    if mark is None or left in walk.marks or walk.parameter(left) is not None:
        return False
    first = mark.features.narrow(-2, 0, 1)
    if not torch.equal(first.expand(mark.features.shape), mark.features):
        return False
    walk.together(mark, mixed=True)
    walk.put(result, Mark(mark.space, first.expand(result.shape), mark.sources))
    return True


def _attention(walk: Walk, func: Any, args: Any, kwargs: Any, result: Any) -> bool:
    mark = walk.marks.get(args[2])
    for each in args[:2]:
        if each in walk.marks:
            walk.lose(walk.marks[each], f"{walk.where(func)} {DOES_NOT_COMMUTE}")
    if mark is None:
        return True
    first = mark.features[..., :1, :]
    if not torch.equal(first.expand(mark.features.shape), mark.features):
        return False
    walk.together(mark, mixed=True)
    first = first.repeat_interleave(result[0].shape[1] // first.shape[1], 1)
    walk.put(result[0], Mark(mark.space, first.expand(result[0].shape), mark.sources))
    return True


def _cat(walk: Walk, func: Any, args: Any, kwargs: Any, result: Any) -> bool:
    """Put vectors of one space one after the other, as caches and class tokens do."""
    tensors = [each for each in args[0] if each.numel()]
    marks = [walk.mark_of(each) for each in tensors]
    known = [mark for mark in marks if mark is not None]
    dim = args[1] if len(args) > 1 else 0
    last = dim in (-1, result.ndim - 1)
    if not known or len(known) < len(marks) or (last and len({mark.space.root() for mark in known}) > 1):
        return False
    space = known[0].space
    for mark in known[1:]:
        space = walk.union(space, mark.space)
    features = torch.cat([mark.features for mark in known], dim)
    walk.put(result, Mark(space, features, frozenset().union(*(mark.sources for mark in known))))
    return True


def _insertion(walk: Walk, func: Any, args: Any, kwargs: Any, result: Any) -> bool:
    """Add vectors to some of a tensor's, or put them in their place, as experts do."""
    adds = func.overloadpacket in (aten.index_add, aten.index_add_)
    target, source = args[0], args[3] if adds else args[2]
    whole = adds or len(args[1]) < target.ndim
    if not whole or (adds and args[1] in (-1, target.ndim - 1)):
        return False
    new = walk.mark_of(source)
    if new is None or not (walk.is_zero(target) or target in walk.marks):
        return False
    rows = walk.rows(new.features)
    if not rows:
        return bool(func._schema.is_mutable)
    if len(rows) != 1 or len(rows[0]) != target.shape[-1]:
        return False
    row = torch.tensor(rows[0], device=target.device)
    walk.use(new, "added to others")
    marks = [walk.marks.get(target), Mark(new.space, row.expand(result.shape), new.sources)]
    return _joined(walk, [mark for mark in marks if mark is not None], result, func)


def _reduce(walk: Walk, func: Any, args: Any, kwargs: Any, result: Any) -> bool:
    """Add vectors, or average them."""
    mark = walk.marks.get(args[0])
    dims = args[1] if len(args) > 1 else None
    if mark is None or not dims or any(dim in (-1, args[0].ndim - 1) for dim in dims):
        return False
    rows = walk.rows(mark.features)
    if len(rows) != 1:
        return False
    walk.use(mark, "mixed over tokens")
    row = torch.tensor(rows[0], device=result.device)
    walk.put(result, Mark(mark.space, row.expand(result.shape), mark.sources))
    return True


def _convolution(walk: Walk, func: Any, args: Any, kwargs: Any, result: Any) -> bool:
    """Write channels, as patch embeddings do."""
    kernel = walk.parameter(args[1])
    if kernel is None or args[0] in walk.marks or args[6] or args[1].shape != kernel.shape:
        return False
    mark = walk.written(kernel, 0, result.shape, 1, result.device)
    for axis in range(1, kernel.ndim):
        walk.foreign.setdefault((id(kernel), axis), walk.where(func))
    bias = None if args[2] is None else walk.parameter(args[2])
    if args[2] is not None:
        if bias is None or bias.ndim != 1:
            return False
        other = walk.written(bias, 0, result.shape, 1, result.device)
        mark = Mark(walk.union(mark.space, other.space), mark.features, mark.sources)
    walk.put(result, mark)
    return True


Step = Callable[["Walk", Any, Any, Any, Any], bool]
STEPS: Mapping[Any, Step] = {
    aten.embedding: _embedding,
    aten.neg: _negative,
    aten.cat: _cat,
    aten.sum: _reduce,
    aten.mean: _reduce,
    aten.convolution: _convolution,
    **dict.fromkeys(_SUMS, _sum),
    **dict.fromkeys(_PRODUCTS, _product),
    **dict.fromkeys(_CONTRACTIONS, _contraction),
    **dict.fromkeys(_INSERTIONS, _insertion),
    **dict.fromkeys(_ATTENTIONS, _attention),
}
