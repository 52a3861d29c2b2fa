"""Compares two models by their outputs in float64 on probe inputs."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from omninorm.device import free_memory
from omninorm.errors import InputError
from omninorm.surgery.proof import Proof, record
from omninorm.surgery.report import check_model
from omninorm.surgery.runs import Run, by_design
from omninorm.surgery.runs import outputs as all_outputs
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
        relative: the largest difference divided by the largest value of the same output.
        blocks: the relative difference after every block that both have, by name.
        exact: whether `relative` is at most `limit`.
        limit: see `EXACT`.
        device: where they were compared.
        proof: which outputs and runs were compared, and what the runs covered.
    """

    largest: float
    relative: float
    blocks: Mapping[str, float]
    exact: bool
    limit: float
    device: str = "cpu"
    proof: Proof = field(default_factory=Proof)


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
    recorded = record(one, probes, drawn=inputs is None, allow_nan=True)
    blocks: dict[str, float] = {}
    largest = relative = 0.0
    intended: dict[str, float] = {}
    for number, (run, ours) in enumerate(zip(recorded.runs, recorded.outputs, strict=True)):
        with_blocks = number < len(probes)
        our_blocks = _run(one, run)[1] if with_blocks else {}
        theirs, their_blocks = _run(other, run) if with_blocks else (all_outputs(other, run), {})
        apart, gap, moved = compare(ours, theirs)
        largest, relative = max(largest, gap), max(relative, apart)
        intended |= {name: max(gap, intended.get(name, 0.0)) for name, gap in moved.items()}
        for name in our_blocks.keys() & their_blocks.keys():
            if our_blocks[name].shape == their_blocks[name].shape:
                blocks[name] = max(blocks.get(name, 0.0), distance(our_blocks[name], their_blocks[name]))
    ordered = {name: blocks[name] for name, _ in one.named_modules() if name in blocks}
    proof = replace(recorded.proof, by_design=intended)
    return Verification(largest, relative, ordered, relative <= limit, limit, str(place), proof)


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
    made = converted_copy(model, torch.float64, device)
    swap_norms(made)
    return made


def converted_copy(model: nn.Module, dtype: torch.dtype, device: torch.device | None = None) -> nn.Module:
    """Return a copy in another dtype and in evaluation mode. Its arguments and errors are those of `shadow`."""
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
    made = copy.deepcopy(model).eval().to(place).to(dtype)
    with_plain_experts(made)
    return made


def with_plain_experts(model: Any) -> None:
    """Let a model of transformers compute its experts one after the other: its grouped products have no float64."""
    if callable(choose := getattr(model, "set_experts_implementation", None)):
        choose("eager")


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
    return [in_double(probe, place) for probe in check_probes(inputs)]


def check_probes(inputs: Sequence[Any]) -> Sequence[Any]:
    """Return the inputs if each is a tensor or a dictionary, and there is at least one; raise InputError otherwise."""
    remedy = "pass a list of tensors, or of dictionaries of keyword arguments"
    if isinstance(inputs, (Tensor, Mapping)) or not len(inputs):
        received = "an empty list" if isinstance(inputs, Sequence) else f"a {type(inputs).__name__}"
        raise InputError("inputs must be a list with at least one input", received, remedy)
    for probe in inputs:
        if not isinstance(probe, (Tensor, Mapping)):
            raise InputError("Each of inputs must be a tensor or a dictionary", f"a {type(probe).__name__}", remedy)
    return inputs


def in_double(probe: Any, device: torch.device) -> Any:
    """Move inputs to the device of the copy, and convert floating-point ones to float64, like its weights."""
    if isinstance(probe, Tensor):
        moved = probe.to(device)
        return moved.double() if moved.is_floating_point() else moved
    return {name: in_double(value, device) if isinstance(value, Tensor) else value for name, value in probe.items()}


def outputs(model: nn.Module, probe: Any) -> Tensor:
    """Return the model's logits, or its last hidden state, or its first output.

    Raises:
        InputError: it cannot be called with the probe, or returns no tensor.
    """
    found = all_outputs(model, Run("", probe))
    return next((found[name] for name in ("logits", "last_hidden_state") if name in found), next(iter(found.values())))


def compare(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> tuple[float, float, dict[str, float]]:
    """Compare all outputs.

    Returns:
        (relative, largest, intended): the largest difference relative to the largest value of the same output, the
        largest difference, and those outputs that differ by design, with their difference.

    Raises:
        InputError: they have different names or shapes.
    """
    shapes = [{name: tuple(value.shape) for name, value in each.items()} for each in (before, after)]
    if shapes[0] != shapes[1]:
        remedy = "compare a model with its own copy"
        raise InputError("Both models must return outputs of the same shape", _differing(*shapes), remedy)
    intended = {name: distance(before[name], after[name]) for name in before if by_design(name)}
    compared = [name for name in before if name not in intended]
    largest = max((_gap(before[name], after[name]) for name in compared), default=0.0)
    relative = max((distance(before[name], after[name]) for name in compared), default=0.0)
    return relative, largest, {name: gap for name, gap in intended.items() if gap > EXACT}


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    """Return the first difference of two models' outputs."""
    if a.keys() != b.keys():
        return f"only one of them returns {sorted(a.keys() ^ b.keys())[0]}"
    name = next(name for name in a if a[name] != b[name])
    return f"{a[name]} and {b[name]}"


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


def _run(model: nn.Module, run: Run) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
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
        return all_outputs(model, run), seen
    finally:
        for hook in hooks:
            hook.remove()
