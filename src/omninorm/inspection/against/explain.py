"""Explains differences in sentences, one for all tensors that differ in the same way."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from omninorm.inspection.against.classify import FINE, Result
from omninorm.inspection.against.convention import Convention
from omninorm.inspection.against.measure import is_quantized, precision
from omninorm.inspection.against.roles import role_of
from omninorm.inspection.names import place
from omninorm.inspection.settings import norm_eps, setting

_NAMED = 3
_NORM = ("gain", "norm bias")


@dataclass(frozen=True)
class Difference:
    """One way in which the checkpoints differ.

    Args:
        kind: the kind of difference, such as "shift", "scale", "missing", "moved" or "eps".
        matters: whether it changes what the model computes, beyond rounding.
        sentence: a sentence about the difference and its size.
        tensors: the common names of the affected tensors.
    """

    kind: str
    matters: bool
    sentence: str
    tensors: tuple[str, ...] = ()

    def to_record(self) -> dict[str, Any]:
        return {**asdict(self), "tensors": list(self.tensors)}


def explain(results: Sequence[Result], moved: Mapping[str, str], a: Convention, b: Convention) -> Iterator[Difference]:
    """Yield the differences between matched tensors."""
    norms = [each for each in results if each.kind in _NORM]
    yield from _moved(results, moved)
    for kind in _NORM:
        yield from _of_norms([each for each in norms if each.kind == kind], moved, a, b)
    roles: dict[str, list[Result]] = defaultdict(list)
    for each in results:
        if each.kind not in _NORM:
            roles[role_of(each.a.key)].append(each)
    for group in roles.values():
        yield from _of_role(group, moved)
    yield from _layouts(results)


def _of_norms(norms: list[Result], moved: Mapping[str, str], a: Convention, b: Convention) -> Iterator[Difference]:
    groups: dict[tuple[str, float | None], list[Result]] = defaultdict(list)
    for each in norms:
        if each.outcome not in FINE and each.a.key not in moved:
            groups[_group(each)].append(each)
    for (outcome, _), group in groups.items():
        kind = "norm" if group[0].kind == "gain" else "norm bias"
        subject = _subject(len(group), len(norms), kind)
        sentence = f"{subject} {_predicate(group, outcome)}{_cause(group[0], a, b)}{_exceptions(group, norms)}."
        yield Difference(outcome, True, sentence, tuple(each.a.key for each in group))


def _group(result: Result) -> tuple[str, float | None]:
    amount = result.amount if result.outcome in ("shift", "scale") else None
    return result.outcome, None if amount is None else float(f"{amount:.3g}")


def _subject(count: int, total: int, kind: str) -> str:
    plural = "es" if kind.endswith("s") else "s"
    return f"The only {kind}" if total == 1 else f"{count} of {total} {kind}{plural}"


def _of_role(group: list[Result], moved: Mapping[str, str]) -> Iterator[Difference]:
    outcomes: dict[tuple[str, float | None], list[Result]] = defaultdict(list)
    for each in group:
        if each.outcome not in FINE and each.a.key not in moved:
            outcomes[_group(each)].append(each)
    for (outcome, _), found in outcomes.items():
        several = len(group) > 1
        where = f" in {len(found)} of {len(group)} places" if several else ""
        sentence = f"`{role_of(found[0].a.key)}`{where} {_predicate(found, outcome)}{_exceptions(found, group)}."
        yield Difference(outcome, True, sentence, tuple(each.a.key for each in found))


def _predicate(group: list[Result], outcome: str) -> str:
    """Return the predicate of the sentence, for a subject such as "64 of 65 norms" or "`blk.*.attn_q.weight`"."""
    first = group[0]
    are = "are" if len(group) > 1 else "is"
    amount = first.amount or 0.0
    match outcome:
        case "shift":
            exactly = "exactly " if amount == round(amount) else ""
            return f"{are} {exactly}{abs(amount):.4g} {'higher' if amount > 0 else 'lower'} in B"
        case "scale":
            rounded = is_quantized(first.a.tensor.dtype) or is_quantized(first.b.tensor.dtype)
            return f"{are} {'about ' if rounded else ''}{amount:.4g} times as large in B"
        case "zero":
            assert first.stats is not None
            return f"{are} all zeros in {'B' if first.stats.b_zero else 'A'} only"
        case "constant":
            assert first.stats is not None
            return f"{are} {amount:.4g} everywhere in {'A' if first.stats.a_constant else 'B'} only"
        case "non-finite":
            assert first.stats is not None
            where = "B" if first.stats.b_bad > first.stats.a_bad else "A"
            return f"{'have' if len(group) > 1 else 'has'} NaN or infinite values in {where} only"
        case "shape":
            return f"{'have' if len(group) > 1 else 'has'} another shape in B: {_shapes(first)}"
        case "precision":
            return f"{'differ' if len(group) > 1 else 'differs'} by more than quantization explains: {_errors(group)}"
        case "rows":
            rows = max(int(each.amount or 0) for each in group)
            verb = "have" if len(group) > 1 else "has"
            return f"{verb} up to {rows} of {first.a.shape[0]} rows that are different in B"
        case "few":
            most = max(int(each.amount or 0) for each in group)
            verb = "have" if len(group) > 1 else "has"
            return f"{verb} up to {most} of {first.a.shape[0] * first.a.shape[1]:,} values that are different in B"
        case _:
            return f"{'hold' if len(group) > 1 else 'holds'} other values in B: {_errors(group)}"


def _shapes(result: Result) -> str:
    return f"{list(result.b.tensor.shape)} instead of {list(result.a.tensor.shape)}"


def _errors(group: list[Result]) -> str:
    """Return the range of relative errors, and the error that quantization explains."""
    errors = [each.stats.error for each in group if each.stats is not None]
    expected = max(each.stats.expected for each in group if each.stats is not None)
    spread = f"{max(errors):.2g}" if len(errors) == 1 else f"{min(errors):.2g} to {max(errors):.2g}"
    widths = [precision(part.tensor.dtype) for part in (group[0].a, group[0].b)]
    usual = f", where {min(widths)} bits explain about {expected:.2g}" if expected else ""
    return f"the relative error is {spread}{usual}"


def _cause(result: Result, a: Convention, b: Convention) -> str:
    """Return the likely cause of gains that differ by 1."""
    if result.kind != "gain" or result.outcome != "shift" or result.amount not in (1.0, -1.0):
        return ""
    higher = result.amount > 0
    if not a.family and not b.family:
        stored = "γ − 1 in A and γ in B" if higher else "γ in A and γ − 1 in B"
        return f": either the files store {stored}, or one is wrong (neither names its model type)"
    if a.adds_one or b.adds_one:
        return ": the +1 offset was applied twice" if higher else ": the +1 offset was not applied"
    if higher:
        return ": a +1 offset was applied, which this model type does not have"
    return ": 1 was subtracted, which this model type does not add again"


def _exceptions(group: list[Result], everything: list[Result]) -> str:
    """Name the tensors that a sentence covers if they are few, or those that it does not cover if these are few."""
    keys = set(_keys(group))
    inside = [each.a.name for each in group]
    outside = [each.a.name for each in everything if each.a.key not in keys]
    if len(everything) == 1 or not outside:
        return ""
    if len(inside) <= _NAMED:
        return f" ({_listed(inside)})"
    if len(outside) <= _NAMED:
        return f"; {_listed(outside)} {'is' if len(outside) == 1 else 'are'} not"
    roles = sorted({place(name, ()).role for name in inside})
    return f" ({_listed(roles)})" if len(roles) <= _NAMED else f" ({_listed(inside[:_NAMED])} …)"


def _listed(names: Sequence[str]) -> str:
    quoted = [f"`{name:.100}`" for name in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} and {quoted[-1]}"


def _layouts(results: Sequence[Result]) -> Iterator[Difference]:
    groups: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for each in results:
        if not each.expected_layout and each.outcome in FINE:
            groups[role_of(each.a.key), each.layout or "not interleaved by head"].append(each)
    for (role, layout), group in groups.items():
        count = sum(role_of(each.a.key) == role for each in results)
        where = f" in {len(group)} of {count} places" if count > 1 else ""
        sentence = (
            f"`{role}`{where} fits only with its {layout}" if "rows" in layout else f"`{role}`{where} is {layout}"
        )
        yield Difference("layout", True, f"{sentence}, which its format does not explain.", _keys(group))


def _keys(group: Iterable[Result]) -> tuple[str, ...]:
    return tuple(each.a.key for each in group)


def _moved(results: Sequence[Result], moved: Mapping[str, str]) -> Iterator[Difference]:
    """Report swapped tensors, grouped by the parts that were swapped."""
    names = {each.a.key: each.a.name for each in results}
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    position = {key: number for number, key in enumerate(moved)}
    for key, other in moved.items():
        swapped = moved.get(other) == key
        if swapped and position[other] < position[key]:
            continue
        groups[_exchange(key, other), "are swapped" if swapped else "moved"].append(key)
    for (what, how), keys in groups.items():
        example = f"B has `{names[keys[0]]}` of A as `{names[moved[keys[0]]]}`"
        affected = [key for first in keys for key in (first, moved[first])]
        verb = f"{what} are swapped in B" if how == "are swapped" else f"B has {what}"
        yield Difference("moved", True, f"{verb} ({len(keys)} ×): {example}.", tuple(dict.fromkeys(affected)))


def _exchange(key: str, other: str) -> str:
    first, second = (place(each.partition("#")[0], ()) for each in (key, other))
    if first.role != second.role:
        return f"`{first.role}` and `{second.role}`"
    if first.block != second.block:
        return f"tensors of blocks {first.block} and {second.block}"
    return f"experts of `{first.role}`"


def settings_differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[Difference]:
    """Yield the settings that change what the model computes and that differ between the checkpoints."""
    yield from _setting("eps", "The norms' ε", norm_eps(a), norm_eps(b))
    for keys, label in (
        (("rope_theta",), "The base of RoPE (rope_theta)"),
        (("num_attention_heads", "n_head", "n_heads"), "The number of heads"),
        (("num_key_value_heads", "n_kv_heads"), "The number of key/value heads"),
    ):
        values = setting(a, *keys), setting(b, *keys)
        if keys[0] != "num_key_value_heads" or 1.0 not in values:  # llama.cpp writes 1 for multi-head latent attention
            yield from _setting(keys[0], label, *values)


def _setting(kind: str, label: str, a: float | None, b: float | None) -> Iterator[Difference]:
    # GGUF stores these numbers as float32.
    if a is not None and b is not None and abs(a - b) > 1e-6 * max(abs(a), abs(b)):
        yield Difference(kind, True, f"{label} is {a:.6g} in A and {b:.6g} in B.")
