"""Scenarios on the simulated accelerator, each run in a process of its own: `python simulated_scenarios.py NAME`.

Prints its result as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parents[1]))
from helpers.simulated_accelerator import NAME, SimulatedTensor, counting, install, to_simulated


def devices() -> dict[str, Any]:
    """Try what a GPU refuses, and what makes the host wait."""
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


if __name__ == "__main__":
    install()
    torch.manual_seed(0)
    print(json.dumps({"devices": devices, "watched": watched}[sys.argv[1]]()))
