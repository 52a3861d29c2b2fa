"""The cases of the numerics. Each compares one call of a norm with float64 or with another call, and can run alone.

A case returns the largest errors as shares of the allowed errors, or sentences about faults.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from helpers import exactness, oracle
from torch import Tensor

from gpu_check.sizes import Sizes
from omninorm import functional

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
EPS = 1e-6
NORMS = {"rms_norm": 1, "layer_norm": 2}  # the norms and the numbers of their gains
Case = Callable[[], dict[str, Any] | list[str]]
Made = tuple[Tensor, ...]


def randn(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    """Return random rows, drawn on the host, whose means are not 0 and whose sizes differ."""
    rows = torch.exp(torch.randn(*shape[:-1], 1, dtype=torch.float64)) if len(shape) > 1 else 1.0
    return (torch.randn(shape, dtype=torch.float64) * rows + 0.3).to(dtype).to(device)


# Against float64


def matrix(kind: str, dtype: torch.dtype, only_own_gains: bool, device: str, sizes: Sizes) -> Iterator[Case]:
    """Yield all shapes, with gains of x's dtype, without gains, and with gains of float32 where they are supported."""
    gain_dtypes = dict.fromkeys((dtype, None) if only_own_gains else (dtype, torch.float32, None))
    for rows, width in sizes.shapes:
        for gain_dtype in gain_dtypes:
            if not (gain_dtype is torch.float32 and dtype is torch.float64):
                yield partial(_compare, kind, dtype, gain_dtype, rows, width, device)


def _compare(
    kind: str, dtype: torch.dtype, gain_dtype: torch.dtype | None, rows: int, width: int, device: str
) -> dict[str, Any]:
    x, dy = (randn(rows, width, dtype=dtype, device=device) for _ in range(2))
    gains = [None if gain_dtype is None else randn(width, dtype=gain_dtype, device=device) for _ in range(2)]
    shares = (
        exactness.rms_norm(x, gains[0], dy) if kind == "rms_norm" else exactness.layer_norm(x, gains[0], gains[1], dy)
    )
    return {"case": f"{rows}×{width}, gain {gain_dtype}", **shares}


def gain_offset(device: str, sizes: Sizes) -> Iterator[Case]:
    """Yield Gemma's gain, 1 + γ, in float32."""
    for dtype in DTYPES:
        yield partial(_offset, dtype, *sizes.checked, device)


def _offset(dtype: torch.dtype, rows: int, width: int, device: str) -> dict[str, Any]:
    x, dy = (randn(rows, width, dtype=dtype, device=device) for _ in range(2))
    shares = exactness.rms_norm(x, randn(width, dtype=dtype, device=device), dy, gain_offset=1.0)
    return {"case": f"{rows}×{width} of {dtype}", **shares}


def extreme_rows(device: str, sizes: Sizes) -> Iterator[Case]:
    """Yield rows whose squares overflow or underflow, and rows with a large mean and a small spread."""
    for dtype, scale in ((torch.float32, 1e25), (torch.bfloat16, 1e30), (torch.float32, 1e-30), (torch.float16, 3e3)):
        yield partial(_extreme, "rms_norm", dtype, scale, 0.0, *sizes.checked, device)
    for ratio in (1e3, 1e5):
        yield partial(_extreme, "layer_norm", torch.float32, 1.0, ratio, *sizes.checked, device)


def _extreme(
    kind: str, dtype: torch.dtype, scale: float, mean: float, rows: int, width: int, device: str
) -> dict[str, Any]:
    """Return the error of y; for dx, only whether it is finite, since it loses its digits if ε is negligible."""
    x = (torch.randn(rows, width, dtype=torch.float64) * scale + mean).to(dtype).to(device)
    dy = randn(rows, width, dtype=dtype, device=device)
    exact, eps = x.double(), oracle.rounded_eps(EPS, dtype)
    x.requires_grad_()
    y = getattr(functional, kind)(x, eps=EPS)
    (dx,) = torch.autograd.grad(y, x, dy)
    expected = oracle.rms_norm(exact, None, eps) if kind == "rms_norm" else oracle.layer_norm(exact, None, None, eps)
    share = float(oracle.forward_share(y.detach(), expected))
    return {"case": f"{kind} of x × {scale:g} + {mean:g}", "y": share, "dx": 0.0 if bool(dx.isfinite().all()) else 9.0}


