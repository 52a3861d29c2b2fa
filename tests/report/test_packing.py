"""Packed numbers and text of the page: cells of two bytes, thinned curves, escaping."""

from __future__ import annotations

import math
import random

import pytest

from omninorm.report.packing import curve, pack, unpack
from omninorm.report.story import Series
from omninorm.report.text import embed, escape, plain, short


def test_cells_are_rounded_to_eight_significant_bits():
    chance = random.Random(1)
    values = [10 ** chance.uniform(-37, 38) for _ in range(2000)]
    for value, back in zip(values, unpack(pack([values[:1000], values[1000:]])), strict=True):
        # bfloat16 rounded to nearest: half of the last of eight significant bits.
        assert back == pytest.approx(value, rel=2**-8)


def test_special_cells_are_kept():
    values = [0.0, 1.0, 0.5, -3.0, math.inf, -math.inf, None, 1e300, 1e-300]
    assert unpack(pack([values])) == [0.0, 1.0, 0.5, -3.0, math.inf, -math.inf, None, math.inf, 0.0]
    assert math.isnan(unpack(pack([[math.nan]]))[0])
    assert unpack(pack([[math.nan, 1.0], [None, 2.0]]))[1:] == [1.0, None, 2.0]
    assert pack([]) == ""


def test_long_curve_is_thinned_and_keeps_its_extremes():
    values = [1.0 + 1e-3 * (step % 7) for step in range(100_000)]
    values[31_337], values[77_777], values[5] = 99.0, 0.5, math.nan
    drawn = curve(Series(list(range(1, 100_001)), values), logarithmic=True)
    assert len(drawn["x"]) == len(drawn["y"]) < 1500
    points = dict(zip(drawn["x"], drawn["y"], strict=True))
    assert (points[31_338], points[77_778]) == (99.0, 0.5)
    assert drawn["bad"] == [6]
    assert drawn["log"]
    assert {1, 100_000} <= set(points)
    assert drawn["x"] == sorted(drawn["x"])


def test_short_curve_is_complete():
    drawn = curve(Series([3, 4, 5], [1.0, math.inf, 2.0]))
    assert drawn == {"x": [3, 5], "y": [1.0, 2.0], "bad": [4], "log": False, "mean": []}
    nothing = curve(Series([1, 2], [math.nan, math.nan]), logarithmic=True)
    assert (nothing["x"], nothing["bad"], nothing["log"]) == ([], [1, 2], False)


def test_values_that_rounding_would_make_infinite_count_as_not_finite():
    most = 1.7976931348623157e308
    drawn = curve(Series([1, 2, 3, 4], [1.0, most, -most, 2.0]))
    assert (drawn["x"], drawn["y"], drawn["bad"]) == ([1, 4], [1.0, 2.0], [2, 3])
    embed(drawn)
    long = curve(Series(list(range(1, 3001)), [1e300 if step % 2 else most for step in range(1, 3001)]))
    assert set(long["y"]) == {1e300}
    assert {value for _, value in long["mean"]} == {1e300}
    embed(long)


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("blocks.0.norm", "blocks.0.norm"),
        ("γ·ε 漢", "γ·ε 漢"),
        ("\x1b[31mred", "␛[31mred"),
        ("a\nb\tc\x7f", "a␊b␉c␡"),
        ("\u202egnp.exe\u2066", "�gnp.exe�"),
        ("a\u2028b\ud800", "a�b�"),
        ("x" * 700, "x" * 599 + "…"),
    ],
)
def test_text_is_one_line_of_visible_characters(given, shown):
    assert plain(given) == shown


def test_markup_is_escaped():
    assert escape("<b class=\"a\" id='c'>&") == "&lt;b class=&quot;a&quot; id=&#x27;c&#x27;&gt;&amp;"


@pytest.mark.parametrize("text", ["</script><script>", "<!--<script>", "]]>", "\u2028\u2029", "'\"&\\", "漢\x00\ud800"])
def test_embedded_data_is_inert_and_can_be_parsed(text):
    import json

    data = embed({text: [text, 1.5]})
    assert data.isascii()
    assert not set("<>&'") & set(data)
    assert json.loads(data) == {text: [text, 1.5]}


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "–"), (0.0, "0"), (1.0, "1"), (12.5, "12.5"), (0.021341, "0.02134"), (-3.14159, "-3.142"), (1234.5, "1,234"),
        (999.96, "1000"), (123456.0, "123,456"), (3.2e-5, "3.2e-5"), (1.1e12, "1.1e12"), (100.0, "100"), (1e6, "1e6"),
        (math.nan, "NaN"), (math.inf, "∞"), (-math.inf, "−∞"),
    ],
)  # fmt: skip
def test_numbers_are_short(value, shown):
    assert short(value) == shown
