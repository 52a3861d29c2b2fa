"""The norms on a GPU, checked and timed: `python benchmarks/gpu.py [--json FILE] [--rows 4096] [--quick]`.

Runs unattended on any GPU that PyTorch sees. First every kernel is checked against float64, on awkward shapes, too;
then ours, torch.nn.functional (fused CUDA), torch.compile of the formula, and Liger and quack where they are installed
take turns in random order, over buffers that rotate through more memory than caches hold. Medians are told as GB/s
of the bytes that must be moved (forward x and y; backward x, dy and dx; with an addition one more of each), and as a
share of what copying reaches in the same run. What fails is written down and the rest goes on.

`--device cpu` with TRITON_INTERPRET=1 runs the same on tiny shapes by the interpreter: a check of this script, whose
times mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import omninorm
from omninorm import functional

EPS = 1e-6
WIDTHS = (1024, 2048, 4096, 8192, 16384)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CHECKED = [(1, 1), (7, 33), (300, 768), (64, 8192), (5, 12345), (3, 65536)]
Norm = Callable[..., Any]


# Who takes part --------------------------------------------------------------------------------------------------


def plain_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS) * weight).to(x.dtype)


def contestants(kind: str, on_gpu: bool) -> dict[str, Norm]:
    """name → norm(x, weight, bias). Those of 16-bit inputs get gains of the same dtype, which all of them take."""
    rms = kind == "rms_norm"
    found: dict[str, Norm] = {
        "omninorm": lambda x, w, b: functional.rms_norm(x, w, EPS) if rms else functional.layer_norm(x, w, b, EPS),
        "torch": lambda x, w, b: (
            F.rms_norm(x, x.shape[-1:], w, EPS) if rms else F.layer_norm(x, x.shape[-1:], w, b, EPS)
        ),
    }
    if on_gpu:
        formula = torch.compile(plain_rms_norm if rms else lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b, EPS))
        found["torch.compile"] = (lambda x, w, b: formula(x, w)) if rms else formula
    with contextlib.suppress(ImportError):
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        found["liger"] = lambda x, w, b: (
            LigerRMSNormFunction.apply(x, w, EPS, 0.0, "gemma", False)
            if rms
            else LigerLayerNormFunction.apply(x, w, b, EPS)
        )
    if rms:
        with contextlib.suppress(ImportError):
            from quack import rmsnorm

            found["quack"] = lambda x, w, b: rmsnorm(x, w, eps=EPS)
    return found


# Checking --------------------------------------------------------------------------------------------------------


def check(device: str) -> list[str]:
    """What differs from float64 by more than the numerics contract allows; empty if nothing does."""
    wrong = []
    for dtype in DTYPES.values():
        for rows, width in CHECKED if device == "cuda" else CHECKED[:3]:
            for kind in ("rms_norm", "layer_norm"):
                try:
                    worst = error(kind, dtype, rows, width, device)
                except Exception as failure:  # written down, and the rest goes on
                    worst = {"error": f"{type(failure).__name__}: {str(failure)[:200]}"}
                if "error" in worst or worst["y"] > (4 if dtype == torch.float32 else 1) or worst["dgain"] > 1e-6:
                    wrong.append(f"{kind} {dtype} {rows} × {width}: {worst}")
    return wrong


def error(kind: str, dtype: torch.dtype, rows: int, width: int, device: str) -> dict[str, Any]:
    """y in units of the row's largest output, and float32 gain gradients over the sums of their terms' magnitudes."""
    x = (torch.randn(rows, width, device=device) * 2 + 0.3).to(dtype).requires_grad_()
    weight, bias = (torch.randn(width, device=device, requires_grad=True) for _ in range(2))
    dy = torch.randn(rows, width, device=device).to(dtype)
    exact = x.detach().double()
    exact = exact if kind == "rms_norm" else exact - exact.mean(-1, keepdim=True)
    normed = exact / (exact.square().mean(-1, keepdim=True) + EPS).sqrt()
    if kind == "rms_norm":
        y, expected = functional.rms_norm(x, weight, EPS), normed * weight.detach().double()
    else:
        y, expected = (
            functional.layer_norm(x, weight, bias, EPS),
            normed * weight.detach().double() + bias.detach().double(),
        )
    y.backward(dy)
    digits = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23}[dtype]
    unit = 2.0 ** (expected.abs().amax(-1, keepdim=True).log2().floor() - digits)
    terms = dy.double() * normed
    # LayerNorm's x̂ is a difference from a mean that is rounded itself.
    size = terms.abs().sum(0) + (dy.double().abs().sum(0) * 0.1 if kind == "layer_norm" else 0.0)
    gap = (weight.grad.double() - terms.sum(0)).abs() / size
    return {"y": float(((y.detach().double() - expected).abs() / unit).max()), "dgain": float(gap.max())}


# Timing ----------------------------------------------------------------------------------------------------------


def seconds(step: Callable[[int], object], device: str, calls: int) -> float:
    """Of one call, the mean of a few in a row."""
    if device != "cuda":
        start = time.perf_counter()
        for call in range(calls):
            step(call)
        return (time.perf_counter() - start) / calls
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for call in range(calls):
        step(call)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def steps(
    kind: str, dtype: torch.dtype, rows: int, width: int, device: str
) -> Iterator[tuple[str, str, int, Callable[[int], object]]]:
    """(contestant, pass, bytes, step) of everything that can be timed at a size."""
    size = rows * width * dtype.itemsize
    # More memory than the caches, an eighth of the GPU's at most.
    copies = max(2, min(-(-(1 << 28) // size), 16)) if device == "cuda" else 2
    xs = [torch.randn(rows, width, device=device).to(dtype).requires_grad_() for _ in range(copies)]
    dys = [torch.randn(rows, width, device=device).to(dtype) for _ in range(copies)]
    weight, bias = (torch.randn(width, device=device).to(dtype).requires_grad_() for _ in range(2))
    out = torch.empty_like(dys[0])
    yield "copy", "forward", 2 * size, lambda call: out.copy_(dys[call % copies])
    for name, norm in contestants(kind, device == "cuda").items():

        def forward(call: int, norm: Norm = norm) -> object:
            with torch.no_grad():
                return norm(xs[call % copies], weight, bias)

        try:
            forward(0)
            made = [norm(x, weight, bias) for x in xs]
            leaves = [weight] if kind == "rms_norm" else [weight, bias]

            def backward(call: int, made: list[Tensor] = made, leaves: list[Tensor] = leaves) -> object:
                at = call % copies
                return torch.autograd.grad(made[at], [xs[at], *leaves], dys[at], retain_graph=True)

            backward(0)
        except Exception as failure:  # a peer that does not take this size
            print(f"  {name} left out: {type(failure).__name__}: {str(failure)[:120]}", file=sys.stderr)
            continue
        yield name, "forward", 2 * size, forward
        yield name, "backward", 3 * size, backward
        if name == "omninorm":
            add = functional.add_rms_norm if kind == "rms_norm" else functional.add_layer_norm
            gains = (weight,) if kind == "rms_norm" else (weight, bias)

            def added(call: int, add: Norm = add, gains: tuple[Tensor, ...] = gains) -> object:
                with torch.no_grad():
                    return add(xs[call % copies], dys[call % copies], *gains, EPS)

            yield name, "add forward", 4 * size, added


def measure(kind: str, dtype: torch.dtype, rows: int, width: int, device: str, rounds: int) -> list[dict[str, Any]]:
    entries = list(steps(kind, dtype, rows, width, device))
    taken: dict[int, list[float]] = {number: [] for number in range(len(entries))}
    for each in entries:
        seconds(each[3], device, 3)
    for _ in range(rounds):
        for number in random.sample(sorted(taken), len(taken)):
            taken[number].append(seconds(entries[number][3], device, 10 if device == "cuda" else 1))
    found = []
    speeds = {number: entries[number][2] / statistics.median(values) / 1e9 for number, values in taken.items()}
    for number, (name, which, _, _) in enumerate(entries):
        share = speeds[number] / speeds[0]
        found.append({"contestant": name, "pass": which, "gb_per_s": speeds[number], "of_copy": share})
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="two widths and bfloat16 only")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("PyTorch sees no GPU here.", file=sys.stderr)
        return 2
    tiny = options.device == "cpu"
    with omninorm.use_backend("triton"):
        wrong = check(options.device)
        print("\n".join(wrong) or "Every kernel is within the numerics contract of float64.")
        result: dict[str, Any] = {
            "device": "interpreter" if tiny else torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "wrong": wrong,
            "rows": options.rows,
            "measured": [],
        }
        for kind in ("rms_norm", "layer_norm"):
            for dtype in ["bf16"] if options.quick or tiny else DTYPES:
                for width in (64,) if tiny else (4096, 16384) if options.quick else WIDTHS:
                    rows = 8 if tiny else options.rows
                    print(f"{kind} {dtype} {rows} × {width}")
                    measured = measure(kind, DTYPES[dtype], rows, width, options.device, 1 if tiny else options.rounds)
                    for each in measured:
                        print(
                            f"  {each['contestant']:14} {each['pass']:12} {each['gb_per_s']:8.1f} GB/s"
                            f"  {each['of_copy']:5.2f} of copying"
                        )
                        result["measured"].append({"norm": kind, "dtype": dtype, "width": width, **each})
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
        print(f"Written to {options.json}")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
