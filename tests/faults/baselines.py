"""Detectors to compare with: the loss alone, detect_anomaly, and transformers' DebugUnderflowOverflow."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch

FEWEST, WINDOW, Z = 16, 128, 6.0


def first_nan(losses: Sequence[float]) -> int | None:
    """Return the first step whose loss is NaN or infinite."""
    return next((step for step, loss in enumerate(losses, 1) if not math.isfinite(loss)), None)


def first_outlier(losses: Sequence[float]) -> int | None:
    """Return the first step whose loss is not finite, or more than 6 standard deviations above the last 128 steps."""
    for step, loss in enumerate(losses, 1):
        past = [value for value in losses[max(step - 1 - WINDOW, 0) : step - 1] if math.isfinite(value)]
        if not math.isfinite(loss):
            return step
        if len(past) >= FEWEST and loss > statistics.fmean(past) + Z * statistics.stdev(past):
            return step
    return None


def anomaly_step(training: Any) -> int | None:
    """Return the step at which torch.autograd.detect_anomaly raises, or None."""
    with torch.autograd.detect_anomaly(check_nan=True):
        try:
            training.run()
        except RuntimeError:
            return int(training.step)
    return None


def overflow_step(training: Any) -> int | None:
    """Return the step at which DebugUnderflowOverflow raises, or None."""
    from transformers.debug_utils import DebugUnderflowOverflow

    DebugUnderflowOverflow(training.model)
    try:
        training.run()
    except ValueError:
        return int(training.step)
    return None
