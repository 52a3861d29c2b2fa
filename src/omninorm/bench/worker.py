"""The process that measures one group of jobs. It reports events as JSON on stdout, one per line."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

import torch

from omninorm.bench import cases, memory, models
from omninorm.bench.buffers import Buffers, last_level_cache_bytes
from omninorm.bench.config import DTYPES, BenchConfig
from omninorm.bench.peers import Unavailable
from omninorm.bench.plan import KEPT, Group, Job
from omninorm.timing import OURS, report_samples, time_case

Tell = Callable[[dict[str, Any]], None]


def main() -> None:
    """Read the settings and the group from stdin and run the jobs."""
    request = json.load(sys.stdin)
    jobs = tuple(Job(*job) for job in request["jobs"])
    run(
        BenchConfig.from_dict(request["config"]), Group(request["threads"], request["allocator"], jobs), _claim_stdout()
    )


def _claim_stdout() -> Tell:
    """Return a function that writes to the real stdout; output of libraries is redirected to stderr."""
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def tell(event: dict[str, Any]) -> None:
        print(json.dumps(event), file=stream, flush=True)

    return tell


def run(config: BenchConfig, group: Group, tell: Tell) -> None:
    """Run the jobs of a group in order, with a "started" event before each job and its outcome after it."""
    torch.manual_seed(0)
    torch.set_num_threads(group.threads)
    cache = last_level_cache_bytes()
    buffers: Buffers | None = None
    for job in group.jobs:
        tell({"event": "started", "what": job.title})

        def skip(what: str, why: str, job: Job = job) -> None:
            tell({"event": "skipped", "what": f"{job.title}: {what}" if what else job.title, "why": why})

        try:
            if job.case.startswith(KEPT):
                _kept(job, tell)
            elif job.case in models.MODELS:
                buffers = None
                _model(config, group, job, cache, tell)
            else:
                if buffers is None or (buffers.rows, buffers.width, buffers.dtype) != (*job[2:], DTYPES[job.dtype]):
                    buffers = None  # free the old buffers before new ones are allocated
                    buffers = Buffers(job.rows, job.width, DTYPES[job.dtype], cache)
                _operator(config, group, job, cases.Context(buffers, group.threads, skip), tell)
        except Unavailable as reason:
            skip("", str(reason))


def _operator(config: BenchConfig, group: Group, job: Job, context: cases.Context, tell: Tell) -> None:
    case = cases.CASES[job.case](context)
    cases.check_agreement(case)
    tell(_measured(group, job, report_samples(case, time_case(case, config.seconds))))


def _kept(job: Job, tell: Tell) -> None:
    norm = job.case.removeprefix(KEPT)
    found = memory.kept_per_row(norm, job.rows, job.width, DTYPES[job.dtype])
    tell({"event": "kept", "norm": norm, "dtype": job.dtype, "rows": job.rows, "width": job.width, "bytes": found})


def _model(config: BenchConfig, group: Group, job: Job, cache: int, tell: Tell) -> None:
    build = models.MODELS[job.case][0]
    models.check_patience(job.case, job.dtype, config.patience)
    case = build(DTYPES[job.dtype])
    seconds = min(30.0, config.patience)
    report = report_samples(case, time_case(case, seconds, min_rounds=models.ROUNDS, warm_up=1))
    if job.case == models.THINKER_TRAINING:
        report["norm_share"] = _norm_shares(config, group, job, cache, report)
    tell(_measured(group, job, report))


def _norm_shares(config: BenchConfig, group: Group, job: Job, cache: int, report: dict[str, Any]) -> dict[str, float]:
    """Return for each variant the number of norms times the time of one norm, over the time of a step."""
    buffers = Buffers(job.rows, job.width, DTYPES[job.dtype], cache)
    case = cases.rms_both(cases.Context(buffers, group.threads, lambda what, why: None))
    alone = report_samples(case, time_case(case, config.seconds))["contestants"]
    steps = report["contestants"]
    return {
        name: models.THINKER_NORMS * alone[name]["ns"]["median"] / steps[name]["ns"]["median"]
        for name in (OURS, "torch.nn", "torch.nn.LayerNorm")
    }


def _measured(group: Group, job: Job, report: dict[str, Any]) -> dict[str, Any]:
    place = {"dtype": job.dtype, "rows": job.rows, "width": job.width}
    return {"event": "measured", **report, **place, "threads": group.threads, "allocator": group.allocator}
