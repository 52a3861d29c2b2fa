"""Causal self-attention with RoPE, shared key and value heads, and the inner norms of the placement."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omninorm.layers import build_norm
from omninorm.placement import inner_norms
from omninorm.thinker.cache import LayerCache
from omninorm.thinker.config import ThinkerConfig
from omninorm.thinker.rotary import Rotation, rotate


class Attention(nn.Module):
    """softmax(q·kᵀ/√head_dim + causal mask)·v per head, between the projections q, k, v and out (none has a bias).

    Grouped queries (arXiv 2305.13245): n_heads / n_kv_heads query heads share a key and value head. Inner norms of
    placements: a norm per head on q, k and v before RoPE, and a trainable gain per head on the heads' outputs.

    Attributes:
        inner_norms: the placement's inner norms that belong to attention.
    """

    def __init__(self, config: ThinkerConfig) -> None:
        super().__init__()
        self.head_dim = config.head_width
        self.heads, self.kv_heads = config.n_heads, config.kv_heads
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.q = nn.Linear(config.d_model, queries, bias=False)
        self.k = nn.Linear(config.d_model, keys, bias=False)
        self.v = nn.Linear(config.d_model, keys, bias=False)
        self.out = nn.Linear(queries, config.d_model, bias=False)
        self.inner_norms = inner_norms(config.norm) & {"q", "k", "v", "heads"}
        self.q_norm, self.k_norm, self.v_norm = (self._head_norm(config, name) for name in ("q", "k", "v"))
        self.head_gain = nn.Parameter(torch.ones(config.n_heads)) if "heads" in self.inner_norms else None

    def _head_norm(self, config: ThinkerConfig, name: str) -> nn.Module:
        return build_norm(config.norm, self.head_dim) if name in self.inner_norms else nn.Identity()

    def forward(
        self, x: Tensor, rotation: Rotation, mask: Tensor | None = None, cache: LayerCache | None = None
    ) -> Tensor:
        """x (batch, sequence, d_model) → the same shape.

        Args:
            x: the tokens' vectors.
            rotation: RoPE's tables for the tokens' positions.
            mask: boolean, the keys that a query may attend to; None is causal, or all keys for a single query.
            cache: keys and values of earlier tokens, to which the new ones are appended.
        """
        q_shape = (*x.shape[:2], self.heads, self.head_dim)
        kv_shape = (*x.shape[:2], self.kv_heads, self.head_dim)
        q = rotate(self.q_norm(self.q(x).view(q_shape)), rotation).transpose(1, 2)
        k = rotate(self.k_norm(self.k(x).view(kv_shape)), rotation).transpose(1, 2)
        v = self.v_norm(self.v(x).view(kv_shape)).transpose(1, 2)
        if cache is not None:
            k, v = cache.append(k, v)
        causal = mask is None and q.shape[2] == k.shape[2]
        grouped = self.kv_heads != self.heads
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)
        y = y.transpose(1, 2)
        if self.head_gain is not None:
            y = y * self.head_gain.to(y.dtype).unsqueeze(-1)
        output: Tensor = self.out(y.flatten(2))
        return output
