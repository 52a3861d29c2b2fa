"""Results of a comparison: each configuration's values over the seeds, and paired comparisons with the first one.

results.json holds nothing that depends on the clock, on the order of the runs, or on the folder's location: the same
plan on the same machine gives the same file. timings.json holds everything that depends on the clock.
"""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from omninorm.experiments.compare.cells import Cell
from omninorm.experiments.compare.claims import CLAIMS
from omninorm.experiments.compare.evidence import Evidence, gather
from omninorm.experiments.compare.plan import ComparePlan, Study
from omninorm.experiments.compare.presets import PRESETS
from omninorm.experiments.compare.presets import preset as named
from omninorm.experiments.compare.protocols.common import plain
from omninorm.experiments.compare.statistics import Paired, holm, judge, paired
from omninorm.experiments.compare.store import Store, to_json
from omninorm.experiments.corpus import Corpus
from omninorm.experiments.demo import judge as outcome_of
from omninorm.experiments.evaluate import unigram_bits_per_byte
from omninorm.record.files import write_file, writing

RESULTS_FILE, TIMINGS_FILE, TABLE_FILE = "results.json", "timings.json", "results.csv"
FORMAT = 2
_CURVE_POINTS = 50
# For each protocol: the value of the outcome that is compared, its unit, and whether lower is better.
VALUES = {
    "train": ("score", "bits per byte", True),
    "ramp": ("largest_rate", "largest tolerable learning rate", False),
    "init": ("growth", "ln of the residual stream's growth per block", True),
    "speed": ("operations", "times", False),  # the times are in timings.json
}
LEARNED = "learned"  # the other outcomes of a training run are "stagnated" and "diverged", see experiments.demo
Outcomes = Mapping[int, Mapping[str, Any]]


def collect(plan: ComparePlan, store: Store, corpus: Corpus) -> dict[str, Any]:
    """Return the content of results.json."""
    unigram = unigram_bits_per_byte(corpus.train, corpus.held_out)
    text = {
        "name": corpus.name,
        "sha256": corpus.sha256,
        "bytes": len(corpus.train) + len(corpus.held_out),
        "unigram_bits_per_byte": unigram,
    }
    evidence = gather(plan, store, unigram)
    return {
        "format": FORMAT,
        "plan": plan.model_dump(exclude={"text"}),
        "text": text,
        "studies": [_study(study, plan, store, unigram) for study in plan.studies if study.protocol != "speed"],
        "claims": plain(_cards(plan, evidence, timed=False)),
        "failures": store.failures(),
    }


def collect_timings(plan: ComparePlan, store: Store) -> dict[str, Any]:
    """Return the content of timings.json: the claims about speed, and the times of every run."""
    return {
        "format": FORMAT,
        "claims": plain(_cards(plan, gather(plan, store, 0.0), timed=True)),
        "cells": {cell.id: plain(dict(store.clock(cell))) for cell in plan.cells().values()},
    }


def _cards(plan: ComparePlan, evidence: Evidence, timed: bool) -> list[dict[str, Any]]:
    names = [name for name in plan.claims if CLAIMS[name].timed == timed]
    return [{**CLAIMS[name].judge(evidence).to_dict(), "command": _command(name, plan)} for name in names]


def _command(claim: str, plan: ComparePlan) -> str:
    """Return the command that reproduces a claim."""
    own = {study.name: study for study in plan.studies}
    whole = [Study.model_validate(study) for study in CLAIMS[claim].studies]
    preset = next(
        (name for name in PRESETS if PRESETS[name].get("claims") and named(name).studies == plan.studies), None
    )
    if all(own.get(study.name) == study for study in whole):
        preset = claim
    chosen = "plan.json" if preset is None else f"--preset {preset}"
    model = f" --model {plan.model}" if plan.model and preset else ""
    text = " --text TEXT" if plan.text and preset else ""
    return f"omninorm compare {chosen}{model}{text}"


def write(store: Store, results: Mapping[str, Any], timings: Mapping[str, Any]) -> None:
    """Write results.json, results.csv and timings.json.

    Raises:
        RunError: the folder can't be written.
    """
    with writing(store.path):
        write_file(store.path / RESULTS_FILE, to_json(results))
        write_file(store.path / TABLE_FILE, table(results).encode())
        write_file(store.path / TIMINGS_FILE, to_json(timings))


