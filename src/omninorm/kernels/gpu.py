"""The GPU back end: omninorm's operators for CUDA and ROCm, implemented by the Triton kernels in `triton_norms`.

PyTorch's builds for GPUs include Triton; it is imported when a norm first needs it. With TRITON_INTERPRET=1 in the
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
from omninorm.kernels.constants import constant_in_graphs

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
OLDEST_TRITON = (3, 3)

# The size of the tiles of `column_totals`.
COLUMNS, BLOCKS = 16, 128


@constant_in_graphs
def unavailable() -> str:
    """Return why the kernels can't be used, assuming that the machine has a GPU; empty if they can."""
    return _unavailable()


@cache
def _unavailable() -> str:
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
    """Return the name of the device that the kernels run on, or an empty string without one."""
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
    """Return the largest number of warps of a program, which has at most 1,024 threads.

    AMD's warps (kind "gfx") have 64 threads, others 32.
    """
    return 16 if kind == "gfx" else 32


_MOST_WARPS = most_warps("gfx" if torch.version.hip else "sm")


class _Limits(NamedTuple):
    """The numbers that determine the tiles of a kernel, measured on an H100; see docs/log.md.

    Args:
        widest: the largest width of rows that a tile holds whole; wider ones do not fit into the registers.
        several: the smallest number of elements of a tile; it holds several rows if they are narrow.
        held: the number of elements per thread.
        steps: rows, columns and warps of the tiles that read wider rows step by step.
    """

    widest: int
    several: int
    held: int
    steps: tuple[int, int, int]


# The keys are the name of the kernel and the size of an element of x in bytes.
_LIMITS = {
    ("rms_norm_forward", 2): _Limits(16384, 2048, 16, (1, 4096, 8)),
    ("rms_norm_forward", 4): _Limits(16384, 2048, 16, (1, 4096, 8)),
    ("rms_norm_forward", 8): _Limits(4096, 1024, 8, (1, 2048, 8)),
    ("layer_norm_forward", 2): _Limits(4096, 2048, 32, (1, 4096, 8)),
    ("layer_norm_forward", 4): _Limits(16384, 2048, 32, (1, 4096, 8)),
    ("layer_norm_forward", 8): _Limits(4096, 1024, 8, (1, 2048, 8)),
    ("rms_norm_backward", 2): _Limits(16384, 4096, 32, (2, 4096, 16)),
    ("rms_norm_backward", 4): _Limits(8192, 2048, 16, (2, 4096, 16)),
    ("rms_norm_backward", 8): _Limits(2048, 1024, 8, (1, 2048, 8)),
    ("layer_norm_backward", 2): _Limits(8192, 2048, 32, (2, 4096, 16)),
    ("layer_norm_backward", 4): _Limits(8192, 2048, 16, (2, 4096, 16)),
    ("layer_norm_backward", 8): _Limits(2048, 1024, 8, (1, 2048, 8)),
}


