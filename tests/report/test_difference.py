"""The page about where two models part: complete without its script, escaped, and readable in a browser."""

from __future__ import annotations

import html
import math
import re
from typing import Any

import pytest
from helpers.browser import open_page

from omninorm.errors import RunError
from omninorm.report.difference import render_difference, write_difference


def module(label: str, **values: Any) -> dict[str, Any]:
    return {
        "label": label, "a": label, "b": label, "class_a": "Linear", "class_b": "Linear", "inputs": 0.0, "outputs": 0.0,
        "fed": 0.0, "not_fed": "", "parts": False, "reasons": [], "compensated": False, "index": 0, "last": 0, **values,
    }  # fmt: skip


def record(**values: Any) -> dict[str, Any]:
    part = module(
        "second",
        index=2,
        last=2,
        outputs=0.021,
        fed=0.02,
        parts=True,
        class_b="Conv1D",
        reasons=["weight differs by 2 %"],
    )
    modules = [
        module("the model itself", last=3, outputs=0.01, fed=0.01),
        module("first", index=1, last=1, fed=None, not_fed="it takes other arguments"),
        part,
        module("third", index=3, last=3, inputs=0.021, outputs="inf", fed=3e-16),
    ]
    return {
        "a": "one", "b": "two", "class_a": "A", "class_b": "B", "input": "random tokens", "kind": "different",
        "verdict": "They first part in second.", "details": ["In second, weight differs by 2 %."], "modules": modules,
        "culprits": [part], "only_a": ["extra"], "only_b": [], "exact": 1e-10, "rounding": 1e-6, "allowance": "up to 1e-6", "dtype": "float64", **values,
    }  # fmt: skip


def rows(page: str, table: str) -> list[list[str]]:
    body = page.split(f'id="table-{table}"')[1].split("</table>")[0].split("<tbody>")[1]
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in body.split("</tr>")]
    return [[html.unescape(cell) for cell in row] for row in cells if row]


def test_the_page_lists_every_module_and_where_they_part() -> None:
    page = render_difference(record())
    assert "<h1>They first part in second.</h1><p>In second, weight differs by 2 %.</p>" in page
    assert rows(page, "parts") == [["second", "Linear / Conv1D", "0", "0.021", "0.02", "weight differs by 2 %"]]
    assert rows(page, "difference") == [
        ["the model itself", "0", "0.01", "0.01", ""],
        ["first", "0", "0", "–", "not fed: it takes other arguments"],
        ["≠ second", "0", "0.021", "0.02", "weight differs by 2 %"],
        ["third", "0.021", "∞", "3e-16", ""],
    ]
    assert rows(page, "unmatched") == [["extra", "A"]]


def test_the_figure_draws_modules_as_they_return_and_marks_where_they_part() -> None:
    page = render_difference(record())
    lines = dict(re.findall(r'<polyline class="(\w+)" points="([^"]*)"', page))
    heights = {name: [float(point.split(",")[1]) for point in text.split()] for name, text in lines.items()}
    # first, second, third, and the model after its parts; higher differences are drawn further up
    assert len(heights["outputs"]) == 4
    assert len(heights["fed"]) == 3, "a module without a measurement has no point"
    first, second, third, whole = heights["outputs"]
    assert third < second < whole < first
    (mark,) = re.findall(r'<circle class="parts" cx="([\d.]+)" cy="([\d.]+)"', page)
    assert f"{mark[0]},{mark[1]}" in lines["fed"].split()


@pytest.mark.parametrize("kind", ["equal", "rounding"])
def test_pages_without_a_difference_have_no_table_of_places(kind: str) -> None:
    page = render_difference(record(kind=kind, culprits=[], only_a=[]))
    assert 'id="table-parts"' not in page
    assert 'id="table-unmatched"' not in page
    assert f'class="verdict {"healthy" if kind == "equal" else "quiet"}"' in page


def test_a_single_module_and_large_differences_fit_the_figure() -> None:
    for value in (0.0, 1e30, "inf", math.inf):
        page = render_difference(record(modules=[module("x", outputs=value, fed=value)], culprits=[]))
        for number in re.findall(r'points="[\d.]+,([\d.]+)"', page):
            assert 0 <= float(number) <= 280


def test_text_from_the_models_is_escaped() -> None:
    evil = "<script>alert(1)</script>"
    page = render_difference(record(verdict=evil, details=[evil], a=evil, culprits=[module(evil, parts=True, reasons=[evil])],
                                    modules=[module(evil, parts=True)], only_b=[evil], input=evil))  # fmt: skip
    assert page.count("<script") == 2, "the page's data and its own script"
    assert "alert(1)</script>" not in page


def test_the_page_replaces_another_one_but_no_record(tmp_path: Any) -> None:
    page = tmp_path / "page.html"
    page.write_text("old")
    assert write_difference(record(), page) == page
    assert page.read_text().startswith("<!doctype html>")
    (tmp_path / "record.jsonl").write_text("{}")
    with pytest.raises(RunError, match="would overwrite the record"):
        write_difference(record(), tmp_path / "record.jsonl")


def test_the_page_opens_in_a_browser_without_errors(tmp_path: Any) -> None:
    shown = open_page(render_difference(record()), tmp_path)
    assert shown.console == []
    assert 'data-ready="0"' in shown.dom


def test_the_page_fits_a_phone(tmp_path: Any) -> None:
    script = "document.title = String(document.documentElement.scrollWidth <= window.innerWidth);"
    shown = open_page(render_difference(record()), tmp_path, script, width=390)
    assert shown.title == "true"
