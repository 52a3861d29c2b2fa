"""The page of a comparison: verdict cards, then every study with its figure and table."""

from __future__ import annotations

import base64
import hashlib
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from importlib.resources import files
from pathlib import Path

from omninorm.record.files import write_file, writing
from omninorm.report.comparison.figures import claim_figure, study_figure
from omninorm.report.comparison.reading import Card, Comparison, Condition, Configuration, Difference, StudyResults
from omninorm.report.comparison.wording import count_outcomes, not_enough_evidence
from omninorm.report.text import escape, plain, plural, short

_POLICY = "default-src 'none'; img-src data:; style-src {style}; base-uri 'none'; form-action 'none'"
_SHOWN_VERDICTS = 12  # of a study, above its figure
MARKS = {"holds": ("healthy", "✓"), "partly": ("warnings", "◐"), "fails": ("failing", "✗"), "unclear": ("quiet", "?")}
NOTES = (
    "Seeds are paired: compared runs use the same seed for their weights and the same batches. Bars are Student's t "
    "intervals at 95 %. Verdicts are corrected for all questions of a claim or a study by Holm's procedure, so an "
    "interval that excludes a threshold does not always give a verdict. A run has learned if it needs less than 0.9 of "
    "the unigram baseline's bits per byte, and has stagnated otherwise. Diverged runs count as 8 bits per byte, a "
    "uniform guess."
)
CONDITION_HEAD = ("condition", "measured", "mean", "95 % interval", "claimed", "seeds", "holds")


def write_comparison_page(comparison: Comparison, out: Path) -> Path:
    """Write the page; an existing one is replaced atomically.

    Raises:
        RunError: it can't be written.
        MissingExtraError: matplotlib is not installed.
    """
    content = render(comparison).encode()
    with writing(out):
        write_file(out, content)
    return out


def render(comparison: Comparison) -> str:
    """Return the page's HTML. It contains no scripts and loads nothing."""
    style = (files("omninorm.report") / "template" / "comparison.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = _POLICY.format(style=f"'sha256-{digest}'")
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">\n<meta name="referrer" content="no-referrer">',
            f"<title>{escape(comparison.title, 160)}</title>\n<style>{style}</style>\n</head>\n<body>\n<main>",
            *_body(comparison),
            "</main>\n</body>\n</html>\n",
        ]
    )


def _body(comparison: Comparison) -> Iterator[str]:
    yield f'<header><p class="brand"><b>omninorm</b> compare</p><h1>{escape(comparison.title, 200)}</h1>'
    yield f'<p class="facts">{escape(" · ".join(facts(comparison)))}</p></header>'
    if comparison.claims:
        yield '<section id="claims"><h2>Claims</h2>'
        yield _overview(comparison.claims)
        yield from map(_card, comparison.claims)
        yield "</section>"
    yield '<section id="studies"><h2>Studies</h2>'
    yield from map(_study, comparison.studies)
    yield "</section>"
    if comparison.failures:
        yield f'<section id="failures"><h2>Runs that failed</h2>{table((), comparison.failures.items())}</section>'
    yield f"<footer><p>{escape(NOTES, 2000)}</p></footer>"


def facts(comparison: Comparison) -> list[str]:
    """Return the text, the unigram baseline and the CPU time."""
    text = comparison.text
    shown = [
        f"{plain(text.name, 80)} ({plural(text.bytes, 'byte')})",
        f"unigram baseline {short(text.unigram_bits_per_byte)} bits per byte",
    ]
    return shown if comparison.seconds is None else [*shown, f"{short(comparison.seconds / 60, 3)} CPU-minutes"]


# Claims ----------------------------------------------------------------------------------------------------------


def kind(verdict: str) -> str:
    """Return the kind of a verdict, a key of `MARKS`."""
    if verdict == "holds":
        return "holds"
    # "holds only when …" is the wording of older results.
    return (
        "partly"
        if verdict.startswith(("holds in part", "holds only"))
        else "fails"
        if verdict.startswith("does not")
        else "unclear"
    )


def sentence(verdict: str) -> str:
    """Return a verdict as a sentence.

    Example:
        >>> sentence("holds in part (2 of 5 conditions)")
        'Holds in part (2 of 5 conditions).'
    """
    return f"{verdict[:1].upper()}{verdict[1:]}."


def _overview(cards: Sequence[Card]) -> str:
    rows = "".join(
        f'<tr><td><a href="#{anchor(card.id)}">{escape(card.id)}</a></td><td>{escape(card.claim)}</td>'
        f'<td class="{MARKS[kind(card.verdict)][0]}"><span class="mark">{MARKS[kind(card.verdict)][1]}</span> '
        f"{escape(card.verdict)}</td></tr>"
        for card in cards
    )
    return f'<div class="scroll"><table class="overview"><tbody>{rows}</tbody></table></div>'


