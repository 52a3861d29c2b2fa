"""Causal self-attention with RoPE, shared key and value heads, and the inner norms of the placement."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omninorm.layers import build_norm
from omninorm.placement import inner_norms
from omninorm.placement.ngpt import Scale, unit
from omninorm.thinker.cache import LayerCache
from omninorm.thinker.config import ThinkerConfig
from omninorm.thinker.linear import build_linear
from omninorm.thinker.rotary import Rotation, rotate


class Attention(nn.Module):
    """softmax(q·kᵀ/√head_dim + causal mask)·v per head, with the projections q, k, v and out; none of them has a bias.

    With grouped-query attention (arXiv 2305.13245), n_heads / n_kv_heads query heads share a key and value head. The
    placement may add inner norms: a norm per head on q, k and v before RoPE, and a trainable gain per head on the
    output.

    Attributes:
        inner_norms: the placement's inner norms that belong to attention.
    """

    def __init__(self, config: ThinkerConfig) -> None:
        super().__init__()
        self.head_dim = config.head_width
        self.heads, self.kv_heads = config.n_heads, config.kv_heads
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.q = build_linear(config, config.d_model, queries)
        self.k = build_linear(config, config.d_model, keys)
        self.v = build_linear(config, config.d_model, keys)
        self.out = build_linear(config, queries, config.d_model, writes=True)
        self.logit_factor: float | None = None  # None is head_dim^−½
        self.inner_norms = inner_norms(config.norm) & {"q", "k", "v", "heads", "unit"}
        self.q_norm, self.k_norm, self.v_norm = (self._head_norm(config, name) for name in ("q", "k", "v"))
        self.head_gain = nn.Parameter(torch.ones(config.n_heads)) if "heads" in self.inner_norms else None

    def _head_norm(self, config: ThinkerConfig, name: str) -> nn.Module:
        return build_norm(config.norm, self.head_dim) if name in self.inner_norms else nn.Identity()

    def forward(
        self, x: Tensor, rotation: Rotation, mask: Tensor | None = None, cache: LayerCache | None = None
    ) -> Tensor:
        """Return the output for x, (batch, sequence, d_model) like x.

        Args:
            x: the tokens' vectors.
            rotation: RoPE's tables for the tokens' positions.
            mask: boolean, true for the keys that a query may attend to. None means causal attention, or all keys for a
                single query.
            cache: keys and values of earlier tokens; those of x are appended to it.
        """
        q, k = (heads.transpose(1, 2) for heads in self._queries_and_keys(x, rotation))
        v = self.v_norm(self.v(x).unflatten(-1, (self.kv_heads, self.head_dim))).transpose(1, 2)
        if cache is not None:
            k, v = cache.append(k, v)
        causal = mask is None and q.shape[2] == k.shape[2]
        grouped = self.kv_heads != self.heads
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped, scale=self.logit_factor
        )
        y = y.transpose(1, 2)
        if self.head_gain is not None:
            y = y * self.head_gain.to(y.dtype).unsqueeze(-1)
        output: Tensor = self.out(y.flatten(2))
        return output

    def _queries_and_keys(self, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """Return both as (batch, sequence, heads, head_dim)."""
        q = self.q(x).unflatten(-1, (self.heads, self.head_dim))
        k = self.k(x).unflatten(-1, (self.kv_heads, self.head_dim))
        return rotate(self.q_norm(q), rotation), rotate(self.k_norm(k), rotation)


class UnitAttention(Attention):
    """nGPT's attention: the logits are √head_dim · (s q)·(s k), with q and k of unit length after RoPE.

    The trainable s has one value per feature of each key head; the query heads of a key head share it. All matrices
    have unit length.
    """

    def __init__(self, config: ThinkerConfig) -> None:
        super().__init__(config)
        self.eps = config.norm.norm_eps
        self.logit_factor = self.head_dim**0.5
        self.qk_scale = Scale(self.kv_heads * self.head_dim, 1.0, config.d_model**-0.5)

    def _queries_and_keys(self, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        q, k = (unit(heads, self.eps) for heads in super()._queries_and_keys(x, rotation))
        scale = self.qk_scale().view(self.kv_heads, self.head_dim).to(q.dtype)
        return q * scale.repeat_interleave(self.heads // self.kv_heads, 0), k * scale


def build_attention(config: ThinkerConfig) -> Attention:
    """Return the attention module for the config's placement."""
    return UnitAttention(config) if "unit" in inner_norms(config.norm) else Attention(config)
