"""read_run: read a run's record into a RunStory (two seconds for ten thousand samples of 48 blocks)."""

from __future__ import annotations

import json
import re
import statistics
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omninorm.errors import RunError
from omninorm.record import RECORD_FILE
from omninorm.record.alarm import link
from omninorm.record.signals import SIGNALS
from omninorm.report.scan import Scan
from omninorm.report.story import Bad, Column, RunStory, Series, StoryAlarm, Watched
from omninorm.report.text import plural
from omninorm.report.values import DamageError, mapping, numbers, text, text_or_none

MAX_COLUMNS = 500
"""Roughly the width of a heat map in pixels."""
# At two bytes each in base64 this is 2.5 MB, of a page that may have 3 MB.
MAX_NUMBERS = 940_000
_RANK = re.compile(r"record-rank(\d{1,6})\.jsonl")
_REMEDY = "pass the folder of a run that omninorm.watch or omninorm train wrote"


def read_run(path: str | Path, like: RunStory | None = None) -> RunStory:
    """Read a run's folder, or its record.jsonl.

    At most 500 samples are parsed: evenly spaced ones, and those at the steps of alarms and non-finite values. Damaged
    lines are skipped and counted in `notes`; damage inside a sample that is not parsed goes unnoticed unless it is at
    its beginning or end.

    Args:
        path: the folder or the record.
        like: another run; if both have samples at the same steps, only those are read.

    Raises:
        RunError: there is no record, it holds no event, or a newer omninorm wrote it.
    """
    file = find_record(path)
    scan = Scan(file)
    if not scan.events:
        problem = f"The record {file} has no events" if scan.hopeful else f"{file} is not a record of omninorm"
        raise RunError(problem, "", _REMEDY)
    ranks = [Scan(other, rank) for rank, other in _other_ranks(file, scan.watched)]
    alarms, bad = _merge([scan, *ranks])
    steps = sorted(scan.samples)
    shared = {column.step for column in like.columns} if like else set()
    events = [*(alarm.step for alarm in alarms), *(each.step for each in bad)]
    columns, worst, lost = _read_columns(scan, [step for step in steps if step in shared] or steps, events)
    known = scan.watched or (Watched() if columns or scan.seen else None)
    known = _fill_names(known, columns) if known else None
    columns, misfits = _fit(columns, known) if known else (columns, [])
    config, trouble = _read_config(file.parent)
    return RunStory(
        source=Path(path),
        watched=known,
        placement=text_or_none(scan.seen.get("placement")),
        placement_reason=text_or_none(scan.seen.get("placement_reason")) or "",
        padding=text_or_none(scan.seen.get("padding")),
        dtype=text_or_none(scan.seen.get("dtype")),
        not_seen={name: text(reason) for name, reason in mapping(scan.seen.get("not_seen")).items()},
        series={name: _series(values) for name, values in scan.series.items()},
        evals=_series(scan.evals),
        evaluations={name: _series(values) for name, values in scan.evaluations.items()},
        columns=columns,
        samples=len(steps) - lost,
        worst=worst,
        alarms=alarms,
        bad=bad,
        ending=scan.ending,
        tokens_per_second=statistics.median(scan.speeds) if scan.speeds else None,
        config=config,
        notes=[*_notes([scan, *ranks], lost), *misfits, *trouble],
    )


def find_record(path: str | Path) -> Path:
    """Return the record of a folder, or the file itself; raise RunError if there is none."""
    given = Path(path)
    # System calls raise ValueError for "\0" in a path.
    if "\0" in str(given) or not given.exists():
        raise RunError(f"No such file or folder: {str(given)!r}", "", _REMEDY)
    record = given / RECORD_FILE if given.is_dir() else given
    if not record.is_file():
        raise RunError(f"There is no {RECORD_FILE} in {given}", "", _REMEDY)
    return record


def _other_ranks(record: Path, watched: Watched | None) -> list[tuple[int, Path]]:
    """Return the records of the other processes, without those that an earlier run with more of them has left."""
    if record.name != RECORD_FILE:
        return []
    found = [(_RANK.fullmatch(each.name), each) for each in record.parent.iterdir()]
    ranks = sorted((int(match[1]), each) for match, each in found if match)
    return [(rank, each) for rank, each in ranks if watched is None or rank < watched.world_size]


def _merge(scans: Sequence[Scan]) -> tuple[list[StoryAlarm], list[Bad]]:
    """Return alarms by step, with equal alarms of several ranks merged, and the first non-finite values."""
    alarms: dict[tuple[int, str, str, str | None], StoryAlarm] = {}
    for scan in scans:
        for alarm in link(scan.alarms):
            key = (alarm.step, alarm.severity, alarm.rule, alarm.layer)
            earlier = alarms.get(key)
            ranks = (*earlier.ranks, scan.rank) if earlier and scan.rank not in earlier.ranks else None
            alarms[key] = replace(earlier, ranks=ranks) if earlier and ranks else earlier or alarm
    bad = sorted((scan.bad for scan in scans if scan.bad), key=lambda each: each.step)
    return sorted(alarms.values(), key=lambda alarm: alarm.step), bad


