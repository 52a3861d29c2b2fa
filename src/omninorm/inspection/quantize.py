"""Sums of squared rounding errors of absmax quantization."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import pad

_GROUP = 32


def int8_error(rows: Tensor, row_max: Tensor) -> float:
    """Return Σ (w − s·round(w/s))² with s = max|row| / 127, over rows [n, columns]; row_max: [n]."""
    return _rounding_error(rows, row_max / 127)


def int4_error(rows: Tensor) -> float:
    """Return Σ (w − s·round(w/s))² with s = max|group| / 7, over groups of 32 in rows [n, columns]."""
    return absmax_error(rows, 4)


def absmax_error(rows: Tensor, width: int) -> float:
    """Return Σ (w − s·round(w/s))² with s = max|group| / (2^(width − 1) − 1), over groups of 32 in rows."""
    ragged = -rows.shape[1] % _GROUP
    groups = (pad(rows, (0, ragged)) if ragged else rows).reshape(-1, _GROUP)
    levels = max(1, 2 ** (width - 1) - 1)
    return _rounding_error(groups, groups.abs().amax(1) / levels)  # aminmax is several times slower


def _rounding_error(rows: Tensor, scale: Tensor) -> float:
    # A row of zeros has no error, so any divisor will do.
    scaled = rows / scale.masked_fill(scale == 0, 1.0).unsqueeze(1)
    error = scaled.sub_(scaled.round()).square_().sum(1)
    return float((error.double() * scale.double().square()).sum())
