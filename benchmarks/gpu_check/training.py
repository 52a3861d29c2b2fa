"""Tokens per second of training a Thinker in bfloat16 with omninorm's norms and torch.nn's, compiled and not.

The variants have the same initial weights. They run in separate processes and alternate, a block of steps each. Weights
and optimizer state are float32, and matrix products run under autocast, as in `omninorm train`.
"""

from __future__ import annotations

import copy
import itertools
import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import omninorm
from gpu_check import place
from gpu_check.items import Item
from gpu_check.sizes import Sizes
from gpu_check.variants import COMPILED, take_turns
from omninorm import Thinker, ThinkerConfig
from omninorm.bench.models import replace_norms

STOCK = "torch.nn"


class Trained(NamedTuple):
    """A model, its training step, and the context in which to call it."""

    model: nn.Module
    step: Callable[[], Tensor]
    optimizer: torch.optim.Optimizer
    context: Callable[[], AbstractContextManager[object]] = nullcontext


def items(device: str, sizes: Sizes, options: Any) -> Iterator[Item]:
    yield Item("eager", 60.0, lambda: measure(options, sizes, ""))
    if place.compiles(device):
        yield Item("compiled", 75.0, lambda: measure(options, sizes, COMPILED))


def warming(device: str, sizes: Sizes) -> list[Callable[[], object]]:
    """Return one job for each variant, which compiles its step."""
    return [
        lambda name=name: trained(name, first_model(sizes, device), device, sizes, True).step()  # type: ignore[misc]
        for name in names(device)
    ]


def names(device: str) -> list[str]:
    return [*(f"{place.OURS} {backend}" for backend in place.model_backends(device)), STOCK]


def measure(options: Any, sizes: Sizes, way: str) -> dict[str, Any]:
    """Return the speed of every variant, and its ratio to the speed with torch's norms in the same rounds."""
    chosen = [name + way for name in names(options.device)]
    seconds, counted, failed = take_turns(options, chosen, sizes.blocks)
    tokens = sizes.batch * sizes.model["max_seq_len"]
    found = {name.removesuffix(way): {**_speed(taken, tokens), **counted[name]} for name, taken in seconds.items()}
    texts = [
        f"{name} {each['tokens_per_s']:,.0f} tokens/s ({_range(each['blocks_ms'])} ms)" for name, each in found.items()
    ]
    wrong = [f"{name} failed: {why}" for name, why in failed.items()]
    wrong += [f"{name}: {text}" for name, each in found.items() for text in _findings(each)]
    ratios = _ratios({name.removesuffix(way): taken for name, taken in seconds.items()})
    return {
        "variants": found,
        "ratios": {name: statistics.median(each) for name, each in ratios.items()},
        "ranges": {name: [min(each), max(each)] for name, each in ratios.items()},
        "failed": failed,
        "tokens": tokens,
        "wrong": wrong,
        "summary": ", ".join(texts),
    }


def _range(values: list[float]) -> str:
    return f"{min(values):.1f} to {max(values):.1f}"


def _findings(counted: dict[str, Any]) -> list[str]:
    found = [*counted["warnings"], *(f"a graph break: {reason}" for reason in counted["graph_breaks"])]
    if counted["recompiled"]:
        found.append(f"compiled {counted['recompiled']} more graphs after its first steps")
    return found


def first_model(sizes: Sizes, device: str) -> Thinker:
    torch.manual_seed(0)
    model: Any = place.move(Thinker(ThinkerConfig(**sizes.model)), device)
    return model  # type: ignore[no-any-return]


def trained(name: str, first: Thinker, device: str, sizes: Sizes, compiled: bool) -> Trained:
    """Return a copy of the model with the norms of a variant, and its step."""
    model = copy.deepcopy(first) if device != place.SIMULATED else first_model(sizes, device)
    context: Callable[[], AbstractContextManager[object]] = nullcontext
    if name == STOCK:
        replace_norms(model, omninorm.RMSNorm, lambda norm: _stock(norm, device))
    else:
        backend = name.split()[1]
        context = lambda: place.using(backend)  # noqa: E731
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device != place.SIMULATED)
    call: Any = torch.compile(model, backend=compiler(device)) if compiled else model
    batches = itertools.cycle([some_tokens(sizes, device) for _ in range(4)])

    def step() -> Tensor:
        with context():
            loss = loss_of(call, next(batches), device)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
        return loss

    return Trained(model, step, optimizer, context)


def some_tokens(sizes: Sizes, device: str) -> Tensor:
    length = sizes.model["max_seq_len"]
    return torch.randint(0, sizes.model["vocab_size"], (sizes.batch, length + 1)).to(device)


def loss_of(model: Any, tokens: Tensor, device: str) -> Tensor:
    with torch.autocast(device, torch.bfloat16) if device != place.SIMULATED else nullcontext():
        logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def _stock(norm: Any, device: str) -> nn.Module:
    made = nn.RMSNorm(norm.weight.shape[0], norm.eps)
    return place.move(made, device)


def compiler(device: str) -> str:
    """Return the compiler; without a GPU it only traces, because compiling takes long."""
    return "inductor" if device == "cuda" else "aot_eager"


def _speed(seconds: list[float], tokens: int) -> dict[str, Any]:
    """Return the median speed, and the speeds of the blocks; a difference must exceed their spread."""
    median = statistics.median(seconds)
    blocks = [round(each * 1e3, 3) for each in seconds]
    return {"ms": median * 1e3, "tokens_per_s": tokens / median, "blocks_ms": blocks}


def _ratios(seconds: dict[str, list[float]]) -> dict[str, list[float]]:
    """Return the speed with our norms over the speed with torch's, in every round."""
    stock = seconds.get(STOCK)
    if stock is None:
        return {}
    return {
        name: [b / a for a, b in zip(taken, stock, strict=True)] for name, taken in seconds.items() if name != STOCK
    }