def _series(values: dict[int, float]) -> Series:
    steps = sorted(values)
    return Series(steps, [values[step] for step in steps])


def _read_columns(scan: Scan, steps: list[int], events: list[int]) -> tuple[list[Column], dict[str, Any], int]:
    """Return the chosen samples, the worst tensors of the latest one, and the number of damaged samples."""
    columns: list[Column] = []
    worst: dict[str, Any] = {}
    lost = 0
    with open(scan.path, "rb") as file:
        size = next(filter(None, (_size(scan, file, step) for step in reversed(steps))), 1)
        limit = max(8, min(MAX_COLUMNS, MAX_NUMBERS // size))
        for step in choose(steps, events, limit):
            try:
                event = scan.sample(file, step)
                columns.append(Column(step, _signals(event), _bounds(event)))
                worst = {name: value for name, value in mapping(event.get("worst")).items() if isinstance(value, list)}
            except DamageError:
                lost += 1
    return columns, worst, lost


def _size(scan: Scan, file: Any, step: int) -> int:
    """Return how many numbers a sample has when its lists are as long as their axes; 0 if it is damaged."""
    known = scan.watched or Watched()
    try:
        signals = _signals(scan.sample(file, step))
    except DamageError:
        return 0
    return sum(max(len(values), len(known.names(SIGNALS[name].axis))) for name, values in signals.items())


def _signals(event: dict[str, Any]) -> dict[str, list[float | None]]:
    """Return the known signals of an event "sample"; signals of later versions are ignored."""
    return {name: numbers(values) for name, values in mapping(event.get("signals")).items() if name in SIGNALS}


def _bounds(event: dict[str, Any]) -> dict[str, list[float | None]]:
    """Return the moving limits of an event "sample": pairs of a lowest and a highest ordinary value."""
    pairs = {name: numbers(values) for name, values in mapping(event.get("bounds")).items() if isinstance(values, list)}
    return {name: values for name, values in pairs.items() if len(values) == 2}


def choose(steps: Sequence[int], events: Iterable[int], limit: int) -> list[int]:
    """Choose at most `limit` of the ascending `steps`: the first, the last, those at or right after an event, and
    evenly spaced ones. If there are too many events, they are thinned as well."""
    if len(steps) <= limit:
        return list(steps)
    places = sorted({place for event in events if (place := bisect_left(steps, event)) < len(steps)})
    room = limit // 2
    forced = {places[i * len(places) // room] for i in range(room)} if len(places) > room else set(places)
    stride = -(-len(steps) // (limit - len(forced) - 1))
    return [steps[place] for place in sorted({0, *forced, *range(len(steps) - 1, -1, -stride)})]


def _fill_names(known: Watched, columns: Sequence[Column]) -> Watched:
    """Make up names for an axis without names, as when the record's first line was lost."""
    missing: dict[str, list[str]] = {}
    for axis in ("block", "group"):
        if columns and not known.names(axis):
            lengths = [len(values) for name, values in columns[-1].signals.items() if SIGNALS[name].axis == axis]
            missing[f"{axis}s"] = [f"{axis} {number}" for number in range(max(lengths, default=0))]
    return replace(known, **missing)  # type: ignore[arg-type]


def _fit(columns: Sequence[Column], known: Watched) -> tuple[list[Column], list[str]]:
    """Return the samples with every list as long as its axis, and a note if one was not."""
    lengths = {name: len(known.names(signal.axis)) for name, signal in SIGNALS.items()}
    wrong = 0
    fitted = []
    for column in columns:
        wrong += sum(len(values) != lengths[name] for name, values in column.signals.items())
        signals = {name: _stretch(values, lengths[name]) for name, values in column.signals.items()}
        fitted.append(column._replace(signals=signals))
    note = f"{plural(wrong, 'list')} in the samples did not have one value per layer; truncated or padded."
    return fitted, [note] if wrong else []


def _stretch(values: list[float | None], length: int) -> list[float | None]:
    return values if len(values) == length else [*values[:length], *[None] * (length - len(values))]


def _read_config(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Read the config.json of `omninorm train`; another file of that name is ignored."""
    path = folder / "config.json"
    if not path.is_file():
        return {}, []
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}, ["config.json could not be read, so the run's settings are not shown."]
    return (config, []) if isinstance(config, dict) else ({}, [])


def _notes(scans: Sequence[Scan], lost: int) -> list[str]:
    notes = []
    for scan in scans:
        damaged = scan.damaged + (lost if scan is scans[0] else 0)
        if damaged:
            notes.append(f"Skipped {plural(damaged, 'damaged line')} of {scan.path.name}.")
    for step, last in scans[0].replaced:
        which = f"of {plural(last, 'step')}" if step == 0 else f"beyond step {step:,}"
        notes.append(f"An earlier run {which} in this record is not shown.")
    if len(scans) > 1:
        names = ", ".join(str(scan.rank) for scan in scans[1:])
        notes.append(f"Curves and maps show rank 0; alarms are from all ranks (also read: {names}).")
    return notes
