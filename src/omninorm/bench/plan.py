"""The jobs of the benchmark, grouped by process, because threads and allocator are settings of a whole process."""

from __future__ import annotations

from typing import NamedTuple

from omninorm.bench import cases, memory, models
from omninorm.bench.config import BenchConfig

KEPT = "kept for backward: "
_ONE_ROW_WIDTH = 2048
_COMPARED = (cases.RMS_FORWARD, cases.RMS_BACKWARD, cases.ADD_RMS_FORWARD, cases.RMS_BOTH, cases.LAYER_BOTH)


class Job(NamedTuple):
    """One case at one size."""

    case: str
    dtype: str
    rows: int
    width: int

    @property
    def title(self) -> str:
        return f"{self.case}, {self.dtype}, {self.rows} × {self.width}"


class Group(NamedTuple):
    """The jobs of one process. Its `allocator` is "raised" or "default", see `omninorm.bench.process`."""

    threads: int
    allocator: str
    jobs: tuple[Job, ...]


def plan(config: BenchConfig) -> list[Group]:
    """Return all groups, the most important ones first."""
    first, *others = config.threads
    most, widest = max(config.rows), max(config.widths)
    groups = [Group(first, "raised", (*_everything(config), *_kept(config)))]
    groups += [Group(n, "raised", tuple(_sweep(config, (most,)))) for n in others]
    halves = [name for name in config.dtypes if name != "fp16"]
    compared = (cases.RMS_FORWARD, cases.RMS_BOTH)
    groups.append(Group(first, "default", tuple(Job(c, d, most, widest) for d in halves for c in compared)))
    if config.models:
        groups.append(Group(max(config.threads), "raised", tuple(_models(config))))
    return [group for group in groups if group.jobs]


def _everything(config: BenchConfig) -> list[Job]:
    jobs = _sweep(config, config.rows)
    full = [name for name in config.dtypes if name != "fp16"]
    if config.compile:
        # Compiling takes seconds per shape, so only the narrowest and the widest are measured.
        rows, widths = max(config.rows), sorted({min(config.widths), max(config.widths)})
        jobs += [Job(cases.RMS_COMPILED, dtype, rows, width) for width in widths for dtype in full]
    return jobs + [Job(cases.ONE_ROW, dtype, 1, _ONE_ROW_WIDTH) for dtype in full]


def _sweep(config: BenchConfig, rows: tuple[int, ...]) -> list[Job]:
    """Return the jobs, ordered by size, because jobs of the same size share their inputs."""
    return [
        Job(case, dtype, count, width)
        for dtype in config.dtypes
        for count in rows
        for width in config.widths
        for case in (_COMPARED if dtype != "fp16" else (cases.RMS_FORWARD,))
    ]


def _kept(config: BenchConfig) -> list[Job]:
    size = (min(config.rows), min(config.widths))
    norms = (memory.RMS_KEPT, memory.LAYER_KEPT)
    return [Job(KEPT + norm, dtype, *size) for dtype in config.dtypes for norm in norms]


def _models(config: BenchConfig) -> list[Job]:
    return [
        Job(name, dtype, rows, width)
        for name, (_, dtypes, rows, width, _) in models.MODELS.items()
        for dtype in dtypes
        if dtype in config.dtypes
    ]
