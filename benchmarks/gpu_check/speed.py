"""Measures the speed of the norms: the bytes that must be moved, in GB/s, and the speed of copying in the same rounds.

On a GPU the calls are captured in a CUDA graph. Its replays exclude the host's time, which is measured separately.
Inputs and outputs rotate through more memory than the caches hold. In each round the contestants run in random order;
the ratios to the best peer are medians over the rounds.
"""

from __future__ import annotations

import contextlib
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import omninorm
from gpu_check import place
from gpu_check.items import Item
from gpu_check.peers import EPS, KINDS, Contestant, contestants
from gpu_check.sizes import Sizes

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
COPY = "copy"
# More than twice the second-level cache of an H100, which has 50 MB.
_ROTATED_BYTES, _MOST_COPIES = 1 << 28, 32
_SHORTEST_SAMPLE = 0.5e-3
# Reads and writes of x's size: forward x and y; backward x, dy and dx; add-norm x, residual, y and the sum.
TRAFFIC = {"forward": 2, "backward": 3, "add": 4}


class Size(NamedTuple):
    kind: str
    dtype: str
    rows: int
    width: int

    @property
    def bytes(self) -> int:
        return self.rows * self.width * DTYPES[self.dtype].itemsize

    def __str__(self) -> str:
        return f"{self.kind} {self.dtype} {self.rows}×{self.width}"


class Entry(NamedTuple):
    """The calls of one contestant in one pass, which are timed together; a run has `calls` of them."""

    name: str
    which: str
    calls: int
    run: Callable[[], object]
    context: Callable[[], AbstractContextManager[object]]


def all_sizes(sizes: Sizes) -> list[Size]:
    """Return the sizes, the most common ones first: bf16, widths around 4,096."""
    widths = sorted(sizes.widths, key=lambda width: abs(width.bit_length() - 13))
    return [Size(kind, dtype, sizes.rows, width) for dtype in sizes.dtypes for width in widths for kind in KINDS]


def items(device: str, sizes: Sizes, _: Any) -> Iterator[Item]:
    for size in all_sizes(sizes):
        yield Item(str(size), 45.0, lambda size=size: measure(size, device, sizes.rounds))  # type: ignore[misc]
    yield Item("host time of a call", 45.0, lambda: host_times(device))


def warming(device: str, sizes: Sizes) -> list[Callable[[], object]]:
    """Return one job for each size, which compiles what `measure` needs."""
    return [lambda size=size: compile_only(size, device) for size in all_sizes(sizes)]  # type: ignore[misc]


def compile_only(size: Size, device: str) -> None:
    """Call every contestant once on one input, because several processes share the GPU's memory."""
    xs, dys, gains = _inputs(size, device, 1)
    for each in contestants(size.kind, device):
        for which in TRAFFIC:
            with contextlib.suppress(Exception), each.context():  # a failure occurs again when the size is measured
                call = _call(each, which, xs, dys, gains)
                if call is not None:
                    call(0)


def measure(size: Size, device: str, rounds: int) -> dict[str, Any]:
    """Return GB/s, the share of copy bandwidth, and our time over the best peer's, for every contestant and pass."""
    stream = torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else nullcontext()
    failed: dict[str, str] = {}
    with stream:
        entries = list(_entries(size, device, failed))
        samples = _sample(entries, device, rounds)
    rows = [_row(size, entry, samples[number], samples[0]) for number, entry in enumerate(entries)]
    ratios = _ratios(entries, samples)
    if device == "cuda":
        torch.cuda.empty_cache()
    return {**size._asdict(), "rows": size.rows, "measured": rows, "ratios": ratios, "failed": failed,
            "summary": _summary(rows, failed)}  # fmt: skip


# The entries that are timed


