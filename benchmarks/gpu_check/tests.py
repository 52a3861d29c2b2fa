"""Statements that must hold on the device as on the CPU, for layers, models, surgery and training; then the test suite.

The statements need only torch. Each compares the device with the CPU, in float32. The suite is run by pytest.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import omninorm
from gpu_check import place, pytest_log
from gpu_check.items import Item
from gpu_check.options import chosen_parts
from gpu_check.sizes import Sizes
from gpu_check.training import compiler
from omninorm import NormConfig, Thinker, ThinkerConfig
from omninorm.config import NORMALIZATIONS, PLACEMENTS

_ROOT = Path(__file__).resolve().parents[2]
SHAPE: dict[str, Any] = {"d_model": 32, "n_layers": 2, "n_heads": 2, "max_seq_len": 16, "vocab_size": 64}
# A few hundred rounding errors of float32; wrong results differ by far more.
TOLERANCE = 1e-4


def items(device: str, sizes: Sizes, options: Any) -> Iterator[Item]:
    for name, statement in STATEMENTS.items():
        yield Item(name, 40.0, lambda statement=statement: _stated(statement, device))  # type: ignore[misc]
    if device == "cuda" and importlib.util.find_spec("pytest") is not None:
        later = chosen_parts(options)[chosen_parts(options).index("tests") + 1 :]
        end = options.worker - sum(sizes.budgets[name] for name in later)
        yield Item("pytest", 240.0, lambda: suite(device, max(10.0, end - time.time())))


def _stated(statement: Callable[[str], list[str]], device: str) -> dict[str, Any]:
    torch.manual_seed(0)
    return {"wrong": statement(device)}


def thinker(**norm: Any) -> Thinker:
    torch.manual_seed(0)
    return Thinker(ThinkerConfig(**SHAPE, norm=NormConfig(**norm)))


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Return the norm of the difference divided by the norm, or NaN if one of the tensors has NaN."""
    ours, theirs = ours.detach().cpu().double(), theirs.detach().cpu().double()
    return float((ours - theirs).norm() / theirs.norm().clamp_min(1e-30))


def placements(device: str) -> list[str]:
    """Check that every norm and placement has the same loss and gradients as on the CPU."""
    wrong = []
    tokens = torch.randint(0, 64, (2, 17))
    cases = [("rmsnorm", each) for each in PLACEMENTS] + [(each, "pre") for each in NORMALIZATIONS]
    for kind, where in cases:
        both = []
        for on in ("cpu", device):
            model = place.move(thinker(normalization=kind, norm_placement=where), on)
            loss = _loss(model, tokens.to(on))
            loss.backward()  # type: ignore[no-untyped-call]
            both.append([loss, *(each.grad for each in model.parameters() if each.grad is not None)])
        worst = max(difference(a, b) for a, b in zip(both[1], both[0], strict=True))
        if not worst < 20 * TOLERANCE:
            wrong.append(f"{kind}, placement {where}: loss or gradients differ from the CPU's by {worst:.2g}")
    return wrong


def _loss(model: nn.Module, tokens: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def generating(device: str) -> list[str]:
    """Check that greedy generation gives the same tokens as on the CPU."""
    prompts = [[1, 2, 3], [4]]
    here, there = (place.move(thinker(), on).generate(prompts, 10, temperature=0.0) for on in ("cpu", device))
    return [] if here == there else [f"generated {there}, but the CPU {here}"]


def signals(device: str) -> list[str]:
    """Check that a watch measures the same signals as on the CPU."""
    found = []
    for on in ("cpu", device):
        model: Any = place.move(thinker(), on)
        torch.manual_seed(1)
        tokens = torch.randint(0, 64, (2, 17)).to(on)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        with omninorm.watch(model, optimizer, every=1) as watched:
            for _ in range(3):
                loss = _loss(model, tokens)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                optimizer.zero_grad()
                watched.step(loss)
        found.append(watched.history.samples[-1].signals)
    wrong = (
        [] if found[0].keys() == found[1].keys() else [f"signals differ: {sorted(found[0].keys() ^ found[1].keys())}"]
    )
    for name in ("stream_rms", "stream_grad", "update_ratio"):
        pairs = zip(found[1].get(name, []), found[0].get(name, []), strict=True)
        wrong += [
            f"{name} is {a}, but {b} on the CPU" for a, b in pairs if a is not None and abs(a - b) > 0.01 * abs(b)
        ]
    return wrong


def surgery(device: str) -> list[str]:
    """Check that swap_norms and fold_gains are verified on the device."""
    from omninorm import surgery as operations

    stock = nn.Sequential(nn.Linear(8, 16), nn.RMSNorm(16), nn.Linear(16, 8))
    report = operations.swap_norms(place.move(stock, device))
    wrong = [] if len(report.changed) == 1 else [f"swap_norms changed {len(report.changed)} of 1 norms"]
    model = place.move(thinker(), device)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, omninorm.RMSNorm):
                module.weight.mul_(1.5)
    folded = operations.fold_gains(model, inputs=(torch.randint(0, 64, (2, 9)).to(device),))
    return wrong + ([] if folded.changed else ["fold_gains changed nothing"])