def tile(kernel: str, width: int, dtype: torch.dtype, most_warps: int = _MOST_WARPS) -> Tile:
    """Return the tile for rows of a width. It depends only on width and dtype, and so does the order of sums."""
    limits = _LIMITS[kernel, dtype.itemsize]
    if width > limits.widest:
        rows, block, warps = limits.steps
        return Tile(False, rows, block, warps)
    block = max(16, 1 << (width - 1).bit_length())
    rows = max(1, limits.several // block)
    return Tile(True, rows, block, min(most_warps, max(4, rows * block // (32 * limits.held))))


class Rows(NamedTuple):
    """A tensor as a matrix of rows whose features are adjacent in memory; a copy only if its strides require one."""

    values: Tensor
    number: int
    width: int
    stride: int


def as_rows(x: Tensor) -> Rows:
    if x.is_contiguous():  # a kernel gets pointers and sizes, so no view is needed
        width = x.shape[-1]
        return Rows(x, x.numel() // width, width, width)
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(1) != 1 and rows.shape[1] > 1:
        rows = rows.contiguous()
    return Rows(rows, rows.shape[0], rows.shape[1], rows.stride(0))


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float,
    centered: bool, keep: bool, **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return y, x + residual, μ and r; tensors that were not computed are replaced by x."""
    rows = as_rows(x)
    others = as_rows(residual) if residual is not None else rows
    y = x.new_empty(x.shape)
    total = x.new_empty(x.shape) if residual is not None else x
    scale = x.new_empty((rows.number,), dtype=reference.compute_dtype(x.dtype)) if keep else x
    mean = torch.empty_like(scale) if keep and centered else x
    if rows.number:
        options |= {"BIAS": bias is not None} if centered else {}
        options |= {"ADD": residual is not None, "GAIN": weight is not None, "KEEP": keep}
        name = "layer_norm_forward" if centered else "rms_norm_forward"
        plan = _plan(name, rows.width, x.dtype, eps, tuple(options.items()))
        gains = (_dense(weight, x), _dense(bias, x)) if centered else (_dense(weight, x),)
        statistics = (mean, scale) if centered else (scale,)
        plan.launch(
            (-(-rows.number // plan.rows), 1),
            (rows.values, others.values, *gains, y, total, *statistics),
            (rows.number, rows.width, rows.stride, others.stride),
        )
    return y, total, mean, scale


def _backward(
    dy: Tensor, dtotal: Tensor | None, x: Tensor, mean: Tensor | None, scale: Tensor, weight: Tensor | None,
    bias: Tensor | None, eps: float, wanted: bool, **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return dx, dγ, dβ and the block sums of dγ."""
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
        options |= {"LEARNS": gain_learns} if mean is None else {"GAIN_LEARNS": gain_learns, "BIAS_LEARNS": bias_learns}
        options |= {"ADD": dtotal is not None, "GAIN": weight is not None}
        name = "rms_norm_backward" if mean is None else "layer_norm_backward"
        statistics = (scale,) if mean is None else (mean, scale)
        sums = (of_gain,) if mean is None else (of_gain, of_bias)
        _plan(name, rows.width, x.dtype, eps, tuple(options.items())).launch(
            (blocks, 1),
            (dys.values, more.values, rows.values, *statistics, _dense(weight, x), dx, *sums),
            (rows.number, rows.width, each, dys.stride, more.stride, rows.stride),
        )
    return dx, *_totals(of_gain, of_bias, weight, bias, wanted), of_gain


def _totals(
    of_gain: Tensor, of_bias: Tensor, gain: Tensor | None, bias: Tensor | None, wanted: bool
) -> tuple[Tensor, Tensor]:
    """Return dγ and dβ, the sums over the blocks, in the dtypes of gain and bias; those not needed are empty."""
    width, totals, learning = of_gain.shape[1], [], []
    for blocks, each in ((of_gain, gain), (of_bias, bias)):
        if each is None:
            totals.append(of_gain.new_empty((0,), dtype=torch.float32))
        elif not wanted:
            totals.append(each.new_empty((0,)))
        else:
            totals.append(each.new_empty((width,)))
            learning.append((blocks, totals[-1]))
    if learning and not learning[0][0].shape[0]:
        for _, total in learning:
            total.zero_()
    elif learning:
        (first, total), (second, other) = learning[0], learning[-1]
        programs = -(-width // COLUMNS), len(learning)
        _plan_of_totals().launch(programs, (first, second, total, other), (first.shape[0], width))
    return totals[0], totals[1]


def _dense(gain: Tensor | None, x: Tensor) -> Tensor:
    """Return γ or β, contiguous. If there is none, return x: the kernel gets a pointer that it does not read."""
    return x if gain is None else gain.contiguous()


class Plan:
    """A kernel with its compile-time options, and a cache of the variants that Triton compiled so far.

    Triton compiles one variant for each combination of dtypes and alignments of pointers and divisibilities of numbers.
    Its own search for the variant, in each call, takes longer than most norms; `launch` uses the cache instead.
    """

    def __init__(self, kernel: Any, settings: dict[str, Any], rows: int) -> None:
        self.rows = rows
        self._kernel, self._settings = kernel, settings
        self._constants = tuple(settings[name] for name in kernel.arg_names if name in settings)
        self._compiled: dict[Any, Any] = {}

    def launch(self, programs: tuple[int, int], tensors: tuple[Tensor, ...], numbers: tuple[int, ...]) -> None:
        """Run the kernel on the device of the first tensor."""
        first = tensors[0]
        if INTERPRETED or first.device.index != torch.cuda.current_device():
            with _on(first):
                self._kernel[programs](*tensors, *numbers, **self._settings)
            return
        key = (
            first.device.index,
            *((each.dtype, each.data_ptr() & 15 == 0) for each in tensors),
            *((number & 15 == 0, number == 1, number > _LARGEST_INT) for number in numbers),
        )
        compiled = self._compiled.get(key)
        if compiled is None:
            self._compiled[key] = self._kernel[programs](*tensors, *numbers, **self._settings)
        else:
            compiled[programs[0], programs[1], 1](*tensors, *numbers, *self._constants)


_LARGEST_INT = 2**31 - 1


@lru_cache(maxsize=4096)
def _plan(name: str, width: int, dtype: torch.dtype, eps: float, options: tuple[tuple[str, Any], ...]) -> Plan:
    """Return the plan of a kernel, the same object for the same arguments."""
    import triton.language as tl

    shape = tile(name, width, dtype)
    compute = tl.float64 if dtype == torch.float64 else tl.float32
    settings = {"EPS": eps, "LEAST": math.sqrt(eps), "C": compute, **dict(options), **shape._asdict()}
    kernel = getattr(_kernels(), name)
    if "EVEN" in kernel.arg_names:
        settings["EVEN"] = shape.WHOLE and width == shape.BLOCK
    return Plan(kernel, {**settings, **_COMPILER}, shape.ROWS)


@cache
def _plan_of_totals() -> Plan:
    return Plan(_kernels().column_totals, {"ROWS": BLOCKS, "BLOCK": COLUMNS, "num_warps": 4, **_COMPILER}, BLOCKS)


# The compiler must not fuse multiplications and additions: where one rounding is meant, the kernels call fma.
_COMPILER = {"enable_fp_fusion": False}


def _on(x: Tensor) -> Any:
    """Return a context that makes x's device the current one, on which kernels are launched.

    For the interpreter, the context suppresses NumPy's warnings of overflows.
    """
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


def _rms_norm_backward(
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
    return _backward(dy, dtotal, x, None, scale, weight, None, eps, wanted, **options)


def _rms_norm_backward_blocks(*given: Any) -> tuple[Tensor, ...]:
    dx, dweight, _, blocks = _rms_norm_backward(*given)
    return dx, dweight, blocks.double()


def _layer_norm_forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, ...]:
    y, _, mean, scale = _forward(x, None, weight, bias, eps, True, True)
    return y, mean, scale


def _add_layer_norm_forward(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, ...]:
    return _forward(x, residual, weight, bias, eps, True, True)


def _layer_norm_backward(
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
    return _backward(dy, dtotal, x, mean, scale, weight, bias, eps, wanted)


def _layer_norm_backward_blocks(*given: Any) -> tuple[Tensor, ...]:
    dx, dweight, dbias, blocks = _layer_norm_backward(*given)
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
    "rms_norm_backward": lambda *given: _rms_norm_backward(*given)[:2],
    "rms_norm_backward_blocks": _rms_norm_backward_blocks,
    "layer_norm": lambda x, weight, bias, eps: _forward(x, None, weight, bias, eps, True, False)[0],
    "layer_norm_forward": _layer_norm_forward,
    "layer_norm_autograd": _layer_norm_forward,
    "add_layer_norm": lambda x, residual, weight, bias, eps: _forward(x, residual, weight, bias, eps, True, False)[:2],
    "add_layer_norm_forward": _add_layer_norm_forward,
    "add_layer_norm_autograd": _add_layer_norm_forward,
    "layer_norm_backward": lambda *given: _layer_norm_backward(*given)[:3],
    "layer_norm_backward_blocks": _layer_norm_backward_blocks,
}


def register(device: str) -> Any:
    """Register this module's operators for a device, as long as the returned library exists."""
    library: Any = torch.library.Library("omninorm", "IMPL", device)  # type: ignore[no-untyped-call]
    for name, operator in OPERATORS.items():
        library.impl(name, operator, allow_override=True)
    return library


_registered = register("CUDA")


@contextmanager
def emulated() -> Iterator[None]:
    """Compute CPU tensors with Triton's interpreter inside the block."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)  # an override
        library = register("CPU")
    before, autograd.emulated = autograd.emulated, True
    try:
        yield
    finally:
        autograd.emulated = before
        library._destroy()
