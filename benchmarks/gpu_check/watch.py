"""The cost of `omninorm.watch` on the device (time, host waits), and CUDA graphs of norms and of a training step."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import omninorm
from gpu_check import place
from gpu_check.items import Item
from gpu_check.sizes import Sizes
from gpu_check.training import Trained, first_model, loss_of, names, some_tokens, trained

# The steps of a timed block by its sampling interval; None means no watch. Each block has at least two samples.
BLOCKS = {None: 10, 10: 20, 1: 5}


def items(device: str, sizes: Sizes, _: Any) -> Iterator[Item]:
    yield Item("overhead", 60.0, lambda: overhead(device, sizes, False))
    yield Item("overhead, long steps", 90.0, lambda: overhead_of_long_steps(device, sizes))
    yield Item("host waits", 40.0, lambda: host_waits(device, sizes))
    if place.has_graphs(device):
        yield Item("CUDA graphs of norms", 40.0, lambda: graphs_of_norms(device))
        yield Item("CUDA graph of a training step", 40.0, lambda: graph_of_step(device, sizes))
    if place.compiles(device):
        yield Item("overhead, compiled", 60.0, lambda: overhead(device, sizes, True))


# Time


def overhead(device: str, sizes: Sizes, compiled: bool, intervals: tuple[int, ...] = (10, 1)) -> dict[str, Any]:
    """Return the time that each sampling interval adds to a step. Every watched block is between two unwatched ones."""
    torch._dynamo.reset()
    first, name = first_model(sizes, device), names(device)[0]
    models = {every: trained(name, first, device, sizes, compiled) for every in (None, *intervals)}
    watches = {every: omninorm.watch(models[every].model, models[every].optimizer, every=every) for every in intervals}
    with contextlib.ExitStack() as stack:
        opened: dict[int | None, Any] = {every: stack.enter_context(each) for every, each in watches.items()}
        runs = {every: _block(models[every], opened.get(every), BLOCKS[every]) for every in models}
        for run in runs.values():
            run()
        seconds = _in_between(runs, device, sizes.watched_blocks)
        samples = {every: len(opened[every].history.samples) for every in intervals}
    return {"batch": sizes.batch, **_report(seconds, samples)}


def overhead_of_long_steps(device: str, sizes: Sizes) -> dict[str, Any]:
    """Return the overhead at every=10 for a batch whose step takes about 100 ms, so that the device is the limit."""
    return overhead(device, _with_long_steps(device, sizes), False, intervals=(10,))


def _with_long_steps(device: str, sizes: Sizes) -> Sizes:
    """Return the sizes with a batch whose step takes about `long_step` seconds."""
    first, name = first_model(sizes, device), names(device)[0]
    for _ in range(3):  # small steps are limited by the host, so their time does not grow with the batch
        run = _block(trained(name, first, device, sizes, False), None, 3)
        run()
        seconds = place.wall(run, device) / 3
        if seconds > 0.95 * sizes.long_step:
            break
        sizes = replace(sizes, batch=max(sizes.batch + 1, round(sizes.batch * sizes.long_step / seconds)))
    return sizes


def _block(model: Trained, watched: Any, steps: int) -> Callable[[], None]:
    """Return a function that trains for some steps. The host reads the loss in each, as in most training loops."""

    def run() -> None:
        for _ in range(steps):
            loss = model.step()
            if watched is None:
                loss.item()
            else:
                watched.step(loss)

    return run


def _in_between(
    runs: dict[int | None, Callable[[], None]], device: str, blocks: int
) -> dict[int | None, list[tuple[float, float]]]:
    """Return the seconds per step for each interval: of its blocks, and of the unwatched blocks before and after.

    For None they are those of consecutive unwatched blocks.
    """

    def timed(every: int | None) -> float:
        return place.wall(runs[every], device) / BLOCKS[every]

    found: dict[int | None, list[tuple[float, float]]] = {every: [] for every in runs}
    before = timed(None)
    for _ in range(blocks):
        for every in runs:
            if every is not None:
                watched, after = timed(every), timed(None)
                found[every].append((watched, (before + after) / 2))
                found[None].append((after, before))
                before = after
    return found


def _report(seconds: dict[int | None, list[tuple[float, float]]], samples: dict[int, int]) -> dict[str, Any]:
    step = statistics.median(plain for _, plain in seconds[None])
    noise = statistics.median(abs(after - before) for after, before in seconds[None])
    found: dict[str, dict[str, Any]] = {}
    for every in samples:
        extras = [watched - plain for watched, plain in seconds[every]]
        extra = statistics.median(extras)
        found[f"every={every}"] = {
            "ratio": 1 + extra / step, "extra_ms": extra * 1e3, "blocks_ms": [each * 1e3 for each in extras]
        }  # fmt: skip
    least = {every: 2 * len(seconds[every]) for every in samples}
    wrong = [
        f"every={every} has {samples[every]} samples, not {least[every]}"
        for every in samples
        if samples[every] < least[every]
    ]
    texts = [f"{name} {each['extra_ms']:+.2f} ms ({each['ratio'] - 1:+.1%})" for name, each in found.items()]
    return {"step_ms": step * 1e3, "watched": found, "noise_ms": noise * 1e3, "samples": samples, "wrong": wrong,
            "summary": f"step {step * 1e3:.1f} ms, {', '.join(texts)}, noise {noise * 1e3:.2f} ms"}  # fmt: skip


# Host waits


def host_waits(device: str, sizes: Sizes) -> dict[str, Any]:
    """Count the host's waits in each of 12 steps, watched with a sample every 5 steps and unwatched."""
    model = trained(names(device)[0], first_model(sizes, device), device, sizes, False)
    model.step()
    with place.counting_waits(device) as count:
        model.step()
        plain = count()
    waits = []
    with omninorm.watch(model.model, model.optimizer, every=5) as watched:
        for _ in range(12):
            with place.counting_waits(device) as count:
                watched.step(model.step())
                waits.append(count())
    sampled = [waits[at] for at in (4, 9)]
    unsampled = [each for at, each in enumerate(waits) if at not in (0, 4, 9)]
    wrong = [f"an unsampled step waits {max(unsampled)} times"] if max(unsampled) > plain else []
    wrong += [f"a sampled step waits {max(sampled)} times"] if max(sampled) > plain + 1 else []
    return {"plain": plain, "unsampled": unsampled, "sampled": sampled, "first": waits[0], "wrong": wrong,
            "summary": f"plain {plain}, unsampled {max(unsampled)}, sampled {max(sampled)}"}  # fmt: skip