def strided(device: str, _: Sizes) -> Iterator[Case]:
    """Yield transposed, sliced and expanded inputs and gradients."""
    for name in ("sliced", "offset", "transposed", "expanded"):
        for kind in NORMS:
            yield partial(_strided, name, kind, device)


def _strided(name: str, kind: str, device: str) -> dict[str, Any]:
    wide = randn(8, 2 * 96, dtype=torch.float32, device=device)
    weight = randn(96, dtype=torch.float32, device=device)
    views: dict[str, Callable[[], Tensor]] = {
        "sliced": lambda: wide[:, ::2],
        "offset": lambda: wide[1::2, 5:101],
        "transposed": lambda: randn(96, 8, dtype=torch.float32, device=device).t(),
        "expanded": lambda: wide[:1, :96].expand(8, 96),
    }
    view = views[name]()
    dy = wide[: view.shape[0], ::2] if name != "expanded" else weight.expand(8, 96)
    shares = (
        exactness.rms_norm(view, weight, dy) if kind == "rms_norm" else exactness.layer_norm(view, weight, weight, dy)
    )
    return {"case": f"{kind}, {name}", **shares}


# Values that are known exactly


def nonfinite(device: str, _: Sizes) -> Iterator[Case]:
    """Yield rows with infinity or NaN, constant rows, and empty batches."""
    for kind in NORMS:
        for bad in (float("inf"), float("nan")):
            yield partial(_nonfinite, kind, bad, device)
    yield partial(_constant, device)
    yield partial(_empty, device)


def _nonfinite(kind: str, bad: float, device: str) -> list[str]:
    x = randn(4, 768, dtype=torch.float32, device=device)
    clean = x.clone()
    x[2, 5] = bad
    norm = getattr(functional, kind)
    y, expected = norm(x, eps=EPS), norm(clean, eps=EPS)
    same = torch.equal(y[[0, 1, 3]], expected[[0, 1, 3]])
    if same and bool(y[2].isnan().any()):
        return []
    return [f"{kind} with {bad} in a row: other rows are touched, or that row has no NaN"]


def _constant(device: str) -> list[str]:
    bias = randn(768, dtype=torch.float32, device=device)
    y = functional.layer_norm(torch.full((3, 768), 7.7).to(device), bias, bias, EPS)
    return [] if torch.equal(y, bias.expand(3, 768)) else ["layer_norm of a constant row is not the bias"]


def _empty(device: str) -> list[str]:
    weight = randn(768, dtype=torch.float32, device=device).requires_grad_()
    functional.rms_norm(torch.empty(0, 768).to(device), weight, EPS).sum().backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    return ["an empty batch has a gain gradient that is not 0"] if bool(weight.grad.any()) else []


# Bit for bit


def additions(device: str, sizes: Sizes) -> Iterator[Case]:
    """Yield add_rms_norm and add_layer_norm, whose results and gradients must equal those of addition and norm."""
    for dtype in DTYPES[:3]:
        for rows, width in sizes.shapes[1:3]:
            for kind in NORMS:
                yield partial(_addition, kind, dtype, rows, width, device)


