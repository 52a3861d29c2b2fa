"""Compares the weights of two checkpoints: opens, matches, measures and explains."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from omninorm.errors import InputError
from omninorm.inspection.against.classify import FINE, Result, compare_pair
from omninorm.inspection.against.convention import Convention, conventions
from omninorm.inspection.against.explain import Difference, explain, settings_differences
from omninorm.inspection.against.match import Match, match
from omninorm.inspection.against.missing import only_in_one
from omninorm.inspection.against.prepare import NotCompared, Source, open_source, prepare
from omninorm.inspection.against.roles import role_of
from omninorm.inspection.against.swapped import find_moved
from omninorm.inspection.settings import norm_eps
from omninorm.record.jsonl import json_values

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Comparison:
    """The result of comparing checkpoint B with checkpoint A.

    Args:
        a, b: the paths of the checkpoints, or the class of a module.
        formats: the formats of both: "safetensors", "mlx", "gguf" or "module".
        differences: the differences; those that matter come first.
        results: one result for each pair of tensors.
        not_compared: the tensors that were not compared, with the reason.
    """

    a: str
    b: str
    formats: tuple[str, str]
    differences: list[Difference]
    results: list[Result]
    not_compared: list[NotCompared]

    @property
    def matters(self) -> bool:
        """Return whether a difference changes what the model computes, beyond rounding and quantization."""
        return any(each.matters for each in self.differences)

    @property
    def verdict(self) -> str:
        """One sentence that summarizes the comparison."""
        count, pairs = sum(each.matters for each in self.differences), len(self.results)
        compared = f"{pairs} {'tensor' if pairs == 1 else 'tensors'} compared"
        if not count:
            return f"No difference that matters: {compared}."
        found = "1 difference that matters" if count == 1 else f"{count} differences that matter"
        return f"{found}: {compared}."

    def matched(self) -> dict[str, int]:
        """Return the number of pairs by the way in which they were matched, and by the order of their rows."""
        ways = Counter(each.how for each in self.results)
        ways.update(f"gains with {name}'s 1 added" for each in self.results if (name := _shifted(each)))
        ways.update(each.layout for each in self.results if each.layout and each.expected_layout)
        return dict(ways.most_common())

    def errors(self) -> list[dict[str, Any]]:
        """Return the relative error of each role whose pairs differ by rounding or quantization."""
        groups: dict[tuple[str, str, str], list[Result]] = defaultdict(list)
        for each in self.results:
            if each.outcome in ("rounding", "quantization") and each.stats is not None:
                groups[role_of(each.a.key), each.a.tensor.dtype, each.b.tensor.dtype].append(each)
        return [_error_row(role, dtypes, group) for (role, *dtypes), group in groups.items()]

    def to_record(self) -> dict[str, Any]:
        """Return everything as JSON values; non-finite numbers become "nan", "inf" and "-inf"."""
        record = {
            "a": self.a,
            "b": self.b,
            "formats": list(self.formats),
            "verdict": self.verdict,
            "matters": self.matters,
            "differences": [each.to_record() for each in self.differences],
            "matched": self.matched(),
            "not_compared": [each.to_record() for each in self.not_compared],
            "errors": self.errors(),
            "tensors": [each.to_record() for each in self.results],
        }
        encoded: dict[str, Any] = json_values(record)
        return encoded


def compare_weights(a: Source, b: Source, progress: Progress | None = None) -> Comparison:
    """Compare two checkpoints tensor by tensor, and explain the differences of B from A.

    Differences that the formats explain do not matter: another dtype, quantization, the +1 of Gemma's gains,
    llama.cpp's order of query and key rows, transposed, fused or stacked matrices. Only some rows are in memory at a
    time.

    Args:
        a, b: a .safetensors or .gguf file, a folder with weights, a run's folder, or a module in memory.
        progress: called with the bytes done, the total bytes and the name of the next tensor.

    Raises:
        RunError: a path has no weights, or only a pickle, or its files are damaged.
        InputError: the checkpoints have no tensor in common.
        MissingExtraError: the package that reads a format is not installed.

    Example:
        >>> import copy
        >>> from torch import nn
        >>> a = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
        >>> b = copy.deepcopy(a)
        >>> nn.init.zeros_(b[1].weight).sum().item()
        0.0
        >>> print(compare_weights(a, b).differences[0].sentence)
        `1.weight` is all zeros in B only.
    """
    opened = open_source(a), open_source(b)
    sides = conventions(*opened)
    prepared = prepare(opened, sides)
    matches = match(prepared[0].parts, prepared[1].parts)
    if not matches.pairs:
        remedy = "check that both belong to the same model"
        raise InputError(f"{opened[0].path} and {opened[1].path} have no tensor in common", "", remedy)
    measured = _measure_all(matches.pairs, sides, progress or (lambda done, total, name: None))
    results = [each for each in measured if not _is_reordered(each, sides)]
    lost, skipped = only_in_one(matches.only_a, matches.only_b, *prepared)
    differences = [
        *settings_differences(sides[0].config, sides[1].config),
        *explain(results, find_moved(results), *sides),
        *_longer(matches.pairs),
        *lost,
    ]
    not_compared = [*_no_eps(sides), *prepared[0].skipped, *prepared[1].skipped, *skipped, *_reordered(measured, sides)]
    differences.sort(key=lambda each: not each.matters)
    formats = (sides[0].format, sides[1].format)
    return Comparison(str(opened[0].path), str(opened[1].path), formats, differences, results, not_compared)


def _measure_all(pairs: Sequence[Match], sides: tuple[Convention, Convention], progress: Progress) -> list[Result]:
    total = sum(each.a.shape[0] * each.a.shape[1] for each in pairs)
    done, results = 0, []
    for pair in pairs:
        progress(done, total, pair.a.name)
        results.append(compare_pair(pair, *sides))
        done += pair.a.shape[0] * pair.a.shape[1]
    progress(total, total, "")
    return results


def _is_reordered(result: Result, sides: Sequence[Convention]) -> bool:
    """Return whether values differ because a format reorders heads in a way that is not undone here."""
    return result.outcome not in FINE and any(side.reorders(result.a.key) for side in sides)


def _reordered(results: Sequence[Result], sides: Sequence[Convention]) -> list[NotCompared]:
    roles = Counter(role_of(each.a.key) for each in results if _is_reordered(each, sides))
    return [NotCompared("both", role, count, "llama.cpp reorders its heads") for role, count in roles.items()]


def _longer(pairs: Sequence[Match]) -> list[Difference]:
    """Return the embeddings and heads that have more rows in one checkpoint, as with padded vocabularies."""
    found = []
    for pair in pairs:
        if pair.how == "rows in both":
            rows = [part.tensor.row_count for part in (pair.a, pair.b)]
            sentence = (
                f"`{pair.a.name}` has {rows[0]} rows in A and {rows[1]} in B; the first {min(rows)} were compared."
            )
            found.append(Difference("padding", False, sentence, (pair.a.key,)))
    return found


def _no_eps(sides: Sequence[Convention]) -> list[NotCompared]:
    missing = [name for name, side in zip("AB", sides, strict=True) if norm_eps(side.config) is None]
    where = "both" if len(missing) == 2 else "".join(missing)
    return [NotCompared(where, "the norms' ε", 1, "the settings do not contain it")] if missing else []


def _shifted(result: Result) -> str | None:
    """Return the checkpoint that stores this gain without the 1 that its model adds; None unless exactly one does."""
    offsets = result.a.offset, result.b.offset
    return None if offsets[0] == offsets[1] else "A" if offsets[0] else "B"


def _error_row(role: str, dtypes: Sequence[str], group: Sequence[Result]) -> dict[str, Any]:
    errors = {each.a.name: each.stats.error for each in group if each.stats is not None}
    worst = max(errors, key=lambda name: errors[name])
    return {
        "role": role, "dtypes": list(dtypes), "tensors": len(group), "median": median(errors.values()),
        "largest": errors[worst], "largest_in": worst,
    }  # fmt: skip
