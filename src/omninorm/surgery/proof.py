"""The runs by which an operation is proved, what they compare, and which parameters they do not reach."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from omninorm.errors import InputError
from omninorm.surgery.linear import LinearMap
from omninorm.surgery.modes import Touched
from omninorm.surgery.runs import Run, by_design, expert_runs, flag_runs, outputs

_LONG = 48


@dataclass(frozen=True)
class Proof:
    """What a comparison of outputs covers.

    Args:
        outputs: the outputs that are compared, by name or position.
        by_design: outputs that differ because they must: what is on the residual stream; name → relative difference.
        runs: what was run.
        skipped: runs that the model does not support, with the reason.
        experts: how many slices of the experts' tensors were used, and how many there are.
        coverage: the share of all parameters that the runs read.
        unreached: parameters that they did not read → which experts of them, or an empty text for all.
    """

    outputs: tuple[str, ...] = ()
    by_design: Mapping[str, float] = field(default_factory=dict)
    runs: tuple[str, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)
    experts: tuple[int, int] = (0, 0)
    coverage: float = 0.0
    unreached: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        experts = f", {self.experts[0]} of {self.experts[1]} expert matrices" if self.experts[1] else ""
        return f"{len(self.outputs)} outputs in {len(self.runs)} runs, {self.coverage:.1%} of the parameters{experts}"


@dataclass
class Recorded:
    """A model's runs, with their outputs before an operation."""

    runs: list[Run]
    outputs: list[dict[str, Tensor]]
    proof: Proof


def record(
    model: nn.Module, probes: Sequence[Any], *, drawn: bool, thorough: bool = True, allow_nan: bool = False
) -> Recorded:
    """Run a model in float64 on probes, in training mode, with short and long inputs, a cache, and every expert.

    Args:
        model: a copy in float64, in evaluation mode.
        probes: what the user passes, or drawn tokens; the model must support them.
        drawn: whether they are tokens that were drawn, so that others can be.
        thorough: False leaves out short and long inputs and a cache.
        allow_nan: whether outputs may contain NaN.

    Raises:
        InputError: the model failed on a probe, or returned NaN.
    """
    main = [Run(f"input {number + 1}", probe) for number, probe in enumerate(probes)]
    extra = [Run(f"{run.name} in training mode", run.probe, training=True) for run in main]
    extra += flag_runs(model, main[0])
    if drawn and thorough:
        extra += [
            Run("one token", probes[0][:, :1]),
            Run("a long input", _long(model, probes[0])),
            Run("the next token with a cache", probes[0], cached=True),
        ]
    done = Recorded([], [], Proof())
    skipped: dict[str, str] = {}
    touched = Touched(model)
    with _touching_streamed(model, touched):
        for run in main:
            done.runs.append(run)
            done.outputs.append(_checked(model, run, touched, allow_nan))
        turns, why = expert_runs(model, probes[0])
        if why:
            skipped["experts in turn"] = why
        for run in (*extra, *turns):
            try:
                found = _checked(model, run, touched, allow_nan)
            except InputError as error:
                skipped[run.name] = str(error)
                continue
            done.runs.append(run)
            done.outputs.append(found)
    names = dict.fromkeys(name for found in done.outputs for name in found if not by_design(name))
    runs = tuple(run.name for run in done.runs)
    done.proof = Proof(tuple(names), {}, runs, skipped, touched.experts(), touched.share(), touched.unread())
    return done


def _long(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return a longer input of the same tokens, within the model's positions."""
    config = getattr(model, "config", None)
    most = getattr(config, "max_position_embeddings", None) or getattr(config, "seq_len", None)
    length = min(_LONG, most) if isinstance(most, int) else _LONG
    return tokens.reshape(1, -1).repeat(1, -(-length // tokens.numel()))[:, :length]


def _checked(model: nn.Module, run: Run, touched: Touched, allow_nan: bool) -> dict[str, Tensor]:
    """Return the outputs of a run, and record what it reads.

    Raises:
        InputError: they contain NaN, or the model failed.
    """
    with touched:
        found = outputs(model, run)
    if not allow_nan and any(bool(value.isnan().any()) for value in found.values()):
        remedy = "find the faulty weights with `omninorm inspect`, and restore an earlier checkpoint"
        raise InputError("The model's outputs contain NaN, so they cannot be compared", "", remedy)
    return found


def _touching_streamed(model: nn.Module, touched: Touched) -> ExitStack:
    """Record matrices in files as read when their module is called."""

    def called(name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            for own in ("weight", "bias"):
                if f"{name}.{own}" in touched.read:
                    touched.read[f"{name}.{own}"][:] = True

        return hook

    stack = ExitStack()
    for name, module in model.named_modules():
        if isinstance(getattr(module, "map", None), LinearMap):
            stack.callback(module.register_forward_pre_hook(called(name)).remove)
    return stack


def could_consume(model: nn.Module, unreached: Mapping[str, str], width: int, *, writing: bool = False) -> list[str]:
    """Return what no run reached, of those that could consume a vector of this width, or write one.

    Args:
        model: the copy.
        unreached: from the proof.
        width: of the vector.
        writing: whether they could write it as well, as embeddings and loose parameters do.
    """
    found: dict[str, str] = {}
    for name, experts in unreached.items():
        prefix, _, own = name.rpartition(".")
        module = model.get_submodule(prefix)
        parameter = module._parameters[own]
        if parameter is None or width not in parameter.shape:
            continue
        if isinstance(module, nn.Embedding) and not writing:
            continue
        reads_only = isinstance(module, nn.Linear) and own == "weight"
        if reads_only and not writing and module.in_features != width:
            continue
        found.setdefault(prefix if not experts else name, f"{experts} of {name}" if experts else prefix or name)
    return list(found.values())
