"""The GPU back end: omninorm's operators for CUDA and ROCm, by the Triton kernels of `triton_norms`.

PyTorch builds for GPUs include Triton, which is imported when a norm first needs it. With TRITON_INTERPRET=1 in the
environment, Triton's interpreter computes CPU tensors in `use_backend("triton")`: slowly, but with the same kernels.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from omninorm.kernels import autograd, reference
from omninorm.kernels.autograd import rows_per_block

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
OLDEST_TRITON = (3, 3)

# Numbers of four bytes that a program holds of a tensor: rows are whole up to the widest, wider ones come in steps, and
# of narrow ones there are several. Wider tiles would not fit into the registers.
WIDEST, WIDEST_BACKWARD, STEP, SEVERAL = 16384, 8192, 4096, 2048
# A tile of `column_totals`.
COLUMNS, BLOCKS = 128, 32


@cache
def unavailable() -> str:
    """Return why the kernels can't be used, assuming that the machine has a GPU; empty if they can."""
    for name in ("triton", "pytorch-triton-rocm", "triton-windows"):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        found = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
        if found < OLDEST_TRITON:
            return f"Triton {version} is too old, version {'.'.join(map(str, OLDEST_TRITON))} or later is needed"
        return ""
    return "Triton is not installed"


def device() -> str:
    """Return the name of the device that the kernels run on; empty if there is none."""
    if INTERPRETED:
        return "Triton's interpreter"
    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


# The operators ---------------------------------------------------------------------------------------------------


class Tile(NamedTuple):
    """The launch parameters of a kernel; see `triton_norms`."""

    WHOLE: bool
    ROWS: int
    BLOCK: int
    num_warps: int


def most_warps(kind: str) -> int:
    """A program has 1,024 threads at most; AMD's warps ("gfx") have 64."""
    return 16 if kind == "gfx" else 32


_MOST_WARPS = most_warps("gfx" if torch.version.hip else "sm")


