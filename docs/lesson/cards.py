"""Verdict cards of the claims, from the committed results of `omninorm compare --preset chapter`."""

from __future__ import annotations

from html import escape
from pathlib import Path

from IPython.display import HTML

from omninorm.report.comparison.page import CONDITION_HEAD, MARKS, condition_row, kind, sentence, table
from omninorm.report.comparison.reading import Card, read_comparison


def cards(folder: Path, which: str) -> HTML:
    """Return one card per claim, of the chapter's claims ("C") or of the others: verdict, finding, numbers, sources."""
    chosen = [card for card in read_comparison(folder).claims if _is_chapters(card) == (which == "C")]
    return HTML("\n".join(map(_card, chosen)))


def held(folder: Path) -> int:
    """Return the number of the chapter's claims that hold without a condition."""
    return sum(kind(card.verdict) == "holds" for card in read_comparison(folder).claims if _is_chapters(card))


def _is_chapters(card: Card) -> bool:
    return card.id.startswith("C") and card.id[1:].isdecimal()


def _card(card: Card) -> str:
    state = kind(card.verdict)
    numbers = table(CONDITION_HEAD, map(condition_row, card.conditions))
    return f"""<section class="verdict verdict-{escape(state)}"><p class="verdict-claim"><strong>{escape(card.id)}</strong> {escape(card.claim)}</p>
<p><strong>{MARKS[state][1]} {escape(sentence(card.verdict))}</strong></p><p>{escape(card.found)}</p>
<details><summary>Conditions, measurement and sources</summary>{numbers}<p>{escape(card.measured)} {escape(card.source)}</p></details></section>"""
