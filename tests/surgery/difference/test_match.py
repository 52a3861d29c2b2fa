"""Calls are matched by name, by common names, by order and shapes, by content, and between matched neighbours."""

from __future__ import annotations

from omninorm.surgery.difference.calls import Call
from omninorm.surgery.difference.match import Matching

Shape = tuple[int, ...] | None
Line = tuple[str, str, Shape, Shape]


def calls(*lines: Line) -> list[Call]:
    """Build calls from lines (name, class, shape of the output, shape of the weight); indentation nests them."""
    found: list[Call] = []
    open_calls: list[int] = []
    counts: dict[str, int] = {}
    for index, (text, kind, shape, weight) in enumerate(lines):
        name, depth = text.strip(), (len(text) - len(text.lstrip())) // 2
        del open_calls[depth:]
        parent = open_calls[-1] if open_calls else -1
        parameters = () if weight is None else (("weight", weight),)
        number = counts.get(name, 0)
        counts[name] = number + 1
        found.append(Call(name, number, index, parent, index, kind, shape, parameters))
        open_calls.append(index)
    return found


def pairs(a: list[Call], b: list[Call]) -> dict[str, str]:
    matching = Matching(a, b)
    return {a[x].name: b[y].name for x, y in sorted(matching.pairs.items())}


def block(names: tuple[str, ...], number: int = 0, extra: bool = False) -> list[Call]:
    outer, norm, one, act, two = (each.format(number) for each in names)
    lines: list[Line] = [
        ("", "Model", (2, 8), None),
        (f"  {outer}", "Block", (2, 8), None),
        (f"    {norm}", "Norm", (2, 8), (8,)),
        (f"    {one}", "Linear", (2, 16), (16, 8)),
        (f"    {act}", "Act", (2, 16), None),
        (f"    {two}", "Linear", (2, 8), (8, 16)),
    ]
    if extra:
        lines.insert(1, ("  before", "Identity", (2, 8), None))
        lines.insert(6, ("    drop", "Dropout", (2, 16), None))
    return calls(*lines)


PLAIN = ("layers.{}", "layers.{}.ln_1", "layers.{}.mlp.up_proj", "layers.{}.mlp.act", "layers.{}.mlp.down_proj")
OTHER = ("blocks.{}", "blocks.{}.attention_norm", "blocks.{}.mlp.fc1", "blocks.{}.mlp.gelu", "blocks.{}.mlp.fc2")
STRANGE = ("q", "w", "e", "r", "t")


def test_equal_names_match() -> None:
    assert pairs(block(PLAIN), block(PLAIN)) == {each.name: each.name for each in block(PLAIN)}


def test_common_names_and_order_match_leaves_and_their_containers() -> None:
    for names in (OTHER, STRANGE):
        for extra in (False, True):
            theirs = ["", *(each.format(0) for each in names)]
            assert pairs(block(PLAIN), block(names, extra=extra)) == dict(
                zip(["", *(each.format(0) for each in PLAIN)], theirs, strict=True)
            )


def test_names_decide_against_the_order() -> None:
    one = calls(("", "M", (2, 8), None), ("  x", "Linear", (2, 8), (8, 8)), ("  y", "Linear", (2, 8), (8, 8)))
    other = calls(("", "M", (2, 8), None), ("  y", "Linear", (2, 8), (8, 8)), ("  x", "Linear", (2, 8), (8, 8)))
    assert pairs(one, other) == {"": "", "x": "x", "y": "y"}


def test_common_names_decide_against_the_order() -> None:
    up, gate = ("  layers.0.mlp.up_proj", "Linear"), ("  layers.0.mlp.gate_proj", "Linear")
    one = calls(("", "M", (2, 8), None), (*up, (2, 8), (8, 8)), (*gate, (2, 8), (8, 8)))
    first, second = ("  blocks.0.feed_forward.w1", "Linear"), ("  blocks.0.feed_forward.w3", "Linear")
    other = calls(("", "M", (2, 8), None), (*first, (2, 8), (8, 8)), (*second, (2, 8), (8, 8)))
    assert pairs(one, other) == {
        "": "",
        "layers.0.mlp.up_proj": "blocks.0.feed_forward.w3",
        "layers.0.mlp.gate_proj": "blocks.0.feed_forward.w1",
    }


def test_transposed_matrices_match_and_other_shapes_do_not() -> None:
    one = calls(("", "M", (2, 8), None), ("  x", "Linear", (2, 8), (8, 4)))
    assert pairs(one, calls(("", "M", (2, 8), None), ("  y", "Conv1D", (2, 8), (4, 8)))) == {"": "", "x": "y"}
    assert pairs(one, calls(("", "M", (2, 8), None), ("  y", "Linear", (2, 8), (8, 5)))) == {"": ""}
    assert pairs(one, calls(("", "M", (2, 8), None), ("  x", "Linear", (2, 9), (9, 4)))) == {"": ""}


def test_modules_without_an_output_match_nothing() -> None:
    one = calls(("", "M", (2, 8), None), ("  x", "Router", None, (4, 8)))
    assert pairs(one, one) == {"": ""}
    assert Matching(one, one).only() == []


def test_an_activation_matches_only_between_the_same_neighbours() -> None:
    def model(*order: str) -> list[Call]:
        kinds = {"u": ("Linear", (16, 8)), "d": ("Linear", (8, 16)), "f": ("First", None), "s": ("Second", None)}
        inner = [(f"  {name}", kinds[name][0], (2, 16) if name != "d" else (2, 8), kinds[name][1]) for name in order]
        return calls(("", "M", (2, 8), None), *inner)

    assert pairs(model("u", "f", "d"), model("u", "s", "d")) == {"": "", "u": "u", "f": "s", "d": "d"}
    assert pairs(model("u", "f", "d"), model("u", "d", "s")) == {"": "", "u": "u", "d": "d"}


def test_a_module_without_a_counterpart_is_listed_without_its_parts() -> None:
    one = calls(
        ("", "M", (2, 8), None),
        ("  a", "Linear", (2, 8), (8, 8)),
        ("  extra", "Block", (2, 8), None),
        ("    extra.line", "Linear", (2, 5), (5, 5)),
        ("  drop", "Dropout1d", (2, 8), None),
    )
    other = calls(("", "M", (2, 8), None), ("  a", "Linear", (2, 8), (8, 8)))
    matching = Matching(one, other)
    assert [each.name for each in matching.only()] == ["extra"]
    assert matching.only(in_b=True) == []
    assert [each.name for each in Matching(other, one).only(in_b=True)] == ["extra"]


def test_a_wrapper_with_the_same_content_takes_the_class_that_fits() -> None:
    one = calls(("", "Model", (2, 8), None), ("  x", "Block", (2, 8), None), ("    x.l", "Linear", (2, 8), (8, 8)))
    other = calls(
        ("", "Model", (2, 8), None),
        ("  w", "Wrap", (2, 8), None),
        ("    w.y", "Block", (2, 8), None),
        ("      w.y.m", "Linear", (2, 8), (8, 8)),
    )
    assert pairs(one, other) == {"": "", "x": "w.y", "x.l": "w.y.m"}
