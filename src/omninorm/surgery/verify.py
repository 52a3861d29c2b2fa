"""Compares two models by their outputs in float64 on probe inputs."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from omninorm.device import free_memory
from omninorm.errors import InputError
from omninorm.surgery.report import check_model
from omninorm.surgery.swap import swap_norms

# Rounding in float64 is 2e-16; a model of a hundred layers stays far below this limit.
EXACT = 1e-10
_TOKENS = (2, 16)
_CPU = torch.device("cpu")
# The largest activations, and a second copy while the first is made, in multiples of the copy.
_MARGIN = 2


@dataclass(frozen=True)
class Verification:
    """The comparison of two models.

    Args:
        largest: the largest absolute difference of their outputs.
        relative: `largest` divided by the largest output.
        blocks: the relative difference after every block that both have, by name.
        exact: whether `relative` is at most `limit`.
        limit: see `EXACT`.
        device: where they were compared.
    """

    largest: float
    relative: float
    blocks: Mapping[str, float]
    exact: bool
    limit: float
    device: str = "cpu"


def verify(
    before: nn.Module, after: nn.Module, inputs: Sequence[Any] | None = None, limit: float = EXACT
) -> Verification:
    """Compare two models in float64; neither is changed.

    They are compared on their GPU if its free memory is enough for copies in float64, and on the CPU otherwise.

    Args:
        before, after: the models. Their copies in float64 are compared, with omninorm's norms in place of others that
            would round to float32 inside.
        inputs: probes, each a tensor or a dictionary of keyword arguments; None means random tokens.
        limit: the largest relative difference that counts as equal.

    Raises:
        InputError: no inputs, or none for a model without an embedding; a model that cannot be called with them; or
            two models with outputs of different shapes.
    """
    places = {proving_device(model, copies=2) for model in (before, after)}
    place = places.pop() if len(places) == 1 else _CPU
    with torch.no_grad():
        one, other = shadow(before, place), shadow(after, place)
    probes = read_probes(one, inputs)
    blocks: dict[str, float] = {}
    largest = size = 0.0
    for probe in probes:
        ours, our_blocks = _run(one, probe)
        theirs, their_blocks = _run(other, probe)
        if ours.shape != theirs.shape:
            received = f"{tuple(ours.shape)} and {tuple(theirs.shape)}"
            raise InputError(
                "Both models must return outputs of the same shape", received, "compare a model with its own copy"
            )
        largest = max(largest, _gap(ours, theirs))
        size = max(size, _size(ours))
        for name in our_blocks.keys() & their_blocks.keys():
            if our_blocks[name].shape == their_blocks[name].shape:
                blocks[name] = max(blocks.get(name, 0.0), distance(our_blocks[name], their_blocks[name]))
    relative = largest / size if size else largest
    ordered = {name: blocks[name] for name, _ in one.named_modules() if name in blocks}
    return Verification(largest, relative, ordered, relative <= limit, limit, str(place))


def proving_device(model: nn.Module, copies: int = 1) -> torch.device:
    """Return where copies of a model in float64 run: on its GPU if they fit in its free memory, else on the CPU."""
    check_model(model)
    devices = {parameter.device for parameter in model.parameters()}
    free = free_memory(next(iter(devices))) if len(devices) == 1 else None
    needed = copies * _MARGIN * 8 * sum(parameter.numel() for parameter in model.parameters())
    return _CPU if free is None or free < needed else devices.pop()


def shadow(model: nn.Module, device: torch.device | None = None) -> nn.Module:
    """Return a copy in float64, with omninorm's norms in place of those that it can replace.

    Args:
        model: the original.
        device: where the copy runs; None means `proving_device`.

    Raises:
        InputError: the weights have no values, or are quantized.
    """
    check_model(model)
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise InputError(
                f"The parameter {name!r} has no values (it is on the meta device)", "", "load the weights first"
            )
        if not parameter.is_floating_point():
            remedy = "dequantize the model first"
            raise InputError(f"The parameter {name!r} must be floating-point for surgery", str(parameter.dtype), remedy)
    place = proving_device(model) if device is None else device
    made = copy.deepcopy(model).eval().to(place).to(torch.float64)
    swap_norms(made)
    return made


def probe_inputs(model: nn.Module, seed: int = 0) -> list[Tensor]:
    """Return random tokens for the model's first embedding.

    Raises:
        InputError: it has none.
    """
    table = next((module for module in model.modules() if isinstance(module, nn.Embedding)), None)
    if table is None:
        remedy = "pass inputs=[…], tensors or dictionaries of keyword arguments"
        raise InputError(f"{type(model).__name__} has no embedding, so its inputs cannot be drawn", "", remedy)
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, table.num_embeddings, _TOKENS, generator=generator)]


def read_probes(model: nn.Module, inputs: Sequence[Any] | None) -> list[Any]:
    """Return the inputs in float64, or random tokens.

    Raises:
        InputError: there are none, or one is neither a tensor nor a dictionary.
    """
    place = next((parameter.device for parameter in model.parameters()), _CPU)
    if inputs is None:
        return [probe.to(place) for probe in probe_inputs(model)]
    remedy = "pass a list of tensors, or of dictionaries of keyword arguments"
    if isinstance(inputs, (Tensor, Mapping)) or not len(inputs):
        received = "an empty list" if isinstance(inputs, Sequence) else f"a {type(inputs).__name__}"
        raise InputError("inputs must be a list with at least one input", received, remedy)
    for probe in inputs:
        if not isinstance(probe, (Tensor, Mapping)):
            raise InputError("Each of inputs must be a tensor or a dictionary", f"a {type(probe).__name__}", remedy)
    return [in_double(probe, place) for probe in inputs]


def in_double(probe: Any, device: torch.device) -> Any:
    """Move inputs to the device of the copy, and convert floating-point ones to float64, like its weights."""
    if isinstance(probe, Tensor):
        moved = probe.to(device)
        return moved.double() if moved.is_floating_point() else moved
    return {name: in_double(value, device) if isinstance(value, Tensor) else value for name, value in probe.items()}


def outputs(model: nn.Module, probe: Any) -> Tensor:
    """Return the model's logits, or its last hidden state.

    Raises:
        InputError: it cannot be called with the probe, or returns no tensor.
    """
    remedy = "pass inputs=[…] that it takes: tensors, or dictionaries of keyword arguments"
    try:
        with torch.no_grad():
            found = model(**probe) if isinstance(probe, Mapping) else model(probe)
    except Exception as error:  # whatever the model needs
        said = f"{type(error).__name__}: {' '.join(str(error).split()):.200}"
        raise InputError(f"{type(model).__name__} failed on the inputs in float64 ({said})", "", remedy) from error
    for name in ("logits", "last_hidden_state"):
        found = getattr(found, name, found)
    if isinstance(found, (tuple, list)) and found:
        found = found[0]
    if not isinstance(found, Tensor) or not found.numel():
        received = "an empty tensor" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise InputError(f"{type(model).__name__} must return a tensor, or logits", received, remedy)
    return found.double()


def distance(a: Tensor, b: Tensor) -> float:
    """Return the largest difference relative to the largest value; infinite if either holds NaN."""
    size, gap = _size(a), _gap(a, b)
    return gap / size if size else gap


def _size(a: Tensor) -> float:
    """Return the largest of the finite values."""
    return float(a.abs().nan_to_num(0.0, 0.0).max()) if a.numel() else 0.0


def _gap(a: Tensor, b: Tensor) -> float:
    """Return the largest difference: 0 between equal infinities, infinite to or from NaN, even between two."""
    return float((a - b).abs().masked_fill(a == b, 0.0).nan_to_num(math.inf, math.inf).max()) if a.numel() else 0.0


def _run(model: nn.Module, probe: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the outputs, and the output of every member of each ModuleList."""
    seen: dict[str, Tensor] = {}

    def look(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, (tuple, list)) and output else output
            if isinstance(first, Tensor) and first.is_floating_point():
                seen[name] = first.double()

        return hook

    stacks = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    members = {
        f"{stack}.{child}": module for stack in stacks for child, module in model.get_submodule(stack).named_children()
    }
    hooks = [module.register_forward_hook(look(name)) for name, module in members.items()]
    try:
        return outputs(model, probe), seen
    finally:
        for hook in hooks:
            hook.remove()
