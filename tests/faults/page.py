"""The page of the scoreboard, docs/faults.md, written from the results."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from faults.architectures import ARCHITECTURES, CALIBRATION, HELD_OUT
from faults.faults import load_faults
from faults.score import Health, Line, Verdict, detector_recall, health, healthy_runs, outlier_recall, score, verdicts

HEAD = """# How many faults the monitor finds

This page measures [the monitor](watching.md): how many training faults it detects, how often it names the
right cause and layer, how soon, and how often it warns about a healthy run. `make faults` generates it
from `docs/faults/`. The results may be older than the newest rules: the [log](log.md) states what has
changed since.

`tests/faults/` injects {kinds} kinds of faults into {architectures} architectures, and trains each model
without a fault as well: its healthy twin, with the same seed and the same batches. The models are small
(64 to 256 wide, 80 steps, `every=10`) and train on real text, or on images with a pattern. Half of the
architectures and seeds are for calibration. The other half is held out: no rule's threshold may be
chosen by looking at it.

How to read the columns:

- **faulty runs**: runs whose losses or weights differ measurably from those of their healthy twins. The
  others are [listed at the end](#without-a-measurable-effect) and not counted.
- **detected**: runs with an alarm, after the fault has begun, that the healthy twin does not raise.
- **cause**: runs whose leading alarm names the cause. The leading alarm is the first fail, or the first
  warning if there is no fail. A generic alarm, such as a loss spike, names a cause only if the data are at
  fault.
- **cause in any alarm**: runs with an alarm that names the cause, leading or not.
- **layer**: of the runs with a fault in one layer and an alarm that names the cause, those in which such an
  alarm names the right module, a part of it, or the block around it.
- **within 20 steps**: detected in 20 steps or less. Only faults that are visible in the first step in which
  they act are counted.
- **median steps**: from the beginning of the fault to the first alarm; −1 means before the first step.
"""


WHY_MISSED = """
Shuffled labels and random inputs leave little trace in the loss of 80 steps. They hold the loss near the entropy of
the labels' frequencies, 3.04 nats per byte for this text. Healthy models pass it slowly: with AdamW the
mean of ten losses falls below it at steps 20 to 36, and 0.2 nats below it at steps 28 to 45; with SGD a
Thinker and a Llama fell below it at steps 46 and 68, and not yet 0.2 nats below it by step 80. In
language models `label-order` compares the labels with the tokens of the input instead. In other models
only a longer run could tell a broken data set from slow learning, and no rule tries yet."""


def text_of(lines: Sequence[Line], before: Sequence[Line] = ()) -> str:
    """Return the page's text; `before` are the results of an earlier version of the monitor."""
    return "\n".join(page(lines, before)).rstrip() + "\n"


def page(lines: Sequence[Line], before: Sequence[Line] = ()) -> Iterator[str]:
    """Yield the page's lines."""
    found = verdicts(lines)
    yield HEAD.format(kinds=len(load_faults()), architectures=len(ARCHITECTURES))
    yield "## Scores\n"
    yield from _scores(found, lines)
    if before:
        yield "\nThe same for the rules before their first revision, on a sample of the calibration half:\n"
        yield from _scores(verdicts(before), before)
    yield "\n## Other detectors on the same runs\n"
    yield from _baselines(found, lines)
    yield "\n## Healthy runs\n"
    yield "Alarms in runs without a fault. A variant of the training is in parentheses.\n"
    yield from _healthy(lines)
    yield "\n## By fault\n"
    yield "A dash means that the fault had no run to count.\n"
    yield from _by_fault(found)
    yield "\n## By architecture\n"
    yield from _by_architecture(found, lines)
    yield "\n## Misses\n"
    yield from _misses(found)
    yield "\n## Without a measurable effect\n"
    yield from _without_effect(found)
    yield from _errors(lines)


def share(count: tuple[int, int]) -> str:
    """Format a count: "12/15 (80 %)"."""
    return f"{count[0]}/{count[1]} ({100 * count[0] / count[1]:.0f} %)" if count[1] else "–"


def row(*cells: object) -> str:
    """Return a row of a table."""
    return f"| {' | '.join(map(str, cells))} |"


def number(value: float | None) -> str:
    """Format a number, or a dash if there is none."""
    return "–" if value is None else f"{value:g}"


def _halves(lines: Sequence[Any], split_of: Callable[[Any], str]) -> list[tuple[str, list[Any]]]:
    return [(split, [line for line in lines if split_of(line) == split]) for split in (CALIBRATION, HELD_OUT)]


def _scores(found: Sequence[Verdict], lines: Sequence[Line]) -> Iterator[str]:
    yield "| | faulty runs | detected | cause | cause in any alarm | layer | within 20 steps | median steps |"
    yield "|---|---|---|---|---|---|---|---|"
    for split, part in _halves(found, lambda v: v.line["split"]):
        if not part:
            continue
        s = score(part)
        shares = [share(count) for count in (s.recall, s.cause, s.named, s.layer, s.soon)]
        yield row(split, s.recall[1], *shares, number(s.median))
    yield "\n| | healthy runs | with a fail | with a warning only |\n|---|---|---|---|"
    for split, part in _halves(lines, lambda line: line["split"]):
        h = health(part)
        if not h.runs:
            continue
        yield f"| {split} | {h.runs} | {share((h.fails, h.runs))} | {share((h.warnings, h.runs))} |"


def _baselines(found: Sequence[Verdict], lines: Sequence[Line]) -> Iterator[str]:
    healthy = healthy_runs(lines)
    outliers = sum(line["outlier"] is not None for line in healthy)
    finite = [v for v in found if "nonfinite" in v.fault.causes]
    ours = score(finite).recall
    yield "| detector | faulty runs detected | healthy runs with an alarm |\n|---|---|---|"
    alarmed = health(lines).fails + health(lines).warnings
    yield row("omninorm", share(score(found).recall), share((alarmed, len(healthy))))
    simple = "the loss is NaN or 6 standard deviations above its last 128 steps"
    yield row(simple, share(outlier_recall(found)), share((outliers, len(healthy))))
    yield "\nOnly the faults that produce NaNs or infinities:\n"
    yield "| detector | faulty runs detected |\n|---|---|"
    yield f"| omninorm | {share(ours)} |"
    yield f"| `torch.autograd.detect_anomaly` | {share(detector_recall(found, 'anomaly'))} |"
    yield f"| transformers' `DebugUnderflowOverflow` | {share(detector_recall(found, 'underflow'))} |"


def _healthy(lines: Sequence[Line]) -> Iterator[str]:
    yield "| half | severity | rule | runs | architectures |\n|---|---|---|---|---|"
    for split, part in _halves(lines, lambda line: line["split"]):
        found: Health = health(part)
        for (severity, rule), count in found.rules.most_common():
            names = Counter(
                line["architecture"] + ("" if line["variant"] == "plain" else f" ({line['variant']})")
                for line in healthy_runs(part)
                if any(a[1] == severity and a[2] == rule for a in line["alarms"])
            )
            yield f"| {split} | {severity} | `{rule}` | {count} | {_some(names)} |"


def _some(names: Counter[str]) -> str:
    """Return at most eight names, with the number of runs where there are several."""
    texts = [name if count == 1 else f"{name} × {count}" for name, count in names.most_common(8)]
    return ", ".join(texts) + (", …" if len(names) > 8 else "")


def _by_fault(found: Sequence[Verdict]) -> Iterator[str]:
    groups: dict[str, list[Verdict]] = defaultdict(list)
    for verdict in found:
        groups[verdict.fault.name].append(verdict)
    yield "| family | fault | detected | cause | layer | median steps | rules that name the cause |"
    yield "|---|---|---|---|---|---|---|"
    for name, fault in load_faults().items():
        if name in groups:
            s = score(groups[name])
            causes = ", ".join(f"`{rule}`" for rule in sorted(fault.causes))
            shares = [share(count) for count in (s.recall, s.cause, s.layer)]
            yield row(fault.family, f"{name}: {fault.description}", *shares, number(s.median), causes)


def _by_architecture(found: Sequence[Verdict], lines: Sequence[Line]) -> Iterator[str]:
    yield "| half | architecture | detected | cause | layer | healthy runs | with a fail | with a warning only |"
    yield "|---|---|---|---|---|---|---|---|"
    for split in (CALIBRATION, HELD_OUT):
        for name in (a.name for a in ARCHITECTURES.values() if a.split == split):
            s = score([v for v in found if v.line["architecture"] == name])
            h = health([line for line in lines if line["architecture"] == name])
            shares = [share(count) for count in (s.recall, s.cause, s.layer)]
            yield row(split, name, *shares, h.runs, h.fails, h.warnings)


def _misses(found: Sequence[Verdict]) -> Iterator[str]:
    yield "Faulty runs without an alarm, by architecture, and runs whose leading alarm names another cause, by rule.\n"
    yield "| fault | half | no alarm | another cause |\n|---|---|---|---|"
    rows: dict[tuple[str, str], list[Verdict]] = defaultdict(list)
    for verdict in found:
        if verdict.effect and not verdict.cause:
            rows[verdict.fault.name, verdict.line["split"]].append(verdict)
    for (name, split), missed in sorted(rows.items(), key=lambda item: -len(item[1])):
        silent = Counter(v.line["architecture"] for v in missed if not v.detected)
        wrong = Counter(f"`{v.leading}`" for v in missed if v.detected)
        yield f"| {name} | {split} | {_some(silent) or '–'} | {_some(wrong) or '–'} |"
    yield WHY_MISSED


def _without_effect(found: Sequence[Verdict]) -> Iterator[str]:
    groups = Counter(v.fault.name for v in found if not v.effect)
    yield "These runs are not counted above. Compared with their healthy twins, the loss differs by less than 1 %, the"
    yield "final weights by less than 10 % of the distance that they moved in training, and every tensor moved as"
    yield "far as the twin's within 50 %.\n"
    yield "| fault | runs |\n|---|---|"
    for name, count in groups.most_common():
        yield f"| {name} | {count} |"


def _errors(lines: Sequence[Line]) -> Iterator[str]:
    errors = Counter((line["fault"] or "healthy", line["error"]) for line in lines if line.get("error"))
    if errors:
        yield "\n## Runs that ended with an error\n\n| fault | error | runs |\n|---|---|---|"
        for (name, error), count in errors.most_common():
            yield f"| {name} | {error.splitlines()[0].replace('|', '/')} | {count} |"
