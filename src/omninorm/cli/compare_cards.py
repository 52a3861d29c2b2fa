"""Prints verdict cards to a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Any

from rich.console import Console

from omninorm.cli.harmless import harmless

_INDENT = 4 * " "
_WIDTH = 110


def show_cards(screen: Console, cards: Sequence[Mapping[str, Any]]) -> None:
    """Print the verdict, the finding and the conditions of each claim; the page has the sources and the figures."""
    from omninorm.report.comparison.page import condition_row, sentence  # needs packages that other commands do not
    from omninorm.report.comparison.reading import Condition

    for card in cards:
        screen.print(f"\n{card['id']}  {harmless(card['claim'], one_line=True)}")
        _paragraph(screen, f"→ {sentence(card['verdict'])}")
        _paragraph(screen, card["found"])
        for each in card["conditions"]:
            label, measured, mean, interval, claimed, _, holds = condition_row(Condition.model_validate(each))
            _paragraph(screen, f"- {label}: {mean} ({interval}), claimed {claimed} [{measured}]: {holds}", hanging="  ")
        _paragraph(screen, f"Reproduce with: {card['command']}")


def _paragraph(screen: Console, text: str, hanging: str = "") -> None:
    width = min(screen.width, _WIDTH)
    line = harmless(text, one_line=True)
    screen.print(fill(line, width, initial_indent=_INDENT, subsequent_indent=_INDENT + hanging))
