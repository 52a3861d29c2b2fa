"""Finds the linear layers that consume a norm's output, by running the model and comparing storage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from omninorm.surgery.verify import outputs


@dataclass
class Reading:
    """The consumers and inputs of norms.

    Args:
        readers: norm's name → names of the linear layers that consume its output.
        mean_share: norm's name → the largest mean² over mean square of its input's rows.
    """

    readers: dict[str, list[str]] = field(default_factory=dict)
    mean_share: dict[str, float] = field(default_factory=dict)


def trace(model: nn.Module, norms: Sequence[str], maps: Mapping[str, nn.Module], probes: Sequence[Any]) -> Reading:
    """Run the model and record each norm's consumers; a layer that consumes two norms is listed for both."""
    found = Reading({name: [] for name in norms}, dict.fromkeys(norms, 0.0))
    written: list[tuple[str, Tensor]] = []  # kept alive, so that no storage is reused

    def wrote(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            written.append((name, output))
            found.mean_share[name] = max(found.mean_share[name], _mean_share(args[0]))

        return hook

    def reads(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            for norm, output in written:
                read = bool(args) and isinstance(args[0], Tensor) and _same_memory(args[0], output)
                if read and name not in found.readers[norm]:
                    found.readers[norm].append(name)

        return hook

    hooks = [model.get_submodule(name).register_forward_hook(wrote(name)) for name in norms]
    hooks += [module.register_forward_pre_hook(reads(name)) for name, module in maps.items()]
    try:
        for probe in probes:
            outputs(model, probe)
            written.clear()
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _same_memory(a: Tensor, b: Tensor) -> bool:
    """Return whether a is b, or rows of it, in the same storage."""
    width = b.shape[-1]
    rows = a.shape[-1] == width and a.stride(-1) == 1 and (a.storage_offset() - b.storage_offset()) % width == 0
    return rows and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _mean_share(x: Tensor) -> float:
    x = x.detach().double()
    power = x.square().mean(-1).clamp_min(torch.finfo(torch.float64).tiny)
    return float((x.mean(-1).square() / power).max())
