"""Limits of a model's size, checked before anything is built."""

from __future__ import annotations

from omninorm.errors import ConfigError
from omninorm.memory import memory_limit
from omninorm.thinker import ThinkerConfig
from omninorm.thinker.sizes import count_weights

# Building a block takes milliseconds at any width, so a huge number of small blocks would take minutes.
MOST_BLOCKS = 10_000
_FLOAT32 = 4


def check_model(config: ThinkerConfig) -> None:
    """Refuse a model with too many blocks, or whose weights are larger than the memory that this process may use.

    Raises:
        ConfigError: it is too large.
    """
    if config.n_layers > MOST_BLOCKS:
        received = f"{config.n_layers!s:.40}"
        raise ConfigError(f"n_layers must be at most {MOST_BLOCKS:,}", received, "choose fewer blocks")
    available = memory_limit()
    if available is not None and _FLOAT32 * count_weights(config) > available:
        raise does_not_fit(config)


def does_not_fit(config: ThinkerConfig) -> ConfigError:
    """Return the error for a model that is larger than the memory."""
    received = f"d_model={config.d_model}, n_layers={config.n_layers}, vocab_size={config.vocab_size}"
    return ConfigError("The model must fit in memory", received, "choose a smaller model")
