"""Scenarios on the simulated accelerator, each run in a separate process: `python simulated_scenarios.py NAME`.

It prints the result as JSON.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parents[1]))
from helpers.simulated_accelerator import NAME, SimulatedTensor, counting, install, to_simulated


def devices() -> dict[str, Any]:
    """Try operations that a GPU refuses, and operations for which the host waits."""
    x = SimulatedTensor(torch.arange(6.0).reshape(2, 3))
    found: dict[str, Any] = {"device": str(x.device), "new": str(torch.zeros(2, device=x.device).device)}
    try:
        x + torch.ones(2, 3)
    except RuntimeError as error:
        found["two devices"] = str(error)
    with counting() as quiet:
        y = (x * 2).sum(dim=0)
        y.add_(torch.ones(3).to(NAME, non_blocking=True))
    found["quiet"] = dict(quiet.waits)
    found["launches"] = dict(quiet.launches)
    with counting() as loud:
        found["values"] = y.tolist()
        found["total"] = y.sum().item()
        torch.tensor([1.0, 2.0], device=x.device)
        y.cpu()
    found["waits"] = dict(loud.waits)
    return found


def watched() -> dict[str, Any]:
    """Train a watched decoder of 12 blocks for 11 steps, sampled every 5, and count per step."""
    import omninorm
    from omninorm import Thinker, ThinkerConfig
    from omninorm.monitor.probes import causality, loss

    # These probes leave out subclasses of Tensor, but on a device they would run, so they have to count.
    causality.Tensor = loss.Tensor = SimulatedTensor  # type: ignore[misc]
    model = to_simulated(Thinker(ThinkerConfig(d_model=32, n_layers=12, n_heads=1)))
    tokens = SimulatedTensor(torch.randint(0, 256, (2, 33)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=True)

    def step() -> torch.Tensor:
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    with sdpa_kernel(SDPBackend.MATH):
        step()
        with counting() as plain:
            step()
        steps = []
        with omninorm.watch(model, optimizer, every=5) as w:
            for _ in range(11):
                with counting() as found:
                    w.step(step())
                more = found.launches.total() - plain.launches.total()
                steps.append({"launches": more, "waits": dict(found.waits)})
    signals = sorted(w.history.samples[-1].signals)
    return {"plain": dict(plain.waits), "steps": steps, "signals": signals, "losses": len(w.history.steps)}


class Scaled(nn.Module):
    """Multiplies its input in place by a factor, if it has one."""

    def __init__(self) -> None:
        super().__init__()
        self.factor: float | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.factor is None else x.mul_(self.factor)


def peaks(factors: list[float | None], on_device: bool) -> dict[str, Any]:
    """Return the peaks of three linear layers in each step, and the first NaN. The first layer's output is multiplied
    in place by that step's factor."""
    import omninorm
    from omninorm.monitor.stats_buffer import StatsBuffer

    torch.manual_seed(0)
    scaled = Scaled()
    model: nn.Module = nn.Sequential(nn.Linear(4, 8), scaled, nn.Linear(8, 8), nn.Linear(8, 1))
    inputs = torch.randn(len(factors), 5, 4)
    if on_device:
        model = to_simulated(model)
    rows: list[list[float]] = []
    take = StatsBuffer.take

    def noting(buffer: StatsBuffer, *args: Any) -> Any:
        found = take(buffer, *args)
        rows.extend(row.sentinels for row in found[1])
        return found

    StatsBuffer.take = noting  # type: ignore[method-assign]
    with omninorm.watch(model, every=100, rules=[]) as w:
        for factor, x in zip(factors, inputs, strict=True):
            scaled.factor = factor
            loss = model(SimulatedTensor(x) if on_device else x).mean()
            loss.backward()
            w.step(loss)
    StatsBuffer.take = take  # type: ignore[method-assign]
    found = w.history.nonfinite
    return {"rows": rows, "first": None if found is None else [found.step, found.layer]}


def outputs() -> dict[str, Any]:
    """Compare the peaks of outputs with those on the CPU, where outputs do not wait."""
    from omninorm.monitor import waiting

    always, later = [0.5, 0.5, math.nan, 0.5], [None, None, 0.5, 0.5]
    found = {
        name: [peaks(factors, on_device) for on_device in (True, False)]
        for name, factors in {"never": [None] * 4, "always": always, "later": later}.items()
    }
    waiting.MOST_BYTES = 0
    return found | {"no memory": [peaks(later, on_device) for on_device in (True, False)]}


def kept() -> list[int]:
    """Return how many bytes wait after each of five outputs of 4,000 bytes, of which 10,000 may wait."""
    from omninorm.monitor import waiting

    waiting.MOST_BYTES = 10_000
    them, found = waiting.Peaks(), []
    for _ in range(5):
        them.add(0, SimulatedTensor(torch.randn(10, 100)))
        found.append(sum(each.y.untyped_storage().nbytes() for each in them._waiting))
    return found


def norms() -> dict[str, Any]:
    """Compare norms and their gradients with the CPU's, and count the operators that each calls."""
    import omninorm
    from omninorm import functional

    calls: dict[str, Any] = {
        "rms_norm": lambda x, gain: functional.rms_norm(x, gain),
        "layer_norm": lambda x, gain: functional.layer_norm(x, gain, gain),
        "add_layer_norm": lambda x, gain: functional.add_layer_norm(x, x + 1, gain)[0],
        "llama": lambda x, gain: functional.rms_norm(x, gain, cast="llama"),
    }
    leaves = [torch.randn(3, 8), torch.randn(8)]
    found: dict[str, Any] = {}
    for name, norm in calls.items():
        here = [leaf.clone().requires_grad_() for leaf in leaves]
        there = [SimulatedTensor(leaf.clone()).requires_grad_() for leaf in leaves]
        expected = torch.autograd.grad(norm(*here).square().sum(), here)
        with counting() as counted:
            y = norm(*there)
        gradients = torch.autograd.grad(y.square().sum(), there)
        gap = max(float((a.raw - b).abs().max()) for a, b in zip(gradients, expected, strict=True))
        options = {"cast": "llama"} if name == "llama" else {"operator": name.removeprefix("add_")}
        chosen = omninorm.backend_for(*there, **options).name
        found[name] = {"gap": gap, "launches": dict(counted.launches), "waits": dict(counted.waits), "backend": chosen}
    return found


if __name__ == "__main__":
    install()
    torch.manual_seed(0)
    scenarios = {"devices": devices, "watched": watched, "outputs": outputs, "kept": kept, "norms": norms}
    print(json.dumps(scenarios[sys.argv[1]]()))