def _addition(kind: str, dtype: torch.dtype, rows: int, width: int, device: str) -> list[str]:
    made = [randn(rows, width, dtype=dtype, device=device).requires_grad_() for _ in range(2)]
    made += [randn(width, dtype=dtype, device=device).requires_grad_() for _ in range(NORMS[kind])]
    along = [randn(rows, width, dtype=dtype, device=device) for _ in range(2)]
    fused = getattr(functional, f"add_{kind}")(*made)
    total = made[0] + made[1]
    apart = getattr(functional, kind)(total, *made[2:]), total
    ours, theirs = (_with_gradients(each, made, along) for each in (fused, apart))
    if all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)):
        return []
    return [f"add_{kind} of {dtype} {rows}×{width} differs from the two steps"]


def _with_gradients(results: Any, leaves: list[Tensor], along: list[Tensor]) -> Made:
    return (*results, *torch.autograd.grad(results, leaves, along, retain_graph=True))


def repeated(device: str, sizes: Sizes) -> Iterator[Case]:
    """Yield two calls, which must give the same bits (also of gains' gradients), and a row alone and in its batch."""
    rows, width = sizes.shapes[-1] if device != "cuda" else (4099, 1024)
    for dtype in DTYPES[:3]:
        for kind in NORMS:
            yield partial(_repeated, kind, dtype, rows, width, device)


def _repeated(kind: str, dtype: torch.dtype, rows: int, width: int, device: str) -> list[str]:
    wrong = []
    x, dy = (randn(rows, width, dtype=dtype, device=device) for _ in range(2))
    weights = [randn(width, dtype=dtype, device=device) for _ in range(NORMS[kind])]
    first, second = (_passes(kind, x, weights, dy) for _ in range(2))
    if not all(torch.equal(a, b) for a, b in zip(first, second, strict=True)):
        wrong.append(f"{kind} of {dtype} gives other bits the second time")
    alone = _passes(kind, x[-1:], weights, dy[-1:])
    if not (torch.equal(alone[0], first[0][-1:]) and torch.equal(alone[1], first[1][-1:])):
        wrong.append(f"{kind} of {dtype}: the last row depends on the batch")
    return wrong


def _passes(kind: str, x: Tensor, weights: list[Tensor], dy: Tensor) -> Made:
    """Return y, dx and the gains' gradients."""
    leaves = [each.detach().requires_grad_() for each in (x, *weights)]
    y = getattr(functional, kind)(*leaves)
    return (y.detach(), *torch.autograd.grad(y, leaves, dy))


def llama_rounding(device: str, sizes: Sizes) -> Iterator[Case]:
    """Yield cast="llama", which must equal the formula in the order of Llama's code within two units."""
    for dtype in DTYPES[:2]:
        yield partial(_llama, dtype, *sizes.checked, device)


def _llama(dtype: torch.dtype, rows: int, width: int, device: str) -> list[str]:
    x, weight = randn(rows, width, dtype=dtype, device=device), randn(width, dtype=dtype, device=device)
    wide = x.float()
    normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(dtype)
    expected = (weight * normed).double()
    y = functional.rms_norm(x, weight, EPS, cast="llama").double()
    # The rounding of the statistics may change x̂ by one unit, which the gain multiplies.
    allowed = 2 * oracle.ulp(expected.abs(), dtype)
    if bool(((y - expected).abs() <= allowed).all()):
        return []
    return [f"cast='llama' of {dtype} differs from Llama's order by more than two units"]


def large(device: str, _: Sizes) -> Iterator[Case]:
    """Yield tensors of more than 2³¹ elements, whose last rows must equal those of a small tensor."""
    for kind in NORMS:
        yield partial(_large, kind, device)


def _large(kind: str, device: str) -> list[str]:
    width, rows = 4096, 2**31 // 4096 + 512
    x = torch.randn(512, width, device=device, dtype=torch.bfloat16)
    gains = [torch.ones(width, device=device), None][: NORMS[kind]]
    tall = x.repeat(rows // 512, 1)
    norm = getattr(functional, kind)
    same = torch.equal(norm(tall, *gains, eps=EPS)[-512:], norm(x, *gains, eps=EPS))
    del tall
    torch.cuda.empty_cache()
    return [] if same else [f"the last rows of {kind} differ from those of a small tensor"]