def compiled(device: str) -> list[str]:
    """Check that torch.compile gives the eager result without a graph break."""
    if not place.compiles(device):
        return []
    wrong = []
    for kind in (omninorm.RMSNorm, omninorm.LayerNorm):
        norm = place.move(kind(64), device)
        torch._dynamo.reset()
        both = []
        for call in (norm, torch.compile(norm, fullgraph=True, backend=compiler(device))):
            torch.manual_seed(0)
            x = torch.randn(5, 64).to(device).requires_grad_()
            y = call(x)
            both.append((y, *torch.autograd.grad(y.square().sum(), [x, *norm.parameters()])))
        worst = max(difference(a, b) for a, b in zip(*both, strict=True))
        if not worst < TOLERANCE:
            wrong.append(f"{kind.__name__} compiled differs from eager by {worst:.2g}")
    return wrong


def mixed_devices(device: str) -> list[str]:
    """Check that a gain on another device raises an error."""
    if device == "cpu":
        return []
    try:
        omninorm.functional.rms_norm(torch.randn(3, 8).to(device), torch.ones(8))
    except (omninorm.OmninormError, RuntimeError):
        return []
    return ["a gain on the CPU and an input on the device raise no error"]


STATEMENTS: dict[str, Callable[[str], list[str]]] = {
    "placements": placements,
    "generating": generating,
    "signals": signals,
    "surgery": surgery,
    "compiled norms": compiled,
    "mixed devices": mixed_devices,
}


def listed_files() -> list[str]:
    """Return the test files that run on any device."""
    lines = (_ROOT / "tests" / "on_devices.txt").read_text(encoding="utf-8").splitlines()
    return [f"tests/{line.split(':')[0]}" for line in lines if line and not line.startswith("#")]


def suite(device: str, seconds: float) -> dict[str, Any]:
    """Run the test files that work on any device, until the time is over."""
    with tempfile.TemporaryDirectory(prefix="omninorm-tests-") as folder:
        log, output = Path(folder) / "tests.jsonl", Path(folder) / "output.txt"
        code = _run_pytest(_pytest_command(device), log, output, seconds)
        found, tail = pytest_log.read(log), output.read_text(encoding="utf-8", errors="replace")[-3000:]
    state = "out of time" if code is None else f"exit code {code}"
    # Pytest's exit code is 1 if tests fail; other codes mean that it could not run them.
    wrong = found["wrong"] or ([] if code in (None, 0) else [f"pytest ended with {state}: {tail[-500:]}"])
    summary = f"{found['passed']} passed, {len(found['failures'])} failed, {state}"
    return {**found, "finished": code is not None, "wrong": wrong, "tail": tail, "summary": summary}


def _pytest_command(device: str) -> list[str]:
    settings = ["-q", "--tb=short", "--no-header", "-p", "no:cacheprovider", "-p", "no:benchmark"]
    settings += ["-p", "gpu_check.pytest_log", "-o", "filterwarnings=default"]
    cores = os.cpu_count() or 1
    if importlib.util.find_spec("xdist") is not None and cores > 3:
        settings += ["-n", str(cores - 2)]
    chosen = ["--device", device, "-m", "not slow and not exhaustive", *listed_files()]
    return [sys.executable, "-m", "pytest", *settings, *chosen]


def _run_pytest(command: list[str], log: Path, output: Path, seconds: float) -> int | None:
    """Run a command and return its exit code, or None if it was ended because the time was over."""
    paths = [str(_ROOT / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, pytest_log.VARIABLE: str(log), "PYTHONPATH": os.pathsep.join(paths)}
    with output.open("wb") as file:  # processes of pytest-xdist could keep a pipe open
        process = subprocess.Popen(command, cwd=_ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
        try:
            return process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return None
