"""`omninorm report`: writes the report page of a run or a comparison."""

from __future__ import annotations

import json
import shlex
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from omninorm.cli.compare_cards import show_cards
from omninorm.cli.console import console
from omninorm.cli.harmless import harmless
from omninorm.errors import ConfigError
from omninorm.record.jsonl import json_values
from omninorm.report import (
    RunStory,
    Verdict,
    compare,
    judge,
    read_pair,
    read_run,
    write_page,
    write_pair,
)
from omninorm.report.pair import describe, names_of
from omninorm.report.reading import find_record

PAGE = "report.html"
TIMINGS_FILE = "timings.json"  # a file in the folder of a comparison


def report(
    run: Annotated[
        Path, typer.Argument(help="Folder of a run or a comparison, or a record.jsonl.", show_default=False)
    ],
    other: Annotated[
        Path | None,
        typer.Argument(help="Second run, to compare with the first.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Output file.", show_default="RUN/report.html; for two runs OTHER/against-RUN.html"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
    live: Annotated[
        bool, typer.Option("--live", help="Keep updating the page until the run ends; Ctrl-C stops.")
    ] = False,
    every: Annotated[float, typer.Option(help="Seconds between two updates with --live.", min=1.0)] = 5.0,
) -> None:
    """Write a run's report: one HTML page with what went wrong, where, and what to try.

    With a second run, write a page that overlays both and names the first step and layer in which they differ. For a
    comparison's folder, write the page of its results; with --out FILE.md, write Markdown with the figures next to it.
    """
    is_comparison = (run / TIMINGS_FILE).exists()
    _check_suffix(out, is_comparison)
    _check_combination(is_comparison, other, as_json, live)
    if is_comparison:
        _comparison(run, out or run / PAGE, as_json)
    elif other is not None:
        _pair(run, other, out, as_json)
    elif live:
        _follow(run, out or _folder(run) / PAGE, every)
    else:
        _one(run, out or _folder(run) / PAGE, as_json)


def _check_suffix(out: Path | None, is_comparison: bool) -> None:
    suffixes = (".html", ".md") if is_comparison else (".html",)
    if out is not None and out.suffix not in suffixes:
        kind = "comparison" if is_comparison else "run"
        remedy = f"write for example --out {shlex.quote(str(out.with_suffix('.html')))}" if out.name else ""
        raise ConfigError(f"The page of a {kind} must end in {' or '.join(suffixes)}", str(out), remedy)


def _check_combination(is_comparison: bool, other: Path | None, as_json: bool, live: bool) -> None:
    if is_comparison and (other is not None or live):
        what = "two folders" if other is not None else "--live"
        raise ConfigError("The report of a comparison takes one folder and not --live", what, "")
    if other is not None and (other / TIMINGS_FILE).exists():
        raise ConfigError("Only two runs can be overlaid", f"the comparison {other}", "pass a run's folder")
    if live and (other is not None or as_json):
        what = "a second run" if other is not None else "--json"
        raise ConfigError("--live follows one run and prints text", what, "leave one of them out")


def _one(run: Path, out: Path, as_json: bool) -> None:
    story = read_run(run)
    verdict = judge(story)
    page = write_page(story, out)
    if as_json:
        typer.echo(json.dumps(_summary(run, story, verdict, page), ensure_ascii=True, indent=2))
    else:
        _show(story, verdict, page)


def _show(story: RunStory, verdict: Verdict, page: Path) -> None:
    screen = console()
    screen.print(harmless(verdict.sentence, one_line=True))
    if verdict.remedy:
        screen.print(harmless(f"What to try: {verdict.remedy}", one_line=True))
    for line in (verdict.more, f"Alarms: {_count(story)}.", *story.notes):
        if line:
            screen.print(harmless(line, one_line=True))
    screen.print(f"Report: {harmless(str(page), one_line=True)}")


def _follow(run: Path, out: Path, every: float) -> None:
    """Write the page whenever the record has grown, until the run ends or Ctrl-C is pressed."""
    record = find_record(run)
    screen = console()
    screen.print(f"Report: {harmless(str(out), one_line=True)} (again every {every:g} seconds; Ctrl-C stops)")
    size = -1
    try:
        while True:
            if (found := record.stat().st_size if record.exists() else 0) != size:
                size = found
                story = read_run(run)
                if story.ending.status != "open":
                    break
                write_page(story, out, refresh=every)
            time.sleep(every)
    except KeyboardInterrupt:
        story = read_run(run)
    # Written without the automatic refresh: an open page loads this one, and then does not reload any more.
    _show(story, judge(story), write_page(story, out))


def _pair(run: Path, other: Path, out: Path | None, as_json: bool) -> None:
    first, second = read_pair(run, other)
    name = f"against-{_folder(run).resolve().name or 'run'}.html"
    found = compare(first, second)
    page = write_pair(first, second, out or _folder(other) / name, found)
    title, sentences = describe(found, names_of(first, second))
    if as_json:
        parts = {"unequal": found.unequal, "curve": found.curve}
        summary = {
            "runs": [str(run), str(other)],
            "page": str(page),
            "sentence": f"{title}.",
            "step": found.step,
            "steps": found.steps,
            **{key: each and json_values(each._asdict()) for key, each in parts.items()},
            "layers": [json_values(each._asdict()) for each in found.layers],
        }
        typer.echo(json.dumps(summary, ensure_ascii=True, indent=2, allow_nan=False))
        return
    screen = console()
    for line in (f"{title}.", *sentences):
        screen.print(harmless(line, one_line=True))
    screen.print(f"Report: {harmless(str(page), one_line=True)}")


def _folder(run: Path) -> Path:
    return run if run.is_dir() else run.parent


def _comparison(folder: Path, out: Path, as_json: bool) -> None:
    from omninorm.report import comparison as pages  # a late import: they need optional packages

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
    return {
        "run": str(run),
        "page": str(page),
        "verdict": {"status": verdict.status, "sentence": verdict.sentence, "remedy": verdict.remedy},
        "alarms": [asdict(alarm) for alarm in story.alarms],
        "steps": story.last_step,
        "samples": story.samples,
        "notes": list(story.notes),
    }
