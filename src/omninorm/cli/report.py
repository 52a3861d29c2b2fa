"""`omninorm report`: write the report page of a run or a comparison."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from omninorm.cli.compare_cards import show_cards
from omninorm.cli.console import console
from omninorm.cli.harmless import harmless
from omninorm.errors import ConfigError
from omninorm.report import RunStory, Verdict, judge, read_run, write_page

TIMINGS_FILE = "timings.json"  # present in the folder of a comparison


def report(
    run: Annotated[
        Path, typer.Argument(help="Folder of a run or a comparison, or a record.jsonl.", show_default=False)
    ],
    out: Annotated[Path | None, typer.Option(help="Output file.", show_default="RUN/report.html")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Write a run's report: one HTML page with what went wrong, where, and what to try.

    For a comparison's folder, write the page of its results; with --out FILE.md, as Markdown with the figures next to
    it.
    """
    is_comparison = (run / TIMINGS_FILE).exists()
    suffixes = (".html", ".md") if is_comparison else (".html",)
    if out is not None and out.suffix not in suffixes:
        kind = "comparison" if is_comparison else "run"
        remedy = f"write for example --out {shlex.quote(str(out.with_suffix('.html')))}" if out.name else ""
        raise ConfigError(f"The page of a {kind} must end in {' or '.join(suffixes)}", str(out), remedy)
    if is_comparison:
        _comparison(run, out or run / "report.html", as_json)
        return
    story = read_run(run)
    verdict = judge(story)
    page = write_page(story, out or (run if run.is_dir() else run.parent) / "report.html")
    if as_json:
        typer.echo(json.dumps(_summary(run, story, verdict, page), ensure_ascii=True, indent=2))
        return
    screen = console()
    screen.print(harmless(verdict.sentence, one_line=True))
    if verdict.remedy:
        screen.print(harmless(f"What to try: {verdict.remedy}", one_line=True))
    for line in (verdict.more, f"Alarms: {_count(story)}.", *story.notes):
        if line:
            screen.print(harmless(line, one_line=True))
    screen.print(f"Report: {harmless(str(page), one_line=True)}")


def _comparison(folder: Path, out: Path, as_json: bool) -> None:
    from omninorm.report import comparison as pages  # imported here because they need optional packages

    comparison = pages.read_comparison(folder)
    write = pages.write_markdown if out.suffix == ".md" else pages.write_comparison_page
    page = write(comparison, out)
    cards = [card.model_dump() for card in comparison.claims]
    if as_json:
        typer.echo(json.dumps({"comparison": str(folder), "page": str(page), "claims": cards}, indent=2))
        return
    screen = console()
    show_cards(screen, cards)
    screen.print(f"Report: {harmless(str(page), one_line=True)}")


def _count(story: RunStory) -> str:
    fails, warnings = story.count("fail"), story.count("warn")
    failures = f"{fails} failure{'' if fails == 1 else 's'}"
    return f"{failures}, {warnings} warning{'' if warnings == 1 else 's'}" if fails or warnings else "none"


def _summary(run: Path, story: RunStory, verdict: Verdict, page: Path) -> dict[str, Any]:
    fields = ("step", "severity", "rule", "layer", "evidence", "remedy", "source", "ranks")
    return {
        "run": str(run),
        "page": str(page),
        "verdict": {"status": verdict.status, "sentence": verdict.sentence, "remedy": verdict.remedy},
        "alarms": [{field: getattr(alarm, field) for field in fields} for alarm in story.alarms],
        "steps": story.last_step,
        "samples": story.samples,
        "notes": list(story.notes),
    }
