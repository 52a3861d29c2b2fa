"""Every kernel against float64, with the formulas and tolerances of the tests; and what must hold bit for bit.

An error is a share of the allowed one, so at most 1 where the result is right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from helpers import exactness, oracle
from torch import Tensor

import omninorm
from gpu_check import place
from gpu_check.items import Item
from gpu_check.sizes import Sizes
from omninorm import functional

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
EPS = 1e-6
Check = Callable[[str, Sizes], dict[str, Any]]
Made = tuple[Tensor, ...]


def items(device: str, sizes: Sizes, _: Any) -> Iterator[Item]:
    for backend in place.our_backends(device):
        for kind in ("rms_norm", "layer_norm"):
            for dtype in DTYPES:
                name = f"{backend} {kind} {str(dtype).removeprefix('torch.')}"
                yield Item(name, 60.0, _in_backend(backend, device, sizes, _matrix(kind, dtype, backend)))
        # PyTorch's operators promise less for extreme rows, and refuse some arguments; docs/gpu.md lists both.
        for name, check in CHECKS.items() if backend != "torch" else ():
            if name != "more than 2³¹ elements" or sizes.large:
                yield Item(f"{backend} {name}", 60.0, _in_backend(backend, device, sizes, check))


def _in_backend(backend: str, device: str, sizes: Sizes, check: Check) -> Callable[[], dict[str, Any]]:
    def run() -> dict[str, Any]:
        torch.manual_seed(20)
        with omninorm.use_backend(backend):
            return check(device, sizes)

    return run


def randn(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    """Return random rows that are off centre and differ in size from row to row, drawn on the host."""
    rows = torch.exp(torch.randn(*shape[:-1], 1, dtype=torch.float64)) if len(shape) > 1 else 1.0
    return (torch.randn(shape, dtype=torch.float64) * rows + 0.3).to(dtype).to(device)


# Against float64


def _matrix(kind: str, dtype: torch.dtype, backend: str) -> Check:
    """All shapes, with gains of x's dtype, without gains, and by our kernels with gains of float32."""
    gain_dtypes = (dtype, None) if backend == "torch" else (dtype, torch.float32, None)

    def check(device: str, sizes: Sizes) -> dict[str, Any]:
        found = []
        for rows, width in sizes.shapes:
            for gain_dtype in dict.fromkeys(gain_dtypes):
                if gain_dtype is torch.float32 and dtype is torch.float64:
                    continue
                shares = _shares(kind, dtype, gain_dtype, rows, width, device)
                found.append({"rows": rows, "width": width, "gain": str(gain_dtype), **shares})
        return _judged(found)

    return check


def _shares(
    kind: str, dtype: torch.dtype, gain_dtype: torch.dtype | None, rows: int, width: int, device: str
) -> dict[str, float]:
    x, dy = (randn(rows, width, dtype=dtype, device=device) for _ in range(2))
    gains = [None if gain_dtype is None else randn(width, dtype=gain_dtype, device=device) for _ in range(2)]
    if kind == "rms_norm":
        return exactness.rms_norm(x, gains[0], dy)
    return exactness.layer_norm(x, gains[0], gains[1], dy)


