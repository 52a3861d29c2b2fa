"""The precision of training: which one a device gets, autocast, and the scaling of float16's losses."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

PRECISIONS = ("auto", "float32", "bfloat16", "float16")
SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_precision(precision: str, device: torch.device) -> str:
    """Return a precision, with "auto" replaced by the one that suits the device.

    NVIDIA and AMD GPUs get bfloat16 if they compute in it, and float16 otherwise; every other device gets float32.
    """
    if precision != "auto":
        return precision
    if device.type != "cuda":
        return "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Return autocast to bfloat16 or float16, and a context that does nothing for float32."""
    dtype = _AUTOCAST.get(SHORT.get(precision, precision))
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def build_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """Return the scaler of the loss: float16 has too few exponents for gradients. It does nothing in other dtypes."""
    return torch.amp.GradScaler(device.type, enabled=precision == "float16")


@contextlib.contextmanager
def tensor_cores(tf32: bool, device: torch.device) -> Iterator[None]:
    """Let NVIDIA GPUs round the factors of float32 matrix products to TF32 inside the block, if `tf32` is set."""
    if not tf32 or device.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
