"""Verdict cards of the claims, from the committed results of `omninorm compare --preset chapter`."""

from __future__ import annotations

from html import escape
from pathlib import Path

from IPython.display import HTML

from omninorm.report.comparison.page import MARKS, kind
from omninorm.report.comparison.reading import Card, read_comparison


def cards(folder: Path, which: str) -> HTML:
    """The chapter's claims ("C") or the others, one card each: claim, verdict, what was found, what sources say."""
    chosen = [card for card in read_comparison(folder).claims if _is_chapters(card) == (which == "C")]
    return HTML("\n".join(map(_card, chosen)))


def held(folder: Path) -> int:
    """How many of the chapter's claims hold without a condition."""
    return sum(kind(card.verdict) == "holds" for card in read_comparison(folder).claims if _is_chapters(card))


def _is_chapters(card: Card) -> bool:
    return card.id.startswith("C") and card.id[1:].isdecimal()


def _card(card: Card) -> str:
    state = kind(card.verdict)
    return f"""<section class="verdict verdict-{escape(state)}"><p class="verdict-claim"><strong>{escape(card.id)}</strong> {escape(card.claim)}</p>
<p><strong>{MARKS[state][1]} {escape(card.verdict)}.</strong></p><p>{escape(card.found)}</p>
<details><summary>How it was measured, and what others say</summary><p>{escape(card.measured)} {escape(card.source)}</p></details></section>"""