def _judged(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the largest share of each result, and a sentence for every case that is wrong."""
    names = [name for name in ("y", "dx", "dgain", "dbias") if any(name in each for each in found)]
    worst = {name: max(each.get(name, 0.0) for each in found) for name in names}
    wrong = [
        f"{name} of {each['rows']}×{each['width']}, gain {each['gain']}, is off by {each[name]:.3g} × the allowed error"
        for each in found
        for name in names
        if not each.get(name, 0.0) <= 1
    ]
    summary = ", ".join(f"{name} {share:.2f}" for name, share in worst.items())
    return {"cases": len(found), "worst": worst, "wrong": wrong, "summary": f"errors over allowed errors: {summary}"}


def gain_offset(device: str, sizes: Sizes) -> dict[str, Any]:
    """Gemma's gain, 1 + γ, in float32."""
    found = []
    for dtype in DTYPES:
        rows, width = sizes.checked
        x, dy = (randn(rows, width, dtype=dtype, device=device) for _ in range(2))
        shares = exactness.rms_norm(x, randn(width, dtype=dtype, device=device), dy, gain_offset=1.0)
        found.append({"rows": rows, "width": width, "gain": str(dtype), **shares})
    return _judged(found)


def extreme_rows(device: str, sizes: Sizes) -> dict[str, Any]:
    """Rows whose squares overflow or vanish, and a large mean with a small spread."""
    found, (rows, width) = [], sizes.checked
    for dtype, scale in ((torch.float32, 1e25), (torch.float32, 1e-30), (torch.float16, 3e3), (torch.bfloat16, 1e30)):
        x = (torch.randn(rows, width, dtype=torch.float64) * scale).to(dtype).to(device)
        dy = randn(rows, width, dtype=dtype, device=device)
        shares = _forward_share(x, dy, "rms_norm")
        found.append({"rows": rows, "width": width, "gain": f"none, x × {scale:g}", **shares})
    for ratio in (1e3, 1e5):
        x = (torch.randn(rows, width, dtype=torch.float64) + ratio).float().to(device)
        shares = _forward_share(x, x, "layer_norm")
        found.append({"rows": rows, "width": width, "gain": f"none, x + {ratio:g}", **shares})
    return _judged(found)


def _forward_share(x: Tensor, dy: Tensor, kind: str) -> dict[str, float]:
    """Return the error of y, and of dx only whether it is finite: where ε is nothing, dx loses its digits."""
    exact, eps = x.double(), oracle.rounded_eps(EPS, x.dtype)
    x = x.requires_grad_()
    norm = functional.rms_norm if kind == "rms_norm" else functional.layer_norm
    y = norm(x, eps=EPS)
    (dx,) = torch.autograd.grad(y, x, dy)
    expected = oracle.rms_norm(exact, None, eps) if kind == "rms_norm" else oracle.layer_norm(exact, None, None, eps)
    return {"y": float(oracle.forward_share(y.detach(), expected)), "dx": 0.0 if bool(dx.isfinite().all()) else 9.0}


def strided(device: str, sizes: Sizes) -> dict[str, Any]:
    """Transposed, sliced and expanded inputs and gradients."""
    wide = randn(8, 2 * 96, dtype=torch.float32, device=device)
    weight = randn(96, dtype=torch.float32, device=device)
    views = {
        "sliced": wide[:, ::2],
        "offset": wide[1::2, 5:101],
        "transposed": randn(96, 8, dtype=torch.float32, device=device).t(),
        "expanded": wide[:1, :96].expand(8, 96),
    }
    found = []
    for name, view in views.items():
        dy = views["sliced"][: view.shape[0]] if name != "expanded" else weight.expand(8, 96)
        found.append({"rows": view.shape[0], "width": 96, "gain": name, **exactness.rms_norm(view, weight, dy)})
        found.append(
            {"rows": view.shape[0], "width": 96, "gain": name, **exactness.layer_norm(view, weight, weight, dy)}
        )
    return _judged(found)


def nonfinite(device: str, sizes: Sizes) -> dict[str, Any]:
    """Infinity and NaN stay in their rows; constant rows give the bias exactly; empty batches give zero gradients."""
    wrong = []
    for bad in (float("inf"), float("nan")):
        x = randn(4, 768, dtype=torch.float32, device=device)
        clean = x.clone()
        x[2, 5] = bad
        for norm in (functional.rms_norm, functional.layer_norm):
            y, expected = norm(x, eps=EPS), norm(clean, eps=EPS)
            same = torch.equal(y[[0, 1, 3]], expected[[0, 1, 3]])
            if not same or not bool(y[2].isnan().any()):
                wrong.append(f"{norm.__name__} with {bad} in a row: other rows are touched, or that row has no NaN")
    bias = randn(768, dtype=torch.float32, device=device)
    constant = functional.layer_norm(torch.full((3, 768), 7.7).to(device), bias, bias, EPS)
    if not torch.equal(constant, bias.expand(3, 768)):
        wrong.append("layer_norm of a constant row is not the bias")
    weight = bias.clone().requires_grad_()
    functional.rms_norm(torch.empty(0, 768).to(device), weight, EPS).sum().backward()
    if bool(weight.grad.any()):
        wrong.append("an empty batch has a gain gradient that is not 0")
    return {"cases": 6, "wrong": wrong}


# Bit for bit


def additions(device: str, sizes: Sizes) -> dict[str, Any]:
    """add_rms_norm and add_layer_norm equal the addition and the norm: results and gradients."""
    wrong = []
    for dtype in DTYPES[:3]:
        for rows, width in sizes.shapes[1:3]:
            for name, gains in (("rms_norm", 1), ("layer_norm", 2)):
                made = [randn(rows, width, dtype=dtype, device=device).requires_grad_() for _ in range(2)]
                made += [randn(width, dtype=dtype, device=device).requires_grad_() for _ in range(gains)]
                along = [randn(rows, width, dtype=dtype, device=device) for _ in range(2)]
                fused = getattr(functional, f"add_{name}")(*made)
                total = made[0] + made[1]
                apart = getattr(functional, name)(total, *made[2:]), total
                ours, theirs = (_with_gradients(each, made, along) for each in (fused, apart))
                if not all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)):
                    wrong.append(f"add_{name} of {dtype} {rows}×{width} differs from the two steps")
    return {"cases": 12, "wrong": wrong}


