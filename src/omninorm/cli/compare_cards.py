"""Verdict cards in a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Any

from rich.console import Console

from omninorm.cli.harmless import harmless

_INDENT = 4 * " "
_WIDTH = 110


def show_cards(screen: Console, cards: Sequence[Mapping[str, Any]]) -> None:
    """A verdict and a finding for each claim; the page has the rest."""
    for card in cards:
        screen.print(f"\n{card['id']}  {harmless(card['claim'], one_line=True)}")
        for line in (f"→ {card['verdict']}", card["found"], f"Again: {card['command']}"):
            screen.print(
                fill(
                    harmless(line, one_line=True),
                    min(screen.width, _WIDTH),
                    initial_indent=_INDENT,
                    subsequent_indent=_INDENT,
                )
            )
