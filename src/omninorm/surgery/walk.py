"""Follows the vectors of a model's spaces through its runs; see spaces.py."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from omninorm.surgery.flow import MOVES, NEUTRAL, NO_MOVES, axis_of
from omninorm.surgery.modes import Mode, aten, is_view, storage, tensors_in
from omninorm.surgery.runs import Run, by_design, outputs
from omninorm.surgery.spaces import OTHERS, Mark, Space, Spaces, rows_of, slot_name
from omninorm.surgery.steps import DOES_NOT_COMMUTE, STEPS, move, read
from omninorm.surgery.streamed_map import StreamedMap

_ZEROS = {aten.zeros, aten.zeros_like, aten.new_zeros}


class Walk(Mode):
    """Follows marked tensors through the operations of a run."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.found = Spaces()
        self.marks: Any = WeakTensorKeyDictionary()
        self.zeros: dict[int, weakref.ref[Tensor]] = {}
        self.stored: dict[int, weakref.ref[Tensor]] = {}
        self.by_slot: dict[tuple[int, int], Space] = {}
        self.strangers: dict[int, str] = {}  # parameters that something else reads
        self.foreign: dict[tuple[int, int], str] = {}  # dimensions that something else is contracted with
        self.known: dict[tuple[int, ...], tuple[tuple[int, ...], frozenset[int]]] = {}  # equal rows share their memory
        self.active: list[str] = []
        self.opaque = 0
        self.owners: dict[int, list[tuple[str, str]]] = {}
        self.parameters: dict[int, list[nn.Parameter]] = {}
        for name, module in model.named_modules():
            for own, parameter in module._parameters.items():
                if parameter is None or not parameter.numel():
                    continue
                self.owners.setdefault(id(parameter), []).append((name, own))
                same = self.parameters.setdefault(storage(parameter), [])
                if all(each is not parameter for each in same):
                    same.append(parameter)

    # What is known of a tensor ---------------------------------------------------------------------------------------

    def parameter(self, tensor: Any) -> nn.Parameter | None:
        """Return the parameter that a tensor is a view of."""
        found = self.parameters.get(storage(tensor)) if isinstance(tensor, Tensor) else None
        if found and len(found) > 1:
            for each in found:
                self.strangers.setdefault(id(each), "a parameter in the same memory")
        return found[0] if found else None

    def is_zero(self, tensor: Tensor) -> bool:
        """Return whether a tensor, or the one that it is a view of, was created as zeros and not written to since."""
        base = self.zeros.get(storage(tensor))
        return base is not None and base() is not None

    def mark_of(self, tensor: Any) -> Mark | None:
        """Return a tensor's mark; a view of a parameter, other than a matrix's factor, writes its last dimension."""
        if not isinstance(tensor, Tensor):
            return None
        mark: Mark | None = self.marks.get(tensor)
        if mark is not None or (parameter := self.parameter(tensor)) is None:
            return mark
        axis = axis_of(parameter, tensor, -1) if tensor.ndim else None
        if axis is None or tensor.shape[-1] == 1:
            return None
        return self.written(parameter, axis, tensor.shape, -1, tensor.device)

    def written(self, parameter: nn.Parameter, axis: int, shape: Any, dim: int, device: Any) -> Mark:
        """Return the mark of a tensor of this shape, whose dimension `dim` runs over a parameter's `axis`."""
        size = parameter.shape[axis]
        owner = self.owner(parameter)
        space = self.slot(parameter, axis, self.row(tuple(range(size))))
        space.writers[(owner[0], owner[1], axis)] = parameter.ndim
        where = [1] * len(shape)
        where[dim] = size
        features = torch.arange(size, device=device).view(where).expand(shape)
        source = owner[0] if owner[0] and owner[1] in ("weight", "bias") else ".".join(owner).lstrip(".")
        return Mark(space, features, frozenset([source]))

    def owner(self, parameter: nn.Parameter) -> tuple[str, str]:
        """Return the module that reads a parameter: the deepest that is running, and the parameter's name in it."""
        owners = self.owners[id(parameter)]
        return max(owners, key=lambda each: self.active.index(each[0]) if each[0] in self.active else -1)

    def slot(self, parameter: nn.Parameter, axis: int, row: tuple[int, ...], space: Space | None = None) -> Space:
        """Return the space of a parameter's dimension; join it with another space if given."""
        key = id(parameter), axis
        known = self.by_slot.get(key)
        if known is None and space is None:
            space = self.new_space(".".join(self.owners[id(parameter)][0]).lstrip("."))
        if known is not None:
            space = known.root() if space is None else self.union(known, space)
        assert space is not None
        root = self.by_slot[key] = space.root()
        for owner in self.owners[id(parameter)]:
            root.attach((*owner, axis), row)
        return root

    def new_space(self, name: str) -> Space:
        """Return a space without parameters, named after what writes it first."""
        space = Space(name, len(self.found.spaces))
        self.found.spaces.append(space)
        return space

    def union(self, a: Space, b: Space) -> Space:
        """Join two spaces; the older one stays."""
        older, newer = sorted((a.root(), b.root()), key=lambda space: space.number)
        if older is not newer:
            older.join(newer)
        return older

    # What operations do ----------------------------------------------------------------------------------------------

    def rows(self, features: Tensor) -> list[tuple[int, ...]]:
        """Return the different rows of a tensor of features."""
        return [self.row(row) for row in rows_of(features)]

    def row(self, row: tuple[int, ...]) -> tuple[int, ...]:
        """Return the first row that was equal."""
        if row not in self.known:
            self.known[row] = row, frozenset(row)
        return self.known[row][0]

    def put(self, tensor: Tensor, mark: Mark) -> None:
        """Mark a tensor."""
        self.marks[tensor] = mark
        self.stored[storage(tensor)] = weakref.ref(tensor)

    def use(self, mark: Mark, what: str) -> None:
        """Record what uses vectors."""
        for source in mark.sources:
            self.found.uses.setdefault(source, set()).add(what)

    def lose(self, mark: Mark, why: str) -> None:
        """Break the features of a tensor."""
        space = mark.space.root()
        for row in self.rows(mark.features):
            space.broken.setdefault(self.known[row][1], why)
        self.use(mark, f"other: {why}")

    def together(self, mark: Mark, mixed: bool = False) -> None:
        """Record that the features of each row are used together."""
        space = mark.space.root()
        (space.mixed if mixed else space.rows).update(self.known[row][1] for row in self.rows(mark.features))
        if mixed:
            self.use(mark, "mixed over tokens")

    def where(self, func: Any) -> str:
        """Describe an operation and the module that calls it."""
        return f"{func} in {(self.active[-1] if self.active else '') or 'the model'}"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        packet = func.overloadpacket
        if self.opaque:
            return result
        if packet in _ZEROS:
            self.zeros[storage(result)] = weakref.ref(result)
        elif packet not in NEUTRAL:
            followed = self.follow(func, args, kwargs, result)
            if func._schema.is_mutable and isinstance(args[0], Tensor) and (not followed or args[0] in self.marks):
                self.zeros.pop(storage(args[0]), None)
        return result

    def follow(self, func: Any, args: Any, kwargs: Any, result: Any) -> bool:
        """Mark an operation's result and return True, or break what it reads and return False."""
        given = list(tensors_in((args, kwargs)))
        self._unfollowed(given, func)
        marked = [each for each in given if each in self.marks]
        owned = [each for each in given if self.parameter(each) is not None]
        if not marked and (is_view(func) or not owned):
            return False
        step = move if is_view(func) or func.overloadpacket in MOVES else STEPS.get(func.overloadpacket)
        try:
            followed = step is not None and func not in NO_MOVES and step(self, func, args, kwargs, result)
        except (RuntimeError, IndexError, TypeError, ValueError):  # arguments that a step does not expect
            followed = False
        if not followed:
            for tensor in marked:
                self.lose(self.marks[tensor], f"{self.where(func)} {DOES_NOT_COMMUTE}")
            for tensor in owned:
                self.strange(tensor, func)
        return followed

    def _unfollowed(self, given: Sequence[Tensor], func: Any) -> None:
        """Break the features of marked memory that is read through a tensor without a mark."""
        for tensor in given:
            if tensor not in self.marks and (known := self.stored.get(storage(tensor))) is not None:
                base = known()
                if base is not None and base is not tensor and storage(base) == storage(tensor):
                    self.lose(
                        self.marks[base], f"{self.where(func)} reads it through a view that could not be followed"
                    )

    def strange(self, tensor: Tensor, func: Any) -> None:
        """Record that an operation reads a parameter otherwise than as a matrix, table or summand."""
        parameter = self.parameter(tensor)
        if parameter is not None and parameter.numel() > 1:
            self.strangers.setdefault(id(parameter), self.where(func))

    def finish(self) -> Spaces:
        """Break what also takes part in something else, and return the spaces."""
        for (key, axis), space in self.by_slot.items():
            why = self.strangers.get(key) or self.foreign.get((key, axis))
            if why is not None:
                slot = (*self.owners[key][0], axis)
                features = frozenset(space.root().slots[slot])
                space.root().broken.setdefault(features, f"{slot_name(slot)} is also used by {why}")
        self.found.spaces = [space for space in self.found.spaces if space.into is None]
        return self.found

    # What modules do -------------------------------------------------------------------------------------------------

    def normalize(self, name: str, x: Any, y: Any) -> None:
        """Mark a norm's output, which is in the space of its input."""
        mark = self.marks.get(x) if isinstance(x, Tensor) else None
        if not isinstance(y, Tensor):
            return
        if mark is None or mark.features.shape != y.shape:
            space = self.new_space(name)
            features = torch.arange(y.shape[-1], device=y.device).expand(y.shape)
            space.broken.setdefault(
                frozenset(range(y.shape[-1])), f"the input of {name} is computed by something other than linear layers"
            )
            self.found.norm_sources.setdefault(name, set()).add(OTHERS)
        else:
            space, features = mark.space.root(), mark.features
            rows = [self.known[row][1] for row in self.rows(features)]
            space.norms[name] = space.norms.get(name, frozenset()).union(*rows)
            self.together(mark)
            self.use(mark, f"normalized by {name}")
            self.found.norm_sources.setdefault(name, set()).update(mark.sources)
        self.put(y, Mark(space, features, frozenset([name])))

    def map(self, module: StreamedMap, x: Any, y: Tensor) -> None:
        """Read and write with a matrix that is in a file."""
        found = module.map
        if found.inputs is not None:
            mark = self.marks.get(x) if isinstance(x, Tensor) else None
            read(self, mark, module.weight, 0 if found.transposed else 1, "linear")
        mark = self.written(module.weight, 1 if found.transposed else 0, y.shape, -1, y.device)
        if module.bias is not None:
            bias = self.written(module.bias, 0, y.shape, -1, y.device)
            mark = Mark(self.union(mark.space, bias.space), mark.features, mark.sources)
        self.put(y, mark)


