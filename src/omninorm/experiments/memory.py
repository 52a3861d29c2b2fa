"""Limits for the size of a model and of a training step; if possible, they are checked before anything is built."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from omninorm.errors import ConfigError, OmninormError
from omninorm.experiments.settings import TrainConfig
from omninorm.memory import memory_limit
from omninorm.thinker import ThinkerConfig
from omninorm.thinker.sizes import count_weights

# Building a block takes milliseconds at any width, so a huge number of small blocks would take minutes.
MOST_BLOCKS = 10_000
_FLOAT32 = 4
_NO_MEMORY = "allocate|overflow|out of memory"


def check_model(config: ThinkerConfig) -> None:
    """Raise ConfigError for a model with too many blocks, or with weights larger than the memory available here."""
    if config.n_layers > MOST_BLOCKS:
        received = f"{config.n_layers!s:.40}"
        raise ConfigError(f"n_layers must be at most {MOST_BLOCKS:,}", received, "choose fewer blocks")
    available = memory_limit()
    if available is not None and _FLOAT32 * count_weights(config) > available:
        raise does_not_fit(config)


def does_not_fit(config: ThinkerConfig) -> ConfigError:
    """Return the error for a model that does not fit in memory."""
    received = f"d_model={config.d_model}, n_layers={config.n_layers}, vocab_size={config.vocab_size}"
    return ConfigError("The model must fit in memory", received, "choose a smaller model")


def step_does_not_fit(config: TrainConfig, device: torch.device) -> ConfigError:
    """Return the error for a training step that does not fit in memory; it suggests half the sequences per batch."""
    batch, parts = config.batch_size, config.grad_accumulation
    where = "memory" if device.type == "cpu" else f"the memory of {device}"
    received = f"batch_size={batch}, seq_len={config.seq_len}"
    if batch == 1:
        remedy = "start a new run with a shorter seq_len or a smaller model"
    else:
        remedy = f"start a new run with batch_size={batch // 2} and grad_accumulation={2 * parts}"
    return ConfigError(f"A training step must fit in {where}", received, remedy)


@contextmanager
def fitting(otherwise: ConfigError) -> Iterator[None]:
    """Raise `otherwise` instead of the error of a failed allocation."""
    try:
        yield
    except OmninormError:
        raise
    except (MemoryError, RuntimeError, TypeError, OverflowError) as error:
        # On a CPU, torch raises a plain RuntimeError, or other types for sizes beyond 64 bits.
        if not isinstance(error, (MemoryError, OverflowError)) and not re.search(_NO_MEMORY, str(error), re.IGNORECASE):
            raise
        raise otherwise from error