def table(results: Mapping[str, Any]) -> str:
    """Return a CSV table with one row per configuration and seed."""
    out = io.StringIO()
    lines = csv.writer(out, lineterminator="\n")
    lines.writerow(["study", "protocol", "depth", "configuration", "lr", "seed", "value", "lost", "outcome"])
    for study in results["studies"]:
        for row in study["configurations"]:
            for seed, value in row["values"].items():
                lost = seed in row["lost"]
                head = [study["name"], study["protocol"], row["depth"], row["label"]]
                lines.writerow([*head, row["lr"], seed, value, int(lost), row.get("outcomes", {}).get(seed, "")])
    return out.getvalue()


def _study(study: Study, plan: ComparePlan, store: Store, unigram: float) -> dict[str, Any]:
    rows = [_configuration(study, plan, store, name, depth, unigram) for depth in study.depth for name in _names(study)]
    comparisons = []
    for depth in study.depth:
        at_depth = [row for row in rows if row["depth"] == depth]
        comparisons += _compare(study, at_depth)
    if study.protocol != "init":  # less growth at initialization is not better
        judge_comparisons(study, comparisons, rows)
    what, unit, lower = VALUES[study.protocol]
    head = {"name": study.name, "protocol": study.protocol, "value": what, "unit": unit, "lower_is_better": lower}
    return {**head, "margin": study.margin, "configurations": rows, "comparisons": comparisons}


def _names(study: Study) -> Iterator[dict[str, Any]]:
    """Yield the configurations of a study: its variants without depth and learning rate."""
    seen = []
    for variant in study.variants():
        name = {key: value for key, value in variant.items() if key not in ("depth", "lr")}
        if name not in seen:
            seen.append(name)
            yield name


def _configuration(
    study: Study, plan: ComparePlan, store: Store, name: Mapping[str, Any], depth: int, unigram: float
) -> dict[str, Any]:
    """Summarize a configuration at a depth and its best learning rate, and its sensitivity to the learning rate."""
    by_rate: dict[float | None, Outcomes] = {}
    for variant in study.variants():
        if variant["depth"] == depth and all(variant[key] == value for key, value in name.items()):
            by_rate[variant["lr"]] = dict(_outcomes(study, plan, store, variant))
    values = {rate: _values(study, outcomes) for rate, outcomes in by_rate.items()}
    sign = 1 if VALUES[study.protocol][2] else -1
    best = min(values, key=lambda rate: sign * _mean(values[rate], worst=sign * math.inf))
    row: dict[str, Any] = {
        "label": " ".join(str(value) for value in name.values()),
        "configuration": dict(name),
        "depth": depth,
        "lr": best,
        "values": {str(seed): value for seed, value in values[best].items()},
        "lost": [str(seed) for seed, outcome in by_rate[best].items() if _is_lost(study, outcome)],
        "missing": study.seeds - len(values[best]),
    }
    row.update(_drawn(study, by_rate[best]))
    if study.protocol == "train":
        row["outcomes"] = {str(seed): _outcome(outcome, unigram) for seed, outcome in by_rate[best].items()}
        row["spike_score"] = _mean_of([outcome["spike_score"] for outcome in by_rate[best].values()])
    if len(values) > 1 and study.protocol == "train":
        means = [_mean(each, worst=8.0) for each in values.values()]
        row["sensitivity"] = statistics.fmean(means) - min(means)
        row["by_rate"] = [[rate, mean] for rate, mean in zip(values, means, strict=True)]
    return row


def _drawn(study: Study, outcomes: Outcomes) -> dict[str, Any]:
    """Return the data of the figures, means over the seeds: the loss by step, or stream and gradient by block."""
    if study.protocol == "init":
        names = ("stream_rms", "grad_norms")
        return {name: _means([outcome[name] for outcome in outcomes.values()]) for name in names}
    losses = [outcome["losses"] for outcome in outcomes.values()]
    steps = max((len(each) for each in losses), default=0)
    every = max(1, math.ceil(steps / _CURVE_POINTS))
    ends = range(every, steps + 1, every)
    # The mean at a step is over the runs that reached it.
    smooth = [_means([[_mean_of(each[end - every : end])] for each in losses if len(each) >= end]) for end in ends]
    return {"curve": [[end, value[0]] for end, value in zip(ends, smooth, strict=True) if value]}