def _card(card: Card) -> str:
    sort, mark = MARKS[kind(card.verdict)]
    verdict = escape(sentence(card.verdict), 1500)
    figure = claim_figure(card)
    name = escape(card.id)
    picture = _image(figure, f"Intervals of claim {card.id}; the table has the numbers") if figure else ""
    return (
        f'<article class="card {sort}" id="{anchor(card.id)}"><p class="id">{name}</p><h3>{escape(card.claim)}</h3>'
        f'<p class="verdict"><span class="mark" aria-hidden="true">{mark}</span> {verdict}</p>'
        f"<p>{escape(card.found, 2000)}</p>{picture}"
        f"<details><summary>Measurement, numbers and sources</summary><p>{escape(card.measured, 1500)}</p>"
        f"{_conditions(card.conditions)}<p>{escape(card.source, 1500)}</p></details>"
        f'<p class="again">Reproduce with: <code>{escape(card.command)}</code></p></article>'
    )


def _conditions(conditions: Sequence[Condition]) -> str:
    return table(CONDITION_HEAD, (condition_row(each) for each in conditions))


def condition_row(each: Condition) -> tuple[str, ...]:
    """Return a condition's row, in the order of `CONDITION_HEAD`."""
    claimed = f"{'>' if each.above else '<'} {short(_shown(each.threshold, each))}"
    mean, ends = short(_shown(each.mean, each)), interval(each.low, each.high, each)
    holds = not_enough_evidence(each.more) if each.outcome == "unclear" else each.outcome
    return each.label, each.unit, mean, ends, claimed, str(each.seeds), holds


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return an HTML table; all texts are escaped."""
    title = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{title}</tr></thead><tbody>{body}</tbody></table></div>'


def interval(low: float | None, high: float | None, each: Condition | None = None) -> str:
    """Return an interval as text, – if it is unknown."""
    if low is None or high is None:
        return "–"
    return f"{short(_shown(low, each))} … {short(_shown(high, each))}"


def _shown(value: float | None, each: Condition | None) -> float | None:
    """Return the number to display: logarithms are displayed as their exponentials."""
    if value is None or each is None or each.scale != "log":
        return value
    return math.exp(max(-700.0, min(value, 700.0)))


# Studies ---------------------------------------------------------------------------------------------------------


def _study(study: StudyResults) -> str:
    figure = study_figure(study)
    picture = _image(figure, f"Study {study.name}; the table has the numbers") if figure else ""
    better = f", {'lower' if study.lower_is_better else 'higher'} is better; margin {study.margin:g}"
    rows = table(*study_rows(study))
    return (
        f'<article class="study"><h3>{escape(study.name)}</h3>'
        f'<p class="intro">{escape(study.unit)}{"" if study.protocol == "init" else better}</p>'
        f"{_verdicts(study)}{picture}<details><summary>Numbers</summary>{rows}</details></article>"
    )


def _verdicts(study: StudyResults) -> str:
    """Return the verdict of each comparison with the baseline as a list; the rest is in the table."""
    judged = [each for each in study.comparisons if each.verdict]
    if not judged:
        return ""
    baselines = dict.fromkeys(each.against for each in judged)
    items = [
        f"<li>{escape(each.label)}, {plural(each.depth, 'block')}: <b>{escape(each.verdict)}</b></li>"
        for each in judged[:_SHOWN_VERDICTS]
    ]
    if len(judged) > _SHOWN_VERDICTS:
        items.append(f"<li>{len(judged) - _SHOWN_VERDICTS} more in the table below</li>")
    return f"<p>Compared with {escape(', '.join(baselines))}:</p><ul>{''.join(items)}</ul>"


def study_rows(study: StudyResults) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the head and the rows of a study's table."""
    found = {(each.depth, each.label): each for each in study.comparisons}
    head = ("configuration", "blocks", "learning rate", "mean", "runs", "difference (95 % interval)", "verdict")
    return head, [_row(row, found.get((row.depth, row.label)), study.protocol) for row in study.configurations]


def _row(row: Configuration, each: Difference | None, protocol: str) -> tuple[str, ...]:
    known = [value for value in row.values.values() if value is not None]
    mean = short(statistics.fmean(known)) if known else "–"
    rate = "" if row.lr is None else short(row.lr)
    compared = ("", "baseline")
    if each is not None:
        compared = ("–" if each.mean is None else f"{each.mean:+.3f} ({interval(each.low, each.high)})", each.verdict)
    measured = 0 if protocol == "init" else len(row.values)  # nothing can diverge before the first step
    runs = count_outcomes(row.outcomes, row.lost, measured, row.missing)
    return row.label, str(row.depth), rate, mean, runs, *compared


def _image(svg: bytes, alternative: str) -> str:
    return f'<img alt="{escape(alternative)}" src="data:image/svg+xml;base64,{base64.b64encode(svg).decode()}">'


def anchor(name: str) -> str:
    """Return a name that is valid in a URL."""
    return "".join(character if character.isalnum() and character.isascii() else "-" for character in name)[:60]