def _with_gradients(results: Any, leaves: list[Tensor], along: list[Tensor]) -> Made:
    return (*results, *torch.autograd.grad(results, leaves, along, retain_graph=True))


def repeated(device: str, sizes: Sizes) -> dict[str, Any]:
    """Two calls give the same bits, gains' gradients included; a row's results do not depend on the rows around it."""
    wrong = []
    rows, width = sizes.shapes[-1] if device != "cuda" else (4099, 1024)
    for dtype in DTYPES[:3]:
        for name, gains in (("rms_norm", 1), ("layer_norm", 2)):
            x, dy = (randn(rows, width, dtype=dtype, device=device) for _ in range(2))
            weights = [randn(width, dtype=dtype, device=device) for _ in range(gains)]
            first, second = (_passes(name, x, weights, dy) for _ in range(2))
            if not all(torch.equal(a, b) for a, b in zip(first, second, strict=True)):
                wrong.append(f"{name} of {dtype} gives other bits the second time")
            alone = _passes(name, x[-1:], weights, dy[-1:])
            if not (torch.equal(alone[0], first[0][-1:]) and torch.equal(alone[1], first[1][-1:])):
                wrong.append(f"{name} of {dtype}: the last row depends on the batch")
    return {"cases": 6, "wrong": wrong}


def _passes(name: str, x: Tensor, weights: list[Tensor], dy: Tensor) -> Made:
    """Return y, dx and the gains' gradients."""
    leaves = [each.detach().requires_grad_() for each in (x, *weights)]
    y = getattr(functional, name)(*leaves)
    return (y.detach(), *torch.autograd.grad(y, leaves, dy))


def llama_rounding(device: str, sizes: Sizes) -> dict[str, Any]:
    """cast="llama" equals the formula in the order of Llama's code, within a unit of the output dtype."""
    wrong = []
    for dtype in DTYPES[:2]:
        rows, width = sizes.checked
        x, weight = randn(rows, width, dtype=dtype, device=device), randn(width, dtype=dtype, device=device)
        wide = x.float()
        normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(dtype)
        expected = (weight * normed).double()
        y = functional.rms_norm(x, weight, EPS, cast="llama").double()
        # The statistics' roundings may move x̂ by one unit, which the gain multiplies.
        allowed = 2 * oracle.ulp(expected.abs(), dtype)
        if not bool(((y - expected).abs() <= allowed).all()):
            wrong.append(f"cast='llama' of {dtype} differs from Llama's order by more than two units")
    return {"cases": 2, "wrong": wrong}


def large(device: str, sizes: Sizes) -> dict[str, Any]:
    """More than 2³¹ elements: the last rows equal those of a small tensor."""
    width, rows = 4096, 2**31 // 4096 + 512
    x = torch.randn(512, width, device=device, dtype=torch.bfloat16)
    weight = torch.ones(width, device=device, requires_grad=True)
    tall = x.repeat(rows // 512, 1)
    with torch.no_grad():
        y, small = functional.rms_norm(tall, weight, EPS), functional.rms_norm(x, weight, EPS)
        wrong = (
            [] if torch.equal(y[-512:], small) else ["the last rows of rms_norm differ from those of a small tensor"]
        )
        del y
        y, small = functional.layer_norm(tall, weight, None, EPS), functional.layer_norm(x, weight, None, EPS)
    wrong += [] if torch.equal(y[-512:], small) else ["the last rows of layer_norm differ from those of a small tensor"]
    del y, tall
    torch.cuda.empty_cache()
    return {"cases": 2, "wrong": wrong}


CHECKS: dict[str, Check] = {
    "gain offset": gain_offset,
    "extreme rows": extreme_rows,
    "strided inputs": strided,
    "infinity, NaN, constant rows, empty batches": nonfinite,
    "add-norms equal two steps": additions,
    "same bits again, and for a row alone": repeated,
    "Llama's rounding order": llama_rounding,
    "more than 2³¹ elements": large,
}
