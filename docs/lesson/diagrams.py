"""Draws placements. The description of each is first compared with what the placement computes."""

from __future__ import annotations

import html
from dataclasses import dataclass

import torch
from IPython.display import HTML
from lesson import BLUE, svg

from omninorm import NormConfig
from omninorm.functional import rms_norm
from omninorm.placement import PLACEMENT_TYPES, Position

BLOCK, BLOCKS = 3, 8


@dataclass(frozen=True)
class Rule:
    """A placement: the parts of the branch from left to right, the factor on the stream, and whether the sum is normed."""

    branch: tuple[str, ...]
    scale: tuple[str, float] = ("", 1.0)
    normed: bool = False

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for step in self.branch:
            y = {"N": rms_norm, "F": torch.sin, "÷√l": lambda t: t / BLOCK**0.5}[step](y)
        total = self.scale[1] * x + y
        return rms_norm(total) if self.normed else total


RULES = {
    "none": Rule(("F",)),
    "post": Rule(("F",), normed=True),
    "pre": Rule(("N", "F")),
    "sandwich": Rule(("N", "F", "N")),
    "reordered": Rule(("F", "N")),
    "deepnorm": Rule(("F",), ("× α", (2 * BLOCKS) ** 0.25), normed=True),
    "lns": Rule(("N", "÷√l", "F")),
    "keel": Rule(("N", "F"), ("× α", 2.0 * BLOCKS), normed=True),
}


def draw(*names: str) -> HTML:
    """Return a drawing with one line for each placement, x on the left and the next block's x on the right."""
    for name in names:
        _check(name)
    lines = "".join(_line(name, 78 * row) for row, name in enumerate(names))
    height = 78 * len(names)
    drawn = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 560 {height}" width="560" height="{height}">{lines}</svg>'
    return svg(
        drawn, "Placements: " + "; ".join(map(_words, names)) + ".", "N norm, F sublayer (attention or feed-forward)"
    )


def _check(name: str) -> None:
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    position = Position(role="attention", block=BLOCK, blocks=BLOCKS)
    real = PLACEMENT_TYPES[name](NormConfig("rmsnorm", name), 16, position)(x, torch.sin)
    torch.testing.assert_close(RULES[name].compute(x), real)


def _words(name: str) -> str:
    rule = RULES[name]
    scaled = f", the stream {rule.scale[0]}" if rule.scale[0] else ""
    after = ", then a norm on the stream" if rule.normed else ""
    return f"{name}, branch {' '.join(rule.branch)}{scaled}, added{after}"


def _line(name: str, top: int) -> str:
    rule, y, up = RULES[name], top + 58, top + 22
    boxes = "".join(_box(190 + 72 * at, up, step) for at, step in enumerate(rule.branch))
    after = _box(450, y, "N") if rule.normed else ""
    scale = _text(268, y - 8, rule.scale[0], "middle") if rule.scale[0] else ""
    return f"""
<g fill="none" stroke="currentColor" stroke-width="1.5">
<path d="M110 {y}H520m-7 -4l8 4l-8 4"/><path d="M150 {y}V{up}H410V{y - 9}"/>
<circle cx="410" cy="{y}" r="9" fill="var(--color-background-primary, white)"/><path d="M405 {y}h10m-5 -5v10"/></g>
{boxes}{after}{scale}{_text(10, y + 4, name, "start")}"""


def _box(x: int, y: int, step: str) -> str:
    norm = step == "N"
    fill = BLUE if norm else "var(--color-background-secondary, #eee)"
    ink = "white" if norm else "currentColor"
    shape = f'<rect x="{x - 22}" y="{y - 14}" width="44" height="28" rx="5" fill="{fill}" stroke="currentColor"/>'
    return shape + _text(x, y + 5, step, "middle", ink)


def _text(x: int, y: int, text: str, anchor: str, ink: str = "currentColor") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="{ink}" font-size="14">{html.escape(text)}</text>'
