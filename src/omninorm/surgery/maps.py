"""Maps of a model's norms: which parameters read each norm's output, and which write its input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from omninorm.surgery.flow import Reading, trace
from omninorm.surgery.fold import probe
from omninorm.surgery.gains import find_gains
from omninorm.surgery.linear import read_linear
from omninorm.surgery.spaces import OTHERS, Space, slot_name
from omninorm.surgery.streamed_map import StreamedMap
from omninorm.surgery.walk import find_spaces


@dataclass(frozen=True)
class MappedNorm:
    """A norm with what it is connected to.

    Args:
        name: the norm's module.
        kind: such as "RMSNorm", "LayerNorm" or "gated RMSNorm over groups".
        readers: modules, or parameters of experts, that multiply the norm's output by a matrix.
        others: the first other operation on the output, or an empty text if there is none.
        writers: linear layers, embeddings, norms and loose parameters whose outputs the norm's input is a sum of.
        complete: whether the input is nothing but that sum.
    """

    name: str
    kind: str
    readers: tuple[str, ...]
    others: str
    writers: tuple[str, ...]
    complete: bool


@dataclass(frozen=True)
class NormMap:
    """The norms of a model in the order of its modules.

    Args:
        norms: each with its readers and writers.
        pairs: linear layer → the linear layers that read its output after nothing but products and averages over
            tokens, as the output projection reads values, and the down projection what the up projection returns.
    """

    norms: tuple[MappedNorm, ...]
    pairs: dict[str, tuple[str, ...]]

    def as_dict(self) -> dict[str, Any]:
        """Return the map as data for JSON."""
        return asdict(self)

    def smoothquant(self) -> list[list[Any]]:
        """Return `mappings` for llm-compressor's SmoothQuantModifier: [[balance layers], smooth layer] for each norm.

        Only norms that nothing but linear layers read are listed, because SmoothQuant scales their output.
        """
        return [[list(norm.readers), norm.name] for norm in self._smooth()]

    def awq(self) -> list[dict[str, Any]]:
        """Return arguments for llm-compressor's AWQMapping: smooth_layer and balance_layers, for norms and pairs."""
        found: list[tuple[str, Sequence[str]]] = [(norm.name, norm.readers) for norm in self._smooth()]
        found += self.pairs.items()
        return [{"smooth_layer": name, "balance_layers": list(readers)} for name, readers in found]

    def _smooth(self) -> list[MappedNorm]:
        return [norm for norm in self.norms if norm.readers and not norm.others]


def norm_map(model: nn.Module, inputs: Sequence[Any] | None = None) -> NormMap:
    """Return every norm with the parameters that read its output and those that write its input.

    Both are found by following the data through runs of a copy in float64, not by names. The model is not changed.

    Args:
        model: any model.
        inputs: probes as in `verify`; None means random tokens.

    Returns:
        The norms in the order of `named_modules`, as plain data, and as mappings for llm-compressor.

    Raises:
        InputError: as in `fold_gains`.

    Example:
        >>> from omninorm import Thinker, ThinkerConfig
        >>> found = norm_map(Thinker(ThinkerConfig(d_model=32, n_layers=1, n_heads=2)))
        >>> found.norms[0].readers
        ('blocks.0.attention.q', 'blocks.0.attention.k', 'blocks.0.attention.v')
        >>> found.norms[1].writers
        ('embedding', 'blocks.0.attention.out')
    """
    before = probe(model, inputs)
    made = before.model
    gains = find_gains(made, before.main)
    spaces = find_spaces(made, list(gains), before.runs)
    linear = [name for name, module in made.named_modules() if _is_linear(module)]
    streamed = [name for name, module in made.named_modules() if isinstance(module, StreamedMap)]
    reading = trace(made, list(gains), streamed, before.runs)
    order = {name: number for number, (name, _) in enumerate(made.named_modules())}

    def place(source: str) -> tuple[int, str]:
        return order.get(source, order.get(source.rpartition(".")[0], -1)), source

    def mapped(name: str, kind: str) -> MappedNorm:
        sources = spaces.norm_sources.get(name, {OTHERS})
        writers = sorted(sources - {OTHERS}, key=place)
        others = reading.others.get(name, "")
        return MappedNorm(name, kind, _readers(reading, name), others, tuple(writers), OTHERS not in sources)

    norms = tuple(mapped(name, gain.kind) for name, gain in gains.items())
    scaled = trace(made, linear, streamed, before.runs)
    pairs = {name: _readers(scaled, name) for name in linear if name not in scaled.others}
    pairs |= dict(_values(space) for space in spaces.spaces if space.mixed and not space.broken)
    return NormMap(norms, {name: pairs[name] for name in sorted(pairs, key=order.__getitem__) if pairs[name]})


def _is_linear(module: nn.Module) -> bool:
    found = read_linear(module)
    return found is not None and found.inputs is not None


def _readers(reading: Reading, name: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(reader.name for reader in reading.readers[name]))


def _values(space: Space) -> tuple[str, tuple[str, ...]]:
    """Return what writes the values of heads, and what reads their averages."""
    (writer, *_), readers = space.writers, [slot for slot in space.slots if slot not in space.writers]
    return writer[0], tuple(dict.fromkeys(slot_name(slot) for slot in readers))
