"""Linear layers and embeddings whose matrices stay in their files, and are read a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from omninorm.surgery.checkpoint import Checkpoint
from omninorm.surgery.linear import LinearMap
from omninorm.surgery.orthogonal import BlockRotation
from omninorm.surgery.report import Surgery

# Elements of a matrix in float64 at a time: 2 MiB, about a core's second-level cache.
_CHUNK = 2**18
# Elements of the columns whose rows are rotated at a time, for each of which the matrix is read once: 16 MiB.
_COLUMNS = 2**21


class StreamedMap(nn.Module):
    """y = W x + b, or rows of an embedding, in float64, with W in a file.

    Args:
        checkpoint, name: where W is.
        transposed: whether W is stored as (inputs, outputs); an embedding's rows are.
        bias: b, in memory.
        row_scale: an embedding's factor for its rows; None for a linear layer.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    factor: Tensor | None = None
    centered: bool = False
    turned: Mapping[int, BlockRotation] = MappingProxyType({})

    def __init__(
        self, checkpoint: Checkpoint, name: str, transposed: bool, bias: Tensor | None, row_scale: float | None
    ) -> None:
        super().__init__()
        self.checkpoint, self.name, self.transposed, self.row_scale = checkpoint, name, transposed, row_scale
        shape = checkpoint.stored(name).shape
        # Expanded from one element, so it takes no memory: models only use its shape, dtype and device.
        self.weight = nn.Parameter(torch.zeros((), dtype=torch.float64).expand(shape), requires_grad=False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    @property
    def map(self) -> LinearMap:
        """Its features, as `read_linear` returns them."""
        inputs, outputs = self.weight.shape if self.transposed else self.weight.shape[::-1]
        return LinearMap(self, inputs if self.row_scale is None else None, outputs, self.transposed)

    @property
    def changed(self) -> bool:
        """Whether the matrix is to be changed."""
        return self.factor is not None or self.centered or bool(self.turned)

    def changed_like(self, other: StreamedMap) -> bool:
        """Return whether another module changes the matrix that they share in the same way."""
        mine, theirs = self.factor, other.factor
        scaled = mine is theirs if mine is None or theirs is None else torch.equal(mine, theirs)
        rotated = self.turned.keys() == other.turned.keys()
        rotated = rotated and all(self.turned[dim].equals(other.turned[dim]) for dim in self.turned)
        return scaled and rotated and self.centered == other.centered

    def scale(self, factor: Tensor | None, shift: Tensor | None, done: Surgery) -> None:
        """Set W ← W·diag(factor), b ← b + W·shift."""
        assert not self.centered, "folded before it is centered"
        assert not self.turned, "folded before it is rotated"
        if shift is not None and bool(shift.any()):
            assert self.bias is not None, "a checkpoint's class has no place for a new bias"
            done.keep(self.bias)
            self.bias.add_(self._times(shift[None])[0])
        if factor is not None:
            before = self.factor
            done.later(lambda: setattr(self, "factor", before))
            self.factor = factor if before is None else before * factor

    def center(self, done: Surgery) -> None:
        """Subtract the mean over the outputs from W and b."""
        assert not self.turned, "centered before it is rotated"
        if not self.centered:
            done.later(lambda: setattr(self, "centered", False))
            self.centered = True
        if self.bias is not None:
            done.keep(self.bias)
            self.bias.sub_(self.bias.mean())

    def turn(self, dim: int, rotation: BlockRotation, done: Surgery) -> None:
        """Rotate the indices of a dimension of W as it is stored."""
        assert dim not in self.turned, "each dimension is rotated once"
        before = self.turned
        done.later(lambda: setattr(self, "turned", before))
        self.turned = {**before, dim: rotation}

    def rows(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield the changed matrix, some stored rows at a time."""
        return self._with_turned_rows() if 0 in self.turned else self._with_turned_columns()

    def _with_turned_columns(self) -> Iterator[tuple[slice, Tensor]]:
        for part, chunk in self._unturned():
            yield part, self.turned[1](chunk) if 1 in self.turned else chunk

    def _with_turned_rows(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield the matrix with its rows rotated: it is in memory in the file's dtype, and some columns in float64."""
        rows, columns = self.weight.shape
        done = torch.empty(rows, columns, dtype=self.checkpoint.tensor(self.name).dtype)
        few, many = (max(1, numbers // rows) for numbers in (_CHUNK, _COLUMNS))
        for first in range(0, columns, many):
            place = torch.empty(rows, min(many, columns - first), dtype=torch.float64)
            for part, chunk in self._with_turned_columns():
                place[part] = chunk[:, first : first + many]
            for start in range(0, place.shape[1], few):
                values = self.turned[0](place[:, start : start + few], 0)
                done[:, first + start : first + start + few] = values
        step = max(1, _CHUNK // columns)
        for first in range(0, rows, step):
            part = slice(first, first + step)
            yield part, done[part]

    def _unturned(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield the scaled and centered matrix, some stored rows at a time."""
        means = self._means() if self.centered and not self.transposed else None
        for part, chunk in self._scaled():
            if self.centered:
                chunk -= chunk.mean(1, keepdim=True) if means is None else means
            yield part, chunk

    def forward(self, x: Tensor) -> Tensor:
        with _disable_current_modes():  # files are read and multiplied as they are, whatever a proof intercepts
            return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        if self.row_scale is not None:
            table = self.checkpoint.tensor(self.name)
            found = table[x].double()
            if self.centered:
                found -= found.mean(-1, keepdim=True)
            return (self.turned[1](found) if 1 in self.turned else found) * self.row_scale
        y = self._times(x.reshape(-1, x.shape[-1]).double())
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], -1)

    def _times(self, x: Tensor) -> Tensor:
        """Return W x for each row of x; rotating these vectors is the same as rotating W."""
        inputs, outputs = (0, 1) if self.transposed else (1, 0)
        x = self.turned[inputs].inverse(x) if inputs in self.turned else x
        y = x.new_zeros(len(x), self.map.outputs)
        for part, chunk in self._unturned():
            if self.transposed:
                y.addmm_(x[:, part], chunk)
            else:
                torch.mm(x, chunk.T, out=y[:, part])
        return self.turned[outputs](y) if outputs in self.turned else y

    def _scaled(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield scaled rows; each chunk reuses the memory of the one before."""
        place = torch.empty(max(_CHUNK, self.weight.shape[1]), dtype=torch.float64)
        for part, stored in self.checkpoint.rows(self.name, _CHUNK):
            chunk = place[: stored.numel()].view(stored.shape).copy_(stored)
            if self.factor is not None:
                chunk *= self.factor[part, None] if self.transposed else self.factor
            yield part, chunk

    def _means(self) -> Tensor:
        """Return the mean over the outputs, which are the rows."""
        return sum((chunk.sum(0) for _, chunk in self._scaled()), torch.zeros(())) / len(self.weight)
