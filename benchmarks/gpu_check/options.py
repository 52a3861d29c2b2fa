"""The options of the command, for all of its processes."""

from __future__ import annotations

import argparse

from gpu_check.sizes import FULL, QUICK, TINY, Sizes

BROKEN = 75  # exit code of a worker whose device no longer works; a new process continues
NO_DEVICE = 2


def sizes_of(options: argparse.Namespace) -> Sizes:
    if options.device != "cuda":
        return TINY
    return QUICK if options.quick else FULL


def chosen_parts(options: argparse.Namespace) -> list[str]:
    return [name for name in sizes_of(options).budgets if options.parts is None or name in options.parts]


def arguments(options: argparse.Namespace) -> list[str]:
    """Return the options as they are typed on the command line."""
    return [
        "--device", options.device, "--json", str(options.json),
        *(["--quick"] if options.quick else []),
        *(["--parts", ",".join(options.parts)] if options.parts else []),
        *(["--peers", str(options.peers)] if options.peers else []),
    ]  # fmt: skip
