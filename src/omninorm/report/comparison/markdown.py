"""A comparison as a page of documentation: Markdown, and a folder of figures next to it."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from pathlib import Path

from omninorm.record.files import write_file, writing
from omninorm.report.comparison.figures import claim_figure, study_figure
from omninorm.report.comparison.page import (
    CONDITION_HEAD,
    MARKS,
    NOTES,
    anchor,
    condition_row,
    facts,
    kind,
    sentence,
    study_rows,
)
from omninorm.report.comparison.reading import Card, Comparison, StudyResults
from omninorm.report.text import plain


def write_markdown(comparison: Comparison, out: Path) -> Path:
    """Write the page, and its figures to the folder of the same name without the suffix.

    Raises:
        RunError: they can't be written.
        MissingExtraError: matplotlib is not installed.
    """
    folder = out.with_suffix("")
    drawn = dict(figures(comparison))
    with writing(out):
        folder.mkdir(parents=True, exist_ok=True)
        for name, svg in drawn.items():
            write_file(folder / name, svg)
        write_file(out, render(comparison, folder.name, drawn).encode())
    return out


def render(comparison: Comparison, folder: str, names: Container[str]) -> str:
    """Return the page's text; `folder` holds the figures with these names."""
    return "\n".join(_lines(comparison, folder, names)) + "\n"


def figures(comparison: Comparison) -> Iterator[tuple[str, bytes]]:
    """Yield the name and the SVG of every figure."""
    for card in comparison.claims:
        svg = claim_figure(card)
        if svg is not None:
            yield f"{anchor(card.id)}.svg", svg
    for study in comparison.studies:
        svg = study_figure(study)
        if svg is not None:
            yield f"study-{anchor(study.name)}.svg", svg


def _lines(comparison: Comparison, folder: str, names: Container[str]) -> Iterator[str]:
    yield f"# {_text(comparison.title)}\n"
    yield f"{_text('; '.join(facts(comparison)))}. {NOTES}\n"
    if comparison.claims:
        yield from _table(("claim", "sentence", "verdict"), (_overview(card) for card in comparison.claims))
        for card in comparison.claims:
            yield from _card(card, folder)
    yield "\n## The studies"
    for study in comparison.studies:
        yield from _study(study, folder, names)
    if comparison.failures:
        yield "\n## Runs that failed\n"
        yield from _table(("run", "reason"), comparison.failures.items())


def _overview(card: Card) -> tuple[str, str, str]:
    mark = MARKS[kind(card.verdict)][1]
    return card.id, card.claim, f"{mark} {card.verdict}"


def _card(card: Card, folder: str) -> Iterator[str]:
    yield f"\n## {_text(card.id)}: {_text(card.claim)}\n"
    yield f"**{MARKS[kind(card.verdict)][1]} {_text(sentence(card.verdict))}** {_text(card.found)}\n"
    if any(each.mean is not None for each in card.conditions):
        yield f"![Intervals of claim {_text(card.id)}]({folder}/{anchor(card.id)}.svg)\n"
    yield f"{_text(card.measured)} {_text(card.source)}\n"
    yield from _table(CONDITION_HEAD, (condition_row(each) for each in card.conditions))
    yield f"\nReproduce with: `{plain(card.command).replace('`', chr(39))}`"


def _study(study: StudyResults, folder: str, names: Container[str]) -> Iterator[str]:
    yield f"\n### {_text(study.name)}\n"
    figure = f"study-{anchor(study.name)}.svg"
    if figure in names:
        yield f"![Study {_text(study.name)}]({folder}/{figure})\n"
    head, rows = study_rows(study)
    yield "<details><summary>Numbers</summary>\n"
    yield from _table(head, rows)
    yield "\n</details>"


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> Iterator[str]:
    yield f"| {' | '.join(_text(name) for name in head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(_text(cell) for cell in row)} |"


def _text(value: object) -> str:
    """Escape text for Markdown."""
    return plain(value, 2000).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("|", "\\|")
