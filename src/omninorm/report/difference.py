"""write_difference: one page about where two models first part, from the record of the comparison."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omninorm.report.page import titled
from omninorm.report.shell import document, write_document
from omninorm.report.tables import grid
from omninorm.report.text import escape, plural, short

MAX_ROWS = 2000
_KINDS = {"equal": ("healthy", "="), "rounding": ("quiet", "≈"), "different": ("failing", "≠")}
# What the script of the shell draws: nothing.
_NO_FIGURES: Mapping[str, Any] = {
    "first": 0, "last": 0, "steps": [], "axes": {}, "ticks": {}, "figures": {}, "alarms": [], "lead": None,
}  # fmt: skip
_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 760, 280, 70, 14, 34
_LOWEST = 1e-18  # drawn for exactly 0
_HEADS = ("Inputs", "Outputs", "Same input")
_SERIES = (("outputs", "outputs in the two models"), ("fed", "outputs for the same input"))

Module = Mapping[str, Any]


def write_difference(record: Mapping[str, Any], out: str | Path) -> Path:
    """Write the page of a comparison; an existing one is replaced atomically.

    Args:
        record: `FirstDifference.to_record()`, with the models' names as "a" and "b" and the "input" in words.
        out: the page's file.

    Raises:
        RunError: the page can't be written.
    """
    return write_document(render_difference(record), out)


def render_difference(record: Mapping[str, Any]) -> str:
    """Return the page as text. All text from the record is escaped."""
    kind, mark = _KINDS[record["kind"]]
    details = "".join(f"<p>{escape(text, 1200)}</p>" for text in record["details"])
    main = (
        f'<section id="verdict" aria-label="Verdict"><div class="verdict {kind}"><span class="mark" aria-hidden="true">'
        f"{mark}</span><div><h1>{escape(record['verdict'], 600)}</h1>{details}</div></div></section>\n"
        f"{titled('facts', 'What was compared', _facts(record))}"
        f"{_parts(record)}"
        f"{titled('modules', 'Differences by module', _figure(record) + _table(record))}"
        f"{_unmatched(record)}"
    )
    name = f"{record['a']} and {record['b']}"
    return document(f"{name}: {record['verdict']}", name, main, _NO_FIGURES)


def _facts(record: Mapping[str, Any]) -> str:
    dtype = record["dtype"] if record["dtype"] != "as they are" else "the dtypes of the weights"
    facts = {
        "A": f"{record['a']} ({record['class_a']})",
        "B": f"{record['b']} ({record['class_b']})",
        "Input": record["input"],
        "Computed in": dtype,
        "Counts as rounding": record["allowance"],
        "Matched modules": f"{len(record['modules']):,}",
    }
    rows = "".join(f"<div><dt>{escape(key)}</dt><dd>{escape(value, 300)}</dd></div>" for key, value in facts.items())
    return f'<dl class="facts">{rows}</dl>'


def _parts(record: Mapping[str, Any]) -> str:
    """Return the table of the modules in which the models part, if there are any."""
    found = record["culprits"]
    if not found:
        return ""
    rows = [
        [each["label"], " / ".join(dict.fromkeys((each["class_a"], each["class_b"]))), *_numbers(each), _note(each)]
        for each in found[:MAX_ROWS]
    ]
    caption = f"{plural(len(found), 'module')} with other outputs for the same input, in order"
    return titled("parts", "Where they part", grid("parts", caption, ["Module", "Class", *_HEADS, "Notes"], rows))


def _table(record: Mapping[str, Any]) -> str:
    modules = record["modules"]
    rows = [
        [("≠ " if each["parts"] else "") + each["label"], *_numbers(each), _note(each)] for each in modules[:MAX_ROWS]
    ]
    hidden = len(modules) - MAX_ROWS
    caption = f"{plural(len(modules), 'module')} in the order of their calls" + (
        f"; {hidden:,} more" if hidden > 0 else ""
    )
    return grid("difference", caption, ["Module", *_HEADS, "Notes"], rows)


def _numbers(each: Module) -> list[str]:
    return [short(_number(each[name]), 2) for name in ("inputs", "outputs", "fed")]


def _note(each: Module) -> str:
    if each["reasons"]:
        return "; ".join(each["reasons"])
    if each["compensated"]:
        return "rearranged: a module around it agrees"
    return f"not fed: {each['not_fed']}" if each["not_fed"] else ""


def _unmatched(record: Mapping[str, Any]) -> str:
    rows = [[name, which.upper()] for which in ("a", "b") for name in record[f"only_{which}"][:MAX_ROWS]]
    if not rows:
        return ""
    caption = f"{plural(len(rows), 'module')} without a counterpart"
    return titled("unmatched", "Modules without a counterpart", grid("unmatched", caption, ["Module", "Only in"], rows))


def _number(value: float | str | None) -> float | None:
    """Return a number of the record, in which those that are not finite are texts."""
    return None if value is None else float(value)


# The figure ------------------------------------------------------------------------------------------------------


def _figure(record: Mapping[str, Any]) -> str:
    """Return the relative differences over the order of the modules, on a logarithmic scale, as SVG."""
    modules = sorted(record["modules"], key=lambda each: (each["last"], -each["index"]))  # a module after its parts
    high = max([1.0, *(value for name, _ in _SERIES for value in _finite(modules, name))])
    scale = _Scale(math.log10(_LOWEST), math.ceil(math.log10(high)), max(1, len(modules) - 1))
    limit = scale.y(record["rounding"])
    drawn = [
        *_grid(scale),
        f'<line class="limit" x1="{_LEFT}" x2="{_WIDTH}" y1="{limit:.1f}" y2="{limit:.1f}"/>',
        *(_curve(modules, name, scale) for name, _ in _SERIES),
        *_marks(modules, scale),
    ]
    key = "".join(f'<span><i class="{name}"></i>{text}</span>' for name, text in _SERIES)
    summary = f"Relative difference of {plural(len(modules), 'module')} in the order in which they return"
    return (
        '<figure class="apart"><figcaption>'
        "<h3>Relative difference ‖a − b‖ / ‖a‖, in the order in which modules return</h3>"
        f'<p class="key">{key}<span><i class="limit"></i>counts as rounding</span></p></figcaption>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(summary)}">{"".join(drawn)}</svg>'
        "</figure>"
    )


class _Scale:
    """Where numbers are drawn: modules from left to right, decades from bottom to top."""

    def __init__(self, low: float, high: float, last: int) -> None:
        self.low, self.high, self.last = low, high, last

    def x(self, place: int) -> float:
        return _LEFT + 8 + (_WIDTH - _LEFT - 16) * place / self.last

    def y(self, value: float) -> float:
        power = self.high if math.isinf(value) else math.log10(max(value, _LOWEST))
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (self.high - power) / (self.high - self.low)


def _finite(modules: Sequence[Module], name: str) -> list[float]:
    numbers = [_number(each[name]) for each in modules]
    return [each for each in numbers if each is not None and math.isfinite(each)]


def _grid(scale: _Scale) -> Iterator[str]:
    for power in range(int(scale.high), int(scale.low), -4):
        y = scale.y(10.0**power)
        yield f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text class="end" x="{_LEFT - 8}" y="{y + 4:.1f}">{"1" if power == 0 else f"1e{power}"}</text>'
    yield f'<text class="end" x="{_LEFT - 8}" y="{scale.y(0.0) + 4:.1f}">0</text>'
    yield f'<text x="{_LEFT + 8}" y="{_HEIGHT - 8}">first</text>'
    yield f'<text class="end" x="{_WIDTH - 8}" y="{_HEIGHT - 8}">last</text>'


def _curve(modules: Sequence[Module], name: str, scale: _Scale) -> str:
    points = [
        f"{scale.x(place):.1f},{scale.y(value):.1f}"
        for place, each in enumerate(modules)
        if (value := _number(each[name])) is not None
    ]
    return f'<polyline class="{name}" points="{" ".join(points)}"/>' if points else ""


def _marks(modules: Sequence[Module], scale: _Scale) -> Iterator[str]:
    for place, each in enumerate(modules):
        if each["parts"]:
            size = _number(each["outputs"] if each["fed"] is None else each["fed"])
            assert size is not None
            spot = f'<circle class="parts" cx="{scale.x(place):.1f}" cy="{scale.y(size):.1f}" r="5">'
            yield f"{spot}<title>{escape(each['label'], 200)}</title></circle>"
