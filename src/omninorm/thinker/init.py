"""Weight initialization."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from omninorm.placement import init_gain, normalize_weights
from omninorm.thinker.attention import Attention
from omninorm.thinker.config import ThinkerConfig
from omninorm.thinker.feed_forward import FeedForward

_ATTENTION_ROLES = ("q", "k", "v", "out")


@torch.no_grad()
def init_weights(model: nn.Module, config: ThinkerConfig) -> None:
    """Draw every matrix from torch's global generator; the norms keep the initialization that they were built with.

    "xavier": normal with variance 2/(fan_in + fan_out), and std d_model^−½ for the embedding. "normal": std `init_std`
    for all matrices. After that, `scaled_init` divides the matrices that write to the residual stream by √(2·n_layers),
    and the placement multiplies by its factor (`omninorm.placement.init_gain`).

    The order of the draws does not depend on the norm or its placement. So with the same seed, runs that differ only
    in these have the same initial weights up to constant factors; "ngpt" also scales them to unit length.
    """
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=config.d_model**-0.5 if config.init == "xavier" else config.init_std)
        elif isinstance(module, nn.Linear):
            _draw(module.weight, config)
    for module in model.modules():
        if isinstance(module, Attention):
            for role in _ATTENTION_ROLES:
                _scale(getattr(module, role).weight, config, role, writes=role == "out")
        elif isinstance(module, FeedForward):
            for linear in (part for part in module.children() if isinstance(part, nn.Linear)):
                _scale(linear.weight, config, "feed_forward", writes=linear is module.down)
    normalize_weights(model)


def _draw(weight: Tensor, config: ThinkerConfig) -> None:
    if config.init == "xavier":
        nn.init.xavier_normal_(weight)
    else:
        nn.init.normal_(weight, std=config.init_std)


def _scale(weight: Tensor, config: ThinkerConfig, role: str, *, writes: bool) -> None:
    gain = init_gain(config.norm, config.n_layers, role)
    if config.scaled_init and writes:
        gain /= math.sqrt(2 * config.n_layers)
    if gain != 1.0:
        weight.mul_(gain)