def _means(series: Sequence[Sequence[float | None]]) -> list[float | None]:
    return [plain(_mean_of(each)) for each in zip(*series, strict=False)]


def _mean_of(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if len(known) == len(values) and known else None


def _outcomes(
    study: Study, plan: ComparePlan, store: Store, variant: Mapping[str, Any]
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for seed in range(study.seeds):
        cell: Cell = study.cell(variant, seed, plan.text, plan.model)
        outcome = store.outcome(cell)
        if outcome is not None:
            yield seed, outcome


def _values(study: Study, outcomes: Outcomes) -> dict[int, float | None]:
    return {seed: outcome[VALUES[study.protocol][0]] for seed, outcome in outcomes.items()}


def _is_lost(study: Study, outcome: Mapping[str, Any]) -> bool:
    """Return whether a training run or a ramp diverged."""
    return outcome.get("status") == "diverged" or outcome.get("sign") is not None


def _outcome(outcome: Mapping[str, Any], unigram: float) -> str:
    """Return "learned", "stagnated" or "diverged", by the definition that `omninorm demo` uses."""
    bits = outcome["bits_per_byte"]
    return outcome_of(outcome["status"], math.inf if bits is None else bits, unigram)


def _mean(values: Mapping[int, float | None], worst: float) -> float:
    known = [worst if value is None else value for value in values.values()]
    return statistics.fmean(known) if known else worst


def _compare(study: Study, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Compare every other configuration with the first."""
    baseline, *others = rows
    return [
        {
            "depth": row["depth"],
            "label": row["label"],
            "against": baseline["label"],
            **_difference(study, row["values"], baseline["values"]),
        }
        for row in others
    ]


def _difference(study: Study, ours: Mapping[str, Any], baseline: Mapping[str, Any]) -> dict[str, Any]:
    shared = [seed for seed in ours if ours[seed] is not None and baseline.get(seed) is not None]
    scale = math.log if study.protocol == "ramp" else float
    pairs = [(scale(ours[s]), scale(baseline[s])) for s in shared if study.protocol != "ramp" or ours[s] * baseline[s]]
    if not pairs:
        return {"seeds": 0, "mean": None, "low": None, "high": None, "p": 1.0, "spread": None}
    found = paired(*zip(*pairs, strict=True))
    ends = [None if not math.isfinite(end) else end for end in (found.low, found.high, found.spread)]
    return dict(zip(("low", "high", "spread"), ends, strict=True)) | {
        "seeds": found.seeds,
        "mean": found.mean,
        "p": found.p,
    }


def judge_comparisons(study: Study, comparisons: list[dict[str, Any]], rows: Sequence[Mapping[str, Any]]) -> None:
    """Add the verdicts of a study's comparisons; Holm's procedure treats them as one family."""
    lower = VALUES[study.protocol][2]
    known_rows = {(row["depth"], row["label"]): row for row in rows}
    corrected = holm([each["p"] for each in comparisons])
    for each, p in zip(comparisons, corrected, strict=True):
        each["p_holm"] = p
        if each["seeds"] < 2:
            known = Paired(math.nan, -math.inf, math.inf, 1.0, math.nan, each["seeds"])
        else:
            known = Paired(*(each[name] for name in ("mean", "low", "high", "p", "spread", "seeds")))
        ours, baseline = (known_rows[each["depth"], each[name]] for name in ("label", "against"))
        each["verdict"] = judge(known, p, study.margin, lower, _learned(ours, baseline))


def _learned(ours: Mapping[str, Any], baseline: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return how many runs of each side learned, for the seeds that both have; None for protocols but "train"."""
    if "outcomes" not in ours:
        return None
    shared = ours["outcomes"].keys() & baseline["outcomes"].keys()
    ours_learned, theirs = (sum(row["outcomes"][seed] == LEARNED for seed in shared) for row in (ours, baseline))
    return ours_learned, theirs
