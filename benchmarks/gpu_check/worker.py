"""The process that measures: it runs the items of every part that are not in the results yet."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
import traceback
import warnings
from typing import Any

from gpu_check import place
from gpu_check.items import Item, sentences
from gpu_check.options import BROKEN, NO_DEVICE, chosen_parts, sizes_of
from gpu_check.results import Results
from gpu_check.sizes import Sizes

# The share of a part's time that is reserved for measuring when it waits for compilers.
_MEASURING = {"numerics": 0.4, "speed": 0.6}


def work(options: argparse.Namespace) -> int:
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        print("PyTorch sees no GPU here. For a dry run without one, pass --device simgpu.", file=sys.stderr)
        return NO_DEVICE
    place.prepare(options.device)
    peers = importlib.import_module("gpu_check.peers")
    results, sizes = Results(options.json), sizes_of(options)
    results.data["machine"] = {**place.describe(options.device), "peers": peers.load(options.peers)}
    results.save()
    warmers = importlib.import_module("gpu_check.warming").Warmers(options)
    with warmers:
        for name, deadline in _deadlines(options, sizes, results):
            _prepare(name, deadline - _MEASURING.get(name, 0.0) * sizes.budgets[name], warmers)
            _run_part(name, deadline, options, sizes, results)
    return 0


def _prepare(name: str, until: float, warmers: Any) -> None:
    """Wait for the compilers of a part; end them before anything is timed."""
    if name == "numerics":
        state = warmers.wait(name, until)
    else:
        state = "; ".join(filter(None, (warmers.wait(each, until) for each in ("training", "speed"))))
        warmers.end()
    if state:
        print(f"{name}: {state}", flush=True)


def _deadlines(options: argparse.Namespace, sizes: Sizes, results: Results) -> list[tuple[str, float]]:
    """Return the parts to run and the time at which each must end. The next part may use the time that one leaves."""
    left = [name for name in chosen_parts(options) if results.part(name)["status"] != "done"]
    found, deadline = [], options.worker
    for name in reversed(left):
        found.append((name, deadline))
        deadline -= sizes.budgets[name]
    return found[::-1]


def _run_part(name: str, deadline: float, options: argparse.Namespace, sizes: Sizes, results: Results) -> None:
    print(f"{name}, until {time.strftime('%H:%M:%S', time.localtime(deadline))}", flush=True)
    items = importlib.import_module(f"gpu_check.{name}").items(options.device, sizes, options)
    for item in items:
        if item.key in results.part(name)["items"]:
            continue
        if time.time() > deadline:
            results.finish(name, "out of time")
            return
        # Without a GPU the machine may be slow, and its time is not limited to minutes.
        limit = min(item.limit * (1 if options.device == "cuda" else 4), deadline + 10 - time.time())
        results.start(name, item.key, limit)
        value = _attempt(item)
        results.record(name, item.key, value)
        print(f"  {item.key}: {_summary(value)}", flush=True)
        _check_device(options.device)
    results.finish(name, "done")


def _attempt(item: Item) -> dict[str, Any]:
    """Run an item; its warnings count as faults."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            value = item.run()
        if found := sentences(caught):
            value["wrong"] = [*value.get("wrong", []), *found]
        return value
    except Exception as failure:  # it is recorded, and the check continues
        where = traceback.extract_tb(failure.__traceback__)[-1]
        text = " ".join(str(failure).split())[:300]
        return {"error": f"{type(failure).__name__}: {text} ({where.name}, line {where.lineno})"}


def _check_device(device: str) -> None:
    """End this process if the device does not work any more; after some errors, all CUDA calls fail."""
    try:
        place.synchronize(device)
    except Exception as failure:
        print(f"The device no longer works: {str(failure).splitlines()[0]}", file=sys.stderr, flush=True)
        raise SystemExit(BROKEN) from None


def _summary(value: dict[str, Any]) -> str:
    if "error" in value:
        return f"FAILED, {value['error']}"
    if value.get("wrong"):
        return f"WRONG, {'; '.join(value['wrong'])}"
    return str(value.get("summary", "done"))