def tile(width: int, dtype: torch.dtype, backward: bool, most_warps: int = _MOST_WARPS) -> Tile:
    """Return the tile for rows of a width; it depends on the width only, so that sums have one order."""
    scale = reference.compute_dtype(dtype).itemsize // 4
    whole = width <= (WIDEST_BACKWARD if backward else WIDEST) // scale**2
    block = max(16, 1 << (width - 1).bit_length()) if whole else STEP // scale
    rows = max(1, SEVERAL // scale // block)
    return Tile(whole, rows, block, min(most_warps, max(4, rows * block * scale // 512)))


class Rows(NamedTuple):
    """A tensor as rows, features side by side; a copy only where its strides demand it."""

    values: Tensor
    number: int
    width: int
    stride: int


def as_rows(x: Tensor) -> Rows:
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(1) != 1 and rows.shape[1] > 1:
        rows = rows.contiguous()
    return Rows(rows, rows.shape[0], rows.shape[1], rows.stride(0))


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float,
    centered: bool, keep: bool, **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y, x + residual (or x), μ and r (or x)."""
    rows = as_rows(x)
    others = as_rows(residual) if residual is not None else rows
    y = x.new_empty(x.shape)
    total = x.new_empty(x.shape) if residual is not None else x
    compute = reference.compute_dtype(x.dtype)
    scale = x.new_empty((rows.number,), dtype=compute) if keep else x
    mean = torch.empty_like(scale) if keep and centered else x
    if rows.number:
        options |= {"BIAS": bias is not None} if centered else {}
        shape, settings = _settings(
            rows.width,
            x.dtype,
            eps,
            backward=False,
            ADD=residual is not None,
            GAIN=weight is not None,
            KEEP=keep,
            **options,
        )
        gains = (_dense(weight, x), _dense(bias, x)) if centered else (_dense(weight, x),)
        statistics = (mean, scale) if centered else (scale,)
        kernel = _kernels().layer_norm_forward if centered else _kernels().rms_norm_forward
        with _on(x):
            kernel[-(-rows.number // shape.ROWS),](
                rows.values, others.values, *gains, y, total, *statistics,
                rows.number, rows.width, rows.stride, others.stride, **settings,
            )  # fmt: skip
    return y, total, mean, scale


def _backward(
    dy: Tensor, dtotal: Tensor | None, x: Tensor, mean: Tensor | None, scale: Tensor, weight: Tensor | None,
    bias: Tensor | None, eps: float, wanted: bool, **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, dγ, dβ and the blocks' sums of dγ."""
    rows, dys = as_rows(x), as_rows(dy)
    more = dys if dtotal is None else as_rows(dtotal)
    dx = x.new_empty(x.shape)
    each = rows_per_block(rows.number, triton=True)
    blocks, compute = -(-rows.number // each), reference.compute_dtype(x.dtype)
    gain_learns, bias_learns = wanted and weight is not None, wanted and bias is not None
    of_gain, of_bias = (
        x.new_empty((blocks * learns, rows.width), dtype=compute) for learns in (gain_learns, bias_learns)
    )
    if rows.number:
        statistics = (scale,) if mean is None else (mean, scale)
        sums = (of_gain,) if mean is None else (of_gain, of_bias)
        options |= {"LEARNS": gain_learns} if mean is None else {"GAIN_LEARNS": gain_learns, "BIAS_LEARNS": bias_learns}
        _, settings = _settings(
            rows.width, x.dtype, eps, backward=True, ADD=dtotal is not None, GAIN=weight is not None, **options
        )
        kernel = _kernels().rms_norm_backward if mean is None else _kernels().layer_norm_backward
        with _on(x):
            kernel[blocks,](
                dys.values, more.values, rows.values, *statistics, _dense(weight, x), dx, *sums,
                rows.number, rows.width, each, dys.stride, more.stride, rows.stride, **settings,
            )  # fmt: skip
    return dx, _total(of_gain, weight, gain_learns), _total(of_bias, bias, bias_learns), of_gain


def _total(blocks: Tensor, gain: Tensor | None, learns: bool) -> Tensor:
    """The sum over the blocks, in the gain's dtype."""
    if gain is None:
        return blocks.new_empty((0,), dtype=torch.float32)
    if not learns:
        return gain.new_empty((0,))
    count, width = blocks.shape
    total = gain.new_zeros((width,))
    if count:
        with _on(blocks):
            _kernels().column_totals[-(-width // COLUMNS),](
                blocks,
                total,
                count,
                width,
                ROWS=BLOCKS,
                BLOCK=COLUMNS,
                num_warps=4,
                enable_fp_fusion=False,
            )
    return total


def _dense(gain: Tensor | None, x: Tensor) -> Tensor:
    """γ or β with its elements side by side, or anything where there is none."""
    return x if gain is None else gain.contiguous()


@lru_cache(maxsize=4096)
def _settings(
    width: int, dtype: torch.dtype, eps: float, *, backward: bool, **options: Any
) -> tuple[Tile, dict[str, Any]]:
    """Return the launch options of a kernel; the same for all its calls in a model."""
    import triton.language as tl

    shape = tile(width, dtype, backward)
    compute = tl.float64 if dtype == torch.float64 else tl.float32
    settings = {"EPS": eps, "LEAST": math.sqrt(eps), "C": compute, **options, **shape._asdict()}
    # The compiler fuses no multiplications and additions: what is to be rounded once is written so.
    return shape, {**settings, "enable_fp_fusion": False}


def _on(x: Tensor) -> Any:
    """Kernels are launched on the current device; the interpreter's numpy need not tell of overflows."""
    if x.is_cuda:
        return torch.cuda.device(x.device)
    import numpy

    return numpy.errstate(all="ignore")


@cache
def _kernels() -> Any:
    from omninorm.kernels import triton_norms

    return triton_norms


def _rms_options(gain_offset: float = 0.0, round_first: bool = False) -> dict[str, Any]:
    return {"OFFSET": gain_offset, "ROUND_FIRST": round_first}


def _rms_norm_forward(x: Tensor, weight: Tensor | None, eps: float, *more: Any) -> tuple[Tensor, ...]:
    y, _, _, scale = _forward(x, None, weight, None, eps, False, True, **_rms_options(*more))
    return y, scale


def _add_rms_norm_forward(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, *more: Any
) -> tuple[Tensor, ...]:
    y, total, _, scale = _forward(x, residual, weight, None, eps, False, True, **_rms_options(*more))
    return y, total, scale


def _rms_norm_backward_blocks(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    eps: float,
    gain_offset: float = 0.0,
    round_first: bool = False,
    wanted: bool = True,
) -> tuple[Tensor, ...]:
    options = _rms_options(gain_offset, round_first)
    dx, dweight, _, blocks = _backward(dy, dtotal, x, None, scale, weight, None, eps, wanted, **options)
    return dx, dweight, blocks.double()


def _layer_norm_forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, ...]:
    y, _, mean, scale = _forward(x, None, weight, bias, eps, True, True)
    return y, mean, scale


def _add_layer_norm_forward(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, ...]:
    return _forward(x, residual, weight, bias, eps, True, True)


def _layer_norm_backward_blocks(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    mean: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    wanted: bool = True,
) -> tuple[Tensor, ...]:
    dx, dweight, dbias, blocks = _backward(dy, dtotal, x, mean, scale, weight, bias, eps, wanted)
    return dx, dweight, dbias, blocks.double()


OPERATORS: dict[str, Callable[..., Any]] = {
    "rms_norm": lambda x, weight, eps, *more: _forward(x, None, weight, None, eps, False, False, **_rms_options(*more))[
        0
    ],
    "rms_norm_forward": _rms_norm_forward,
    "rms_norm_autograd": _rms_norm_forward,
    "add_rms_norm": lambda x, residual, weight, eps, *more: _forward(
        x, residual, weight, None, eps, False, False, **_rms_options(*more)
    )[:2],
    "add_rms_norm_forward": _add_rms_norm_forward,
    "add_rms_norm_autograd": _add_rms_norm_forward,
    "rms_norm_backward": lambda *given: _rms_norm_backward_blocks(*given)[:2],
    "rms_norm_backward_blocks": _rms_norm_backward_blocks,
    "layer_norm": lambda x, weight, bias, eps: _forward(x, None, weight, bias, eps, True, False)[0],
    "layer_norm_forward": _layer_norm_forward,
    "layer_norm_autograd": _layer_norm_forward,
    "add_layer_norm": lambda x, residual, weight, bias, eps: _forward(x, residual, weight, bias, eps, True, False)[:2],
    "add_layer_norm_forward": _add_layer_norm_forward,
    "add_layer_norm_autograd": _add_layer_norm_forward,
    "layer_norm_backward": lambda *given: _layer_norm_backward_blocks(*given)[:3],
    "layer_norm_backward_blocks": _layer_norm_backward_blocks,
}


def register(device: str) -> Any:
    """Register these as a device's operators, for the lifetime of the returned library."""
    library: Any = torch.library.Library("omninorm", "IMPL", device)  # type: ignore[no-untyped-call]
    for name, operator in OPERATORS.items():
        library.impl(name, operator, allow_override=True)
    return library


_registered = register("CUDA")


@contextmanager
def emulated() -> Iterator[None]:
    """Let Triton's interpreter compute CPU tensors inside the block."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)  # that one takes a place
        library = register("CPU")
    before, autograd.emulated = autograd.emulated, True
    try:
        yield
    finally:
        autograd.emulated = before
        library._destroy()
