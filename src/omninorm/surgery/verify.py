"""Proof that two models compute the same: their outputs in float64 on probe inputs."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from omninorm.errors import InputError
from omninorm.surgery.swap import swap_norms

# Float64 has a step of 2e-16; a model of a hundred layers stays far below this.
EXACT = 1e-10
_TOKENS = (2, 16)


@dataclass(frozen=True)
class Verification:
    """The comparison of two models.

    Args:
        largest: the largest absolute difference of their outputs.
        relative: over the largest output.
        blocks: the same, relative, behind every block that both have, by name.
        exact: whether `relative` is at most `limit`.
        limit: see `EXACT`.
    """

    largest: float
    relative: float
    blocks: Mapping[str, float]
    exact: bool
    limit: float


def verify(
    before: nn.Module, after: nn.Module, inputs: Sequence[Any] | None = None, limit: float = EXACT
) -> Verification:
    """Compares two models in float64; both are left alone.

    Args:
        before, after: the models. Copies in float64 are compared, with omninorm's norms where they are known, since
            others round to float32 inside.
        inputs: probes, each a tensor or a dictionary of keyword arguments; None means random tokens.
        limit: the largest relative difference that counts as equal.

    Raises:
        InputError: no inputs, or none for a model without an embedding, a model that can't be called with them, or two
            models with outputs of different shapes.
    """
    with torch.no_grad():
        one, other = shadow(before), shadow(after)
    probes = read_probes(one, inputs)
    blocks: dict[str, float] = {}
    largest = size = 0.0
    for probe in probes:
        ours, our_blocks = _run(one, probe)
        theirs, their_blocks = _run(other, probe)
        if ours.shape != theirs.shape:
            received = f"{tuple(ours.shape)} and {tuple(theirs.shape)}"
            raise InputError(
                "models that are compared must return one shape", received, "compare a model with its copy"
            )
        largest = max(largest, _gap(ours, theirs))
        size = max(size, _size(ours))
        for name in our_blocks.keys() & their_blocks.keys():
            if our_blocks[name].shape == their_blocks[name].shape:
                blocks[name] = max(blocks.get(name, 0.0), distance(our_blocks[name], their_blocks[name]))
    relative = largest / size if size else largest
    ordered = {name: blocks[name] for name, _ in one.named_modules() if name in blocks}
    return Verification(largest, relative, ordered, relative <= limit, limit)


def shadow(model: nn.Module) -> nn.Module:
    """A copy in float64 on the CPU, with omninorm's norms where they are known.

    Raises:
        InputError: the weights have no values, or are quantized.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_meta or not parameter.is_floating_point():
            what = "has no values" if parameter.is_meta else f"is {parameter.dtype}"
            remedy = "load the weights, or dequantize them, first"
            raise InputError("surgery needs floating-point weights", f"{name!r}, which {what}", remedy)
    made = copy.deepcopy(model).eval().to("cpu", torch.float64)
    swap_norms(made)
    return made


def probe_inputs(model: nn.Module, seed: int = 0) -> list[Tensor]:
    """Random tokens for the model's first embedding.

    Raises:
        InputError: it has none.
    """
    table = next((module for module in model.modules() if isinstance(module, nn.Embedding)), None)
    if table is None:
        remedy = "pass inputs=[…], tensors or dictionaries of keyword arguments"
        raise InputError("a model without an embedding needs inputs", "none", remedy)
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, table.num_embeddings, _TOKENS, generator=generator)]


def read_probes(model: nn.Module, inputs: Sequence[Any] | None) -> list[Any]:
    """The inputs in float64, or random tokens.

    Raises:
        InputError: there are none, or one is neither a tensor nor a dictionary.
    """
    if inputs is None:
        return list(probe_inputs(model))
    remedy = "pass a list of tensors, or of dictionaries of keyword arguments"
    if isinstance(inputs, (Tensor, Mapping)) or not len(inputs):
        received = "an empty list" if isinstance(inputs, Sequence) else f"a {type(inputs).__name__}"
        raise InputError("inputs must be a list with at least one of them", received, remedy)
    for probe in inputs:
        if not isinstance(probe, (Tensor, Mapping)):
            raise InputError("each of inputs must be a tensor or a dictionary", type(probe).__name__, remedy)
    return [in_double(probe) for probe in inputs]


def in_double(probe: Any) -> Any:
    """Floating-point probes as the shadow's weights are."""
    if isinstance(probe, Tensor):
        return probe.double() if probe.is_floating_point() else probe
    return {name: in_double(value) if isinstance(value, Tensor) else value for name, value in probe.items()}


def outputs(model: nn.Module, probe: Any) -> Tensor:
    """The model's logits, or its last hidden state.

    Raises:
        InputError: it can't be called with the probe, or returns no tensor.
    """
    remedy = "pass inputs that it takes: tensors, or dictionaries of keyword arguments"
    try:
        with torch.no_grad():
            found = model(**probe) if isinstance(probe, Mapping) else model(probe)
    except Exception as error:  # whatever the model needs
        said = " ".join(str(error).split())[:200]
        raise InputError("the model must take the inputs", f"{type(error).__name__}: {said}", remedy) from error
    for name in ("logits", "last_hidden_state"):
        found = getattr(found, name, found)
    if isinstance(found, (tuple, list)) and found:
        found = found[0]
    if not isinstance(found, Tensor) or not found.numel():
        received = "an empty tensor" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise InputError("the model must return a tensor, or logits", received, remedy)
    return found.double()


def distance(a: Tensor, b: Tensor) -> float:
    """The largest difference over the largest value; infinite where one of them is NaN."""
    size, gap = _size(a), _gap(a, b)
    return gap / size if size else gap


def _size(a: Tensor) -> float:
    """The largest of the finite values."""
    return float(a.abs().nan_to_num(0.0, 0.0).max()) if a.numel() else 0.0


def _gap(a: Tensor, b: Tensor) -> float:
    """The largest difference: none between equal infinities, an infinite one to or from NaN, even of two."""
    return float((a - b).abs().masked_fill(a == b, 0.0).nan_to_num(math.inf, math.inf).max()) if a.numel() else 0.0


def _run(model: nn.Module, probe: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Outputs, and what every member of a stack of modules returns."""
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