# CUDA graphs


def graphs_of_norms(device: str) -> dict[str, Any]:
    """Check that replays of a captured forward and backward pass give the bits of eager calls, also for new inputs."""
    wrong, cases = [], 0
    for backend in place.our_backends(device):
        for kind in (omninorm.RMSNorm, omninorm.LayerNorm):
            for dtype in (torch.bfloat16, torch.float32):
                cases += 1
                with omninorm.use_backend(backend):
                    if not _same_in_graph(kind(1024, dtype=dtype).to(device), dtype, device):
                        wrong.append(f"{kind.__name__} of {dtype} by {backend}: a replay differs from eager calls")
    return {"cases": cases, "wrong": wrong}


def _same_in_graph(norm: nn.Module, dtype: torch.dtype, device: str) -> bool:
    x, dy = (torch.randn(512, 1024, device=device, dtype=dtype) for _ in range(2))
    x.requires_grad_()
    leaves = [x, *norm.parameters()]

    def passes() -> tuple[Tensor, ...]:
        y = norm(x)
        # Detached, so that no graph outlives its stream.
        return (y.detach(), *torch.autograd.grad(y, leaves, dy))

    graph, results = captured(passes)
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
        dy.copy_(torch.randn_like(dy))
    graph.replay()
    return all(torch.equal(a, b) for a, b in zip(results, passes(), strict=True))


def captured(passes: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Warm up and capture calls on a separate stream; return the graph and the results that replays overwrite."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            passes()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = passes()
    return graph, results


def graph_of_step(device: str, sizes: Sizes) -> dict[str, Any]:
    """Check that a graph of the Thinker's forward and backward pass gives the loss and gradients of an eager step."""
    model, tokens = first_model(sizes, device), some_tokens(sizes, device)
    weights = list(model.parameters())

    def passes() -> tuple[Tensor, ...]:
        loss = loss_of(model, tokens, device)
        return (loss.detach(), *torch.autograd.grad(loss, weights))

    with place.using(place.model_backends(device)[0]):
        graph, results = captured(passes)
        graph.replay()
        eager = passes()
    gaps = [float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in zip(results, eager, strict=True)]
    # Attention's backward pass adds bfloat16 numbers in any order.
    wrong = [] if max(gaps) < 0.02 else [f"a replay differs from an eager step by {max(gaps):.2g}"]
    replay = statistics.median(place.elapsed(graph.replay, device) for _ in range(5))
    once = statistics.median(place.elapsed(passes, device) for _ in range(5))
    summary = f"replay {replay * 1e3:.1f} ms, eager {once * 1e3:.1f} ms, difference {max(gaps):.2g}"
    return {"replay_ms": replay * 1e3, "eager_ms": once * 1e3, "difference": max(gaps), "wrong": wrong,
            "summary": summary}  # fmt: skip
