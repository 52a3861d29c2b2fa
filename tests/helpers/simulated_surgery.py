"""Scenarios of surgery and comparisons on the simulated accelerator, each run in a separate process:
`python simulated_surgery.py NAME`. It prints the result as JSON."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from helpers.cli import SENTENCE
from helpers.simulated_accelerator import NAME, SimulatedTensor, install

from omninorm import NormConfig, Thinker, ThinkerConfig, surgery
from omninorm.experiments.compare.cells import Cell
from omninorm.experiments.compare.factory import check_factory
from omninorm.experiments.compare.protocols import measure
from omninorm.experiments.corpus import Corpus
from omninorm.surgery import flow, modes, walk

TEXT = (SENTENCE * 80).encode()
SMALL = {"d_model": 16, "n_heads": 2, "steps": 4, "seq_len": 16, "batch_size": 2, "eval_bytes": 200, "warmup_steps": 1}


def devices() -> tuple[torch.device, torch.device]:
    return torch.device("cpu"), torch.device(NAME, 0)


def model(norm: str) -> Thinker:
    torch.manual_seed(0)
    made = Thinker(ThinkerConfig(d_model=32, n_layers=2, n_heads=4, norm=NormConfig(norm, "pre")))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "norm" in name:
                parameter.add_(0.2 * torch.rand(parameter.shape))
    return made


def weights(module: nn.Module) -> list[float]:
    return [float(each.detach().cpu().double().square().sum()) for each in module.parameters()]


OPERATIONS: dict[str, Any] = {
    "rmsnorm": surgery.fold_gains,
    "layernorm": surgery.center,
    "rotated rmsnorm": surgery.rotate,
}


def operate(name: str, device: torch.device) -> dict[str, Any]:
    """Fold, center or rotate, swap, undo and verify a model on a device."""
    made = model(name.rpartition(" ")[2]).double().to(device)
    before = copy.deepcopy(made)
    report = OPERATIONS[name](made)
    found = surgery.verify(before, made)
    operated = weights(made)
    report.undo()
    torch_norms = nn.Sequential(nn.Embedding(16, 8), nn.RMSNorm(8), nn.Linear(8, 8)).to(device)
    swapped = surgery.swap_norms(torch_norms)
    places = {str(parameter.device) for parameter in (*made.parameters(), *torch_norms.parameters())}
    return {
        "changed": sorted(report.changed),
        "exact": found.exact,
        "where": [found.device, report.device],
        "summary": str(report),
        "weights": operated,
        "undone": weights(made) == weights(before),
        "swapped": sorted(swapped.changed),
        "devices": sorted(places),
        "largest": surgery.verify(before, made).largest,
    }


def operated() -> dict[str, Any]:
    return {f"{name} {device.type}": operate(name, device) for name in OPERATIONS for device in devices()}


def parted() -> dict[str, Any]:
    """Find a planted difference between models on every pair of devices, in float64 and as they are."""
    found = {}
    for one in devices():
        for other in devices():
            for dtype in (torch.float64, None):
                pair = model("rmsnorm").to(one), model("rmsnorm").to(other)
                equal = surgery.first_difference(*pair, dtype=dtype).kind
                with torch.no_grad():
                    pair[1].blocks[1].feed_forward.up.weight.mul_(1.5)
                first = surgery.first_difference(*pair, dtype=dtype).first
                found[f"{one.type} {other.type} {dtype}"] = [equal, first and first.a, first and first.fed]
    return found


def proved_on_the_device() -> dict[str, Any]:
    """Run the proofs on the device, as on a GPU with enough free memory."""
    library: Any = sys.modules["omninorm.surgery.verify"]  # the package has a function of this name
    library.free_memory = lambda device: 2**40 if device.type == NAME else None
    own = modes.storage

    def storage(tensor: Any) -> int:  # a wrapper has none
        return own(tensor.raw if isinstance(tensor, SimulatedTensor) else tensor)

    modes.storage = flow.storage = walk.storage = storage
    return operated()


def build(norm: NormConfig, depth: int, vocab_size: int) -> nn.Module:
    """A factory that builds its model on the accelerator itself."""
    return Thinker(ThinkerConfig(d_model=16, n_layers=depth, n_heads=2, vocab_size=vocab_size, norm=norm)).to(NAME)


def compared() -> dict[str, Any]:
    """Measure cells of every protocol on both devices, and one of a factory that builds on the accelerator."""
    corpus = Corpus("text", "text", TEXT[:7000], TEXT[7000:])
    found: dict[str, Any] = {}
    for protocol in ("train", "ramp", "init"):
        cell = Cell(protocol, NormConfig("rmsnorm", "pre"), 2, 0, None if protocol == "init" else 3e-3, SMALL)
        for device in devices():
            measured = measure(cell, corpus, device)
            found[f"{protocol} {device.type}"] = measured.outcome
            found[f"{protocol} {device.type} on"] = measured.clock["device"]
    sys.modules["simulated_factory"] = sys.modules["__main__"]
    settings = {key: value for key, value in SMALL.items() if key not in ("d_model", "n_heads")}
    own = replace(cell, protocol="train", lr=3e-3, settings=settings, model="simulated_factory:build")
    check_factory("simulated_factory:build", [own, replace(own, norm=NormConfig("layernorm", "pre"))])
    found["factory"] = [measure(own, corpus, device).outcome["losses"] for device in devices()]
    return found


if __name__ == "__main__":
    install()
    torch.set_num_threads(1)
    scenarios = {each.__name__: each for each in (operated, proved_on_the_device, parted, compared)}
    print(json.dumps(scenarios[sys.argv[1]]()))
