"""Shared parts of the protocols: the tokens of a cell, and numbers for JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from omninorm.experiments.compare.cells import Cell
from omninorm.experiments.corpus import Corpus, TokenData, tokenize
from omninorm.experiments.tokenizer import ByteTokenizer

_DIGITS = 9


def tokens_of(cell: Cell, corpus: Corpus) -> TokenData:
    """Return the text as byte tokens, split as in the cell's settings."""
    config = cell.plan.train
    return tokenize(corpus, ByteTokenizer(), config.seq_len, config.eval_bytes)


def check_text(cells: Iterable[Cell], corpus: Corpus) -> None:
    """Raise DataError if the text is too short for a cell's windows or for its held-out part."""
    for config in {(cell.plan.train.seq_len, cell.plan.train.eval_bytes) for cell in cells}:
        tokenize(corpus, ByteTokenizer(), *config)


def plain(value: Any) -> Any:
    """Prepare values for JSON: round numbers to nine digits, and replace non-finite ones by None."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
    return value
