"""The precision of training: its default for a device, autocast, and the loss scaling of float16."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

PRECISIONS = ("auto", "float32", "bfloat16", "float16")
SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_precision(precision: str, device: torch.device) -> str:
    """Return the precision; "auto" is replaced by the default for the device.

    The default is bfloat16 on NVIDIA and AMD GPUs that support it, float16 on others, and float32 on all other devices.
    """
    if precision != "auto":
        return precision
    if device.type != "cuda":
        return "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Return a context with autocast to bfloat16 or float16; for float32 it does nothing."""
    dtype = _AUTOCAST.get(SHORT.get(precision, precision))
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def build_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """Return the loss scaler, which float16 needs because of its small range; for other dtypes it does nothing."""
    return torch.amp.GradScaler(device.type, enabled=precision == "float16")


@contextlib.contextmanager
def tensor_cores(tf32: bool, device: torch.device) -> Iterator[None]:
    """Round the factors of float32 matrix products on NVIDIA GPUs to TF32 inside the block, if `tf32` is true."""
    if not tf32 or device.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
