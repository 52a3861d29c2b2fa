"""The precision that a run's settings ask for, to compare it with what is measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Keys of Lightning, Accelerate and many scripts, in the order in which they are trusted; "bf16" and "fp16" are
# transformers' switches.
NAMES = ("precision", "mixed_precision")
DTYPES = {
    **dict.fromkeys(("bf16", "bfloat16"), "bfloat16"),
    **dict.fromkeys(("fp16", "float16", "16", "half"), "float16"),
}


def expected_dtype(settings: Mapping[str, Any]) -> str | None:
    """Return "bfloat16" or "float16" if the settings ask for 16 bits, with autocast or throughout; None otherwise."""
    for name in NAMES:
        if name in settings:
            return _dtype_of(settings[name])
    asked = [DTYPES[name] for name in ("bf16", "fp16") if settings.get(name) is True]
    return asked[0] if asked else None


def _dtype_of(value: object) -> str | None:
    """Return the dtype of a value such as "bf16-mixed", 16 or "torch.bfloat16"."""
    words = str(value).lower().removeprefix("torch.")
    return DTYPES.get(words.removesuffix("-mixed").removesuffix("-true"))
