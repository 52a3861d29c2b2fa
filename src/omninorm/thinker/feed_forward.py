"""The feed-forward layers: with a SiLU gate (SwiGLU), with GELU, and with squared ReLU."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from omninorm.layers import build_norm
from omninorm.placement import inner_norms
from omninorm.thinker.config import ThinkerConfig
from omninorm.thinker.linear import build_linear


class FeedForward(nn.Module):
    """Base class: `up` and `down` without bias, and the placement's norm on the hidden activation.

    Attributes:
        inner_norms: the placement's inner norms that belong to the feed-forward.
    """

    def __init__(self, config: ThinkerConfig) -> None:
        super().__init__()
        # In nGPT the argument of the nonlinearity is multiplied by √d_model, to compensate for the unit lengths.
        scale = 1.0 if config.feed_forward == "swiglu" else config.d_model**0.5
        self.up = build_linear(config, config.d_model, config.hidden_width, scale=scale)
        self.down = build_linear(config, config.hidden_width, config.d_model, writes=True)
        self.inner_norms = inner_norms(config.norm) & {"hidden", "unit"}
        is_normed = "hidden" in self.inner_norms
        self.hidden_norm = build_norm(config.norm, config.hidden_width) if is_normed else nn.Identity()


class SwiGLU(FeedForward):
    """down(silu(gate(x)) · up(x)), Shazeer 2020 (arXiv 2002.05202). Shapes (…, d_model) → (…, d_model)."""

    def __init__(self, config: ThinkerConfig) -> None:
        super().__init__(config)
        self.gate = build_linear(config, config.d_model, config.hidden_width, scale=config.d_model**0.5)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.down(self.hidden_norm(F.silu(self.gate(x)) * self.up(x)))
        return output


class GELU(FeedForward):
    """down(gelu(up(x))) with the exact GELU, x·Φ(x). Shapes (…, d_model) → (…, d_model)."""

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.down(self.hidden_norm(F.gelu(self.up(x))))
        return output


class ReLU2(FeedForward):
    """down(relu(up(x))²), So et al. 2021 (arXiv 2109.08668); nanochat. Shapes (…, d_model) → (…, d_model)."""

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.down(self.hidden_norm(F.relu(self.up(x)).square()))
        return output


def build_feed_forward(config: ThinkerConfig) -> FeedForward:
    """Return the feed-forward layer that the config names."""
    return {"swiglu": SwiGLU, "gelu": GELU, "relu2": ReLU2}[config.feed_forward](config)