def _entries(size: Size, device: str, failed: dict[str, str]) -> Iterator[Entry]:
    """Yield the entries that work; the copy is the first."""
    copies = _copies(size, device)
    xs, dys, gains = _inputs(size, device, copies)
    yield _entry(COPY, "forward", lambda at: dys[at].clone(), copies, nullcontext, device)
    for each in contestants(size.kind, device):
        for which in TRAFFIC:
            try:
                with each.context():
                    call = _call(each, which, xs, dys, gains)
                    if call is not None:
                        yield _entry(each.name, which, call, copies, each.context, device)
            except Exception as failure:  # a peer may not support this size
                failed[f"{each.name} {which}"] = f"{type(failure).__name__}: {' '.join(str(failure).split())[:200]}"


def _copies(size: Size, device: str) -> int:
    return max(2, min(-(-_ROTATED_BYTES // size.bytes), _MOST_COPIES)) if device == "cuda" else 2


def _inputs(size: Size, device: str, copies: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return x, dy, and the gain and bias; the first and the last require gradients."""
    dtype = DTYPES[size.dtype]
    xs, dys = ([_random(size, device, dtype) for _ in range(copies)] for _ in range(2))
    gains = [torch.randn(size.width).to(dtype).to(device) for _ in range(2)]
    for each in (*xs, *gains):
        each.requires_grad_()
    return xs, dys, gains


def _random(size: Size, device: str, dtype: torch.dtype) -> Tensor:
    if device == "cuda":
        return torch.randn(size.rows, size.width, device=device, dtype=dtype)
    return torch.randn(size.rows, size.width).to(dtype).to(device)


def _call(
    each: Contestant, which: str, xs: list[Tensor], dys: list[Tensor], gains: list[Tensor]
) -> Callable[[int], object] | None:
    """Return a function of an index that makes one pass over the inputs with this index."""
    if which == "forward":
        return torch.no_grad()(lambda at: each.norm(xs[at], *gains))
    if which == "add":
        add = each.add
        return None if add is None else torch.no_grad()(lambda at: add(xs[at], dys[at], *gains))
    outputs = [each.norm(x, *gains) for x in xs]

    def backward(at: int) -> object:
        leaves = [xs[at], *gains]
        return torch.autograd.grad(outputs[at], leaves, dys[at], retain_graph=True, allow_unused=True)

    return backward


def _entry(
    name: str, which: str, call: Callable[[int], object], copies: int,
    context: Callable[[], AbstractContextManager[object]], device: str,
) -> Entry:  # fmt: skip
    """Warm up, and capture the calls in a graph if the device has CUDA graphs."""
    for at in (0, 1, 0):
        call(at)
    place.synchronize(device)
    if not place.has_graphs(device):
        return Entry(name, which, copies, lambda: [call(at) for at in range(copies)], context)
    return Entry(name, which, copies, _captured(call, copies).replay, nullcontext)


def _captured(call: Callable[[int], object], copies: int) -> torch.cuda.CUDAGraph:
    """Capture the calls on the current stream. `torch.cuda.graph` would also collect garbage hundreds of times."""
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin()
    try:
        kept = [call(at) for at in range(copies)]  # all are kept, so that outputs rotate too
    except BaseException:
        with contextlib.suppress(RuntimeError):
            graph.capture_end()
        raise
    graph.capture_end()
    del kept
    return graph


# Timing


def _sample(entries: list[Entry], device: str, rounds: int) -> list[list[float]]:
    """Return the seconds per call of every entry in every round."""
    found: list[list[float]] = [[] for _ in entries]
    repeats = [_repeats(each, device) for each in entries]
    for _ in range(rounds):
        for number in random.sample(range(len(entries)), len(entries)):
            entry, count = entries[number], repeats[number]
            with entry.context():
                found[number].append(place.elapsed(lambda: _repeat(entry.run, count), device) / (entry.calls * count))  # noqa: B023
    return found


def _repeats(entry: Entry, device: str) -> int:
    """Return the number of runs that make a sample long enough for the clock."""
    if device != "cuda":
        return 1
    with entry.context():
        seconds = min(place.elapsed(entry.run, device) for _ in range(2))
    return max(1, min(50, round(_SHORTEST_SAMPLE / seconds)))


def _repeat(run: Callable[[], object], count: int) -> None:
    for _ in range(count):
        run()


def _row(size: Size, entry: Entry, seconds: list[float], copy: list[float]) -> dict[str, Any]:
    """Return the median speed, and its share of the copy speed in the same rounds."""
    bytes_moved = TRAFFIC[entry.which] * size.bytes
    shares = [bytes_moved / own / (2 * size.bytes / theirs) for own, theirs in zip(seconds, copy, strict=True)]
    median = statistics.median(seconds)
    return {
        "contestant": entry.name,
        "pass": entry.which,
        "us": median * 1e6,
        "gb_per_s": bytes_moved / median / 1e9,
        "of_copy": statistics.median(shares),
    }


def _ratios(entries: list[Entry], samples: list[list[float]]) -> list[dict[str, Any]]:
    """Return the time of each of our back ends over the fastest peer's, pass by pass."""
    found = []
    for number, entry in enumerate(entries):
        if not entry.name.startswith(place.OURS):
            continue
        peers = {
            each.name: statistics.median(a / b for a, b in zip(samples[number], samples[other], strict=True))
            for other, each in enumerate(entries)
            if each.which == entry.which and each.name != COPY and not each.name.startswith(place.OURS)
        }
        if peers:
            best = max(peers, key=lambda name: peers[name])
            found.append({"contestant": entry.name, "pass": entry.which, "peer": best, "ratio": peers[best]})
    return found


def _summary(rows: list[dict[str, Any]], failed: dict[str, str]) -> str:
    """Return the shares of copy speed, forward/backward/add, as text."""
    names = dict.fromkeys(row["contestant"] for row in rows if row["contestant"] != COPY)
    texts = []
    for name in names:
        shares = [f"{row['of_copy']:.2f}" for row in rows if row["contestant"] == name]
        texts.append(f"{name} {'/'.join(shares)}")
    return ", ".join(texts) + (f"; failed: {', '.join(failed)}" if failed else "")


# The host


def host_times(device: str, width: int = 1024) -> dict[str, Any]:
    """Return the microseconds that the host needs for one call of a module on 16 rows.

    They are for a forward pass without and with an autograd graph, and for a backward pass.
    """
    found: dict[str, Any] = {}
    calls = 300 if device == "cuda" else 1
    for name, module, context in _modules(width, device):
        x = torch.randn(16, width).to(device)
        with context():
            found[name] = {
                "forward_us": _host_us(torch.no_grad()(lambda: module(x)), calls, device),  # noqa: B023
                "with_graph_us": _host_us(lambda: module(x), calls, device),  # noqa: B023
                "backward_us": _host_us(_backward_of(module, x), calls, device),
            }
    texts = [f"{name} {'/'.join(f'{us:.1f}' for us in times.values())} µs" for name, times in found.items()]
    return {"width": width, "times": found, "summary": ", ".join(texts)}


def _backward_of(module: nn.Module, x: Tensor) -> Callable[[], object]:
    """Return a function that makes a backward pass and can be called repeatedly."""
    x = x.clone().requires_grad_()
    y = module(x)
    leaves, dy = [x, *module.parameters()], torch.ones_like(y)
    return lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)


def _modules(width: int, device: str) -> Iterator[tuple[str, nn.Module, Callable[[], AbstractContextManager[object]]]]:
    for backend in place.our_backends(device):
        for kind in (omninorm.RMSNorm, omninorm.LayerNorm):
            module = place.move(kind(width, EPS), device)
            yield f"{place.OURS}.{kind.__name__} {backend}", module, lambda: omninorm.use_backend(backend)  # noqa: B023
    for stock in (nn.RMSNorm, nn.LayerNorm):
        yield f"torch.nn.{stock.__name__}", place.move(stock(width, EPS), device), nullcontext


def _host_us(call: Callable[[], object], calls: int, device: str) -> float:
    """Return the fastest of a few samples; the host does not wait for the device inside a sample."""
    found = []
    for _ in range(min(5, calls)):
        call()
        place.synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        found.append((time.perf_counter() - start) / calls * 1e6)
    place.synchronize(device)
    return min(found)
