"""first_difference: run two models and name the first module in which they part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from omninorm.errors import InputError
from omninorm.surgery.difference import explain, judge
from omninorm.surgery.difference.calls import trace
from omninorm.surgery.difference.feed import Place, argument_names
from omninorm.surgery.difference.match import Matching
from omninorm.surgery.difference.measure import Rows, padding_of
from omninorm.surgery.difference.result import FirstDifference, ModuleDifference
from omninorm.surgery.difference.run import Measured, PairRun
from omninorm.surgery.report import check_model
from omninorm.surgery.runs import Run
from omninorm.surgery.verify import check_probes, converted_copy, probe_inputs, proving_device

_CPU = torch.device("cpu")


def first_difference(
    a: nn.Module,
    b: nn.Module,
    inputs: Sequence[Any] | None = None,
    *,
    dtype: torch.dtype | None = torch.float64,
    limit: float | None = None,
    rows: int = 4096,
    seed: int = 0,
) -> FirstDifference:
    """Run two models on the same inputs and find the first module with equal inputs and different outputs.

    For a reimplementation, an inference engine or a conversion that computes something else than the original. Modules
    are matched by names, order and shapes, so the models may be of different classes. For every matched module three
    relative differences ‖a − b‖/‖a‖ are measured, in evaluation mode and without padding: of what it receives, of what
    it returns, and of what b's module returns when it is fed the input of a's, which proves where a difference begins.

    Neither model is changed. With a dtype, copies run, which need 8 bytes per parameter and model in float64.

    Args:
        a, b: the models.
        inputs: each a tensor or a dictionary of keyword arguments; None means random tokens, int64 (2, 16). Positions
            where `attention_mask` (batch, sequence) is 0 are not compared.
        dtype: the dtype in which copies of both run; None runs the models as they are.
        limit: the largest relative difference of one module that counts as rounding. None means 1e-10 in float64, and
            1e-6 if the modules' classes differ, because their tables may be in float32; 4e-6 in float32, 0.016 in
            bfloat16 and 0.002 in float16; with dtype None, that of the coarsest dtype of the weights. A module whose
            weights in one model are the other's, rounded to a dtype, is allowed that dtype's.
        rows: at most so many rows of each activation of a are stored, evenly spaced, for the comparison with b's.
        seed: of the random tokens.

    Returns:
        The verdict of the first input on which the models part, or else of the one on which they differ the most.

    Raises:
        InputError: no inputs, or none for a model without an embedding; a model that cannot be called with them; or no
            module of one matches any of the other.

    Example:
        >>> a = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 2))
        >>> b = nn.Sequential(a[0], nn.GELU(approximate="tanh"), a[2])
        >>> found = first_difference(a, b, [torch.randn(3, 4)])
        >>> found.kind, found.first.a, found.first.reasons
        ('different', '1', ('approximate is none in a and tanh in b',))
    """
    _check(a, b, dtype, limit, rows)
    probes = _tokens(a, b, seed) if inputs is None else check_probes(inputs)
    described = f"random tokens from seed {seed}" if inputs is None else f"{len(probes)} given"
    allowed = judge.limits(a, b, dtype, limit)
    with ExitStack() as stack:
        models = _models(a, b, dtype, stack)
        results = []
        for number, probe in enumerate(probes):
            name = described if len(probes) == 1 else f"input {number + 1} of {len(probes)}"
            results.append(_compare(models, probe, allowed, (rows, dtype, name)))
            if results[-1].kind == "different":
                break
    return results[-1] if results[-1].kind == "different" else max(results, key=lambda each: each.largest)


def _check(a: nn.Module, b: nn.Module, dtype: torch.dtype | None, limit: float | None, rows: int) -> None:
    for model in (a, b):
        check_model(model)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise InputError(
            "dtype must be a floating-point dtype of torch", f"{dtype!s:.60}", "pass torch.float64 or None"
        )
    if limit is not None and not limit > 0:
        raise InputError("limit must be a positive number", f"{limit!s:.60}", "use for example 1e-6")
    if rows < 1:
        raise InputError("rows must be at least 1", f"{rows!s:.60}", "use for example 4096")


def _tokens(a: nn.Module, b: nn.Module, seed: int) -> list[Any]:
    """Return random tokens that are in the vocabularies of both models."""
    drawn = [probe_inputs(model, seed)[0] for model in (a, b)]
    return [min(drawn, key=lambda each: int(each.max()))]


def _models(a: nn.Module, b: nn.Module, dtype: torch.dtype | None, stack: ExitStack) -> tuple[nn.Module, nn.Module]:
    """Return copies in a dtype, or the models as they are, in evaluation mode until the stack is closed."""
    if dtype is None:
        for model in (a, b):
            stack.enter_context(_evaluating(model))
        return a, b
    places = {proving_device(model, copies=2) for model in (a, b)}
    place = places.pop() if len(places) == 1 else _CPU
    return converted_copy(a, dtype, place), converted_copy(b, dtype, place)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and every module back into its own mode."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def _compare(
    models: tuple[nn.Module, nn.Module], probe: Any, allowed: judge.Limits, settings: tuple[int, Any, str]
) -> FirstDifference:
    rows, dtype, described = settings
    runs = tuple(_run(model, probe) for model in models)
    matching = Matching(*(trace(model, run) for model, run in zip(models, runs, strict=True)))
    compared = Rows(padding_of(probe), rows)
    measured = PairRun(*models, matching, compared).measure((runs[0], runs[1]))
    if not measured:
        problem = "No module of one model matches a module of the other by name, or by order and shapes"
        raise InputError(problem, "", "compare two implementations of the same model")
    pairs = {each.a.index: _pair(models, each) for each in measured}
    rounded = {index: explain.rounded_weights(*pair) for index, pair in pairs.items()}
    own = {index: judge.limit_of(*pair, allowed, rounded[index]) for index, pair in pairs.items()}
    judgement = judge.Judgement(measured, matching.a, allowed, own)
    found = judgement.culprits()
    modules = {each.a.index: _described(each, pairs[each.a.index], judgement, each in found) for each in measured}
    largest = max((each.outputs for each in modules.values() if not each.compensated), default=0.0)
    return FirstDifference(
        kind="different" if found else "equal" if largest <= allowed.exact else "rounding",
        modules=tuple(modules.values()),
        culprits=tuple(modules[each.a.index] for each in found),
        only_a=tuple(dict.fromkeys(each.name for each in matching.only())),
        only_b=tuple(dict.fromkeys(each.name for each in matching.only(in_b=True))),
        exact=allowed.exact,
        rounding=allowed.rounding,
        same_class=allowed.same_class,
        dtype="as they are" if dtype is None else str(dtype).removeprefix("torch."),
        rounded_weights=tuple(
            sorted({str(each).removeprefix("torch.") for each in rounded.values() if each is not None})
        ),
        inputs=described,
    )


def _pair(models: tuple[nn.Module, nn.Module], each: Measured) -> tuple[nn.Module, nn.Module]:
    return models[0].get_submodule(each.a.name), models[1].get_submodule(each.b.name)


def _run(model: nn.Module, probe: Any) -> Run:
    """Return the run of a model on its own device and in its own dtype, without a cache where it has a flag for one."""
    place = Place.of(model)

    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(place.device, place.dtype if value.is_floating_point() else value.dtype)

    own = {name: moved(value) for name, value in probe.items()} if isinstance(probe, Mapping) else moved(probe)
    given = isinstance(probe, Mapping) and "use_cache" in probe
    takes = "use_cache" in argument_names(model)
    return Run("", own, flags=(("use_cache", False),) if takes and not given else ())


def _described(
    each: Measured, pair: tuple[nn.Module, nn.Module], judgement: judge.Judgement, parts: bool
) -> ModuleDifference:
    reasons: list[str] = []
    if parts:
        reasons = explain.reasons(*pair)
        if (part := judgement.first_changed_part(each)) is not None:
            which = part.absent or part.argument
            reasons.append(
                f"the first module that receives another input is {part.a.name}{f' ({which})' if which else ''}"
            )
    return ModuleDifference(
        a=each.a.name,
        b=each.b.name,
        class_a=each.a.kind,
        class_b=each.b.kind,
        call=each.a.number + 1,
        inputs=each.inputs,
        outputs=each.outputs,
        fed=each.fed,
        not_fed=each.reason,
        argument=each.argument,
        parts=parts,
        nonfinite=each.nonfinite,
        reasons=tuple(reasons),
        index=each.a.index,
        last=each.a.last,
        begins=judgement.begins(each) if parts else each.a.index,
        compensated=judgement.compensated(each),
    )