def find_spaces(model: nn.Module, norms: Sequence[str], runs: Sequence[Run]) -> Spaces:
    """Run the model and return the spaces of its vectors.

    Args:
        model: a copy in float64.
        norms: names of modules that normalize the last dimension, whatever they do to single features.
        runs: what to run.
    """
    walk, whole = Walk(model), set(norms)
    given: list[Any] = []

    def enters(name: str, module: nn.Module) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            walk.active.append(name)
            if name in whole or isinstance(module, StreamedMap):
                walk.opaque += 1
                given.append(args[0] if args else next(iter(kwargs.values()), None))

        return hook

    def leaves(name: str, module: nn.Module) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            walk.active.pop()
            if name in whole or isinstance(module, StreamedMap):
                walk.opaque -= 1
                x = given.pop()
                if walk.opaque:
                    return
                if isinstance(module, StreamedMap):
                    walk.map(module, x, output)
                else:
                    walk.normalize(name, x, output)

        return hook

    with ExitStack() as stack:
        for name, module in model.named_modules():
            stack.callback(module.register_forward_pre_hook(enters(name, module), with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(leaves(name, module)).remove)
        for run in runs:
            _follow(walk, model, run)
    return walk.finish()


def _follow(walk: Walk, model: nn.Module, run: Run) -> None:
    """Follow one run, up to its outputs."""
    with walk:
        found = outputs(model, run)
    for name, value in found.items():
        if not by_design(name) and value in walk.marks:
            walk.lose(walk.marks[value], f"the output {name} would be rotated")
    walk.marks.clear()
    walk.zeros.clear()
    walk.stored.clear()
