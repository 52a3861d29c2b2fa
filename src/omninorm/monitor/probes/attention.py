"""Attention logits and entropy, from the calls that `listening` intercepts: one example and some queries per call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omninorm.monitor.probes.causality import Causality, hidden_by, hidden_future, is_product, masks_after_softmax
from omninorm.monitor.stats_buffer import StatsBuffer

MOST_QUERIES = 32
# Additive masks hide a key with −∞ or a large negative number.
HIDDEN_BELOW = -5e3  # some masks add −10,000
# A value that stands for the default scale, 1/√d.
UNKNOWN = -1.0


class AttentionProbe:
    """The attention of one block."""

    def __init__(self, buffer: StatsBuffer, index: int, causality: Causality | None = None) -> None:
        self.buffer, self.index, self._causality = buffer, index, causality
        self._softmax = False  # whether this pass has called a softmax over the model's tokens

    def _is_over_tokens(self, queries: int, keys: int) -> bool:
        """Return whether queries and keys are the model's tokens."""
        return self._causality is not None and queries == keys == self._causality.length

    def see(self, q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float | None) -> None:
        """Measure q (batch, heads, queries, d) and k (batch, kv_heads, keys, d); the mask is PyTorch's."""
        if q.is_nested or q.ndim != 4 or k.ndim != 4 or q.numel() == 0 or k.numel() == 0:
            return
        (queries, width), keys = q.shape[-2:], k.shape[-2]
        chosen, part = some_queries(queries), None
        few, all_keys = q[0, :, chosen].detach().clone(), k[0].detach().clone()
        if mask is not None:
            part = mask.detach().expand(*mask.shape[:-2], queries, keys)
            part = part.reshape((1,) * (4 - part.ndim) + part.shape)[0, :, chosen].clone()
        factor = 1 / math.sqrt(width) if scale is None else scale
        length = queries if self._is_over_tokens(queries, keys) else None
        arguments = factor, queries if causal else None, length
        self.buffer.batch(self.measure, self, few, all_keys, part, arguments=arguments)

    @staticmethod
    def measure(
        sites: Sequence[AttentionProbe],
        q: Tensor,
        k: Tensor,
        mask: Tensor | None,
        scale: float,
        causal: int | None,
        length: int | None,
    ) -> None:
        """Measure some queries (n, heads, queries, d) and all keys (n, kv_heads, keys, d) of n blocks.

        Args:
            mask: the mask of the same queries.
            causal: the number of all queries, if later keys are hidden.
            length: the same, if queries and keys are the model's tokens.
        """
        logits = _products(q.float(), k.float()) * scale
        hidden = torch.zeros((), dtype=torch.bool, device=logits.device)
        if causal is not None:
            positions = torch.arange(causal, device=logits.device)[some_queries(causal)]
            hidden = positions.unsqueeze(-1) < torch.arange(logits.shape[-1], device=logits.device)
        if mask is not None:
            hidden = hidden | (~mask if mask.dtype == torch.bool else mask < HIDDEN_BELOW)
            logits = logits if mask.dtype == torch.bool else logits + mask.float()
        _add(sites, logits, hidden.expand_as(logits), length)

    def see_some(self, q: Tensor, k: Tensor, constants: Tensor, mask: Tensor | None = None) -> None:
        """Call `see` from a graph in sampled steps. `constants` holds the scale, twice if attention is causal."""
        if self.buffer.sampling:
            scale = float(constants[0])
            self.see(q, k, mask, len(constants) == 2, None if scale == UNKNOWN else scale)

    def see_logits(self, logits: Tensor) -> None:
        """Measure logits (batch, heads, queries, keys) before the softmax, including masked ones."""
        if logits.ndim != 4 or logits.numel() == 0:
            return
        queries = logits.shape[-2]
        length = queries if self._is_over_tokens(queries, logits.shape[-1]) and is_product(logits) else None
        self._softmax |= length is not None
        few = logits.detach()[0, :, some_queries(queries)].clone()
        self.buffer.batch(self.measure_logits, self, few, arguments=(length,))

    def end(self, y: Tensor) -> None:
        """End the block with its output y. Weights that are set to 0 after the softmax are hidden, too."""
        softmax, self._softmax = self._softmax, False
        if not softmax or y.grad_fn is None:
            return
        for mask in masks_after_softmax(y.grad_fn):
            if mask.ndim >= 2 and mask.shape[-2] == mask.shape[-1] > 1:
                self.buffer.peak("hidden_future", self.index, hidden_by(mask, some_queries(mask.shape[-1])))

    @staticmethod
    def measure_logits(sites: Sequence[AttentionProbe], logits: Tensor, length: int | None) -> None:
        logits = logits.float()
        _add(sites, logits, logits < HIDDEN_BELOW, length)


def _products(q: Tensor, k: Tensor) -> Tensor:
    """Return q kᵀ: (n, heads, queries, keys)."""
    if q.shape[1] != k.shape[1]:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    with torch.autocast(q.device.type, enabled=False):  # autocast would round the products to 16 bits
        return q @ k.transpose(-1, -2)


def some_queries(queries: int) -> slice:
    """Return which queries are measured."""
    return slice(0, queries, max(1, queries // MOST_QUERIES))


def _add(sites: Sequence[AttentionProbe], logits: Tensor, hidden: Tensor, length: int | None) -> None:
    """Add the logits and which of them are hidden, (n, heads, queries, keys), and the future if there is a length."""
    buffer, blocks = sites[0].buffer, [site.index for site in sites]
    in_sight = (~hidden).sum(dim=-1)
    buffer.peak("attention_logit", blocks, logits.masked_fill(hidden, 0).abs().flatten(1).amax(dim=1))
    log_p = logits.masked_fill(hidden, -math.inf).log_softmax(dim=-1)
    if length is not None:
        # The largest share of a block's calls: a decoder's cross-attention may see everything.
        buffer.peak("hidden_future", blocks, hidden_future(log_p, some_queries(length)))
    entropy = -(log_p.exp() * log_p.masked_fill(hidden, 0)).sum(dim=-1)
    choice = in_sight >= 2  # with a single visible key the entropy is always 0
    share = torch.where(choice, entropy / in_sight.clamp_min(2).log(), 0).flatten(1).sum(dim=1)
    count = choice.flatten(1).sum(dim=1)
    # Without such queries the mean would be 0/0. That is attention over one key, not collapsed attention.
    buffer.add("attention_entropy", blocks, torch.where(count > 0, share / count.clamp_min(1), 1.0))


def see_multihead(
    site: AttentionProbe, module: nn.MultiheadAttention, args: Sequence[Any], kwargs: dict[str, Any]
) -> None:
    """Recompute the first example's logits of torch.nn.MultiheadAttention, which computes them in several ways."""
    given = dict(zip(("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask"), args, strict=False))
    given |= kwargs
    query, key = given["query"], given["key"]
    if query.ndim != 3 or module.in_proj_weight is None:
        return
    width, heads = module.embed_dim, module.num_heads

    def projected(x: Tensor, at: int) -> Tensor:
        """Return the first example's queries or keys: (1, heads, length, d)."""
        example = x.detach()[0] if module.batch_first else x.detach()[:, 0]
        weight, all_biases = module.in_proj_weight[at : at + width], module.in_proj_bias
        bias = None if all_biases is None else all_biases[at : at + width].to(x.dtype)
        y = F.linear(example, weight.to(x.dtype), bias)
        return y.reshape(y.shape[0], heads, -1).transpose(0, 1).unsqueeze(0)

    mask, padding = given.get("attn_mask"), given.get("key_padding_mask")
    if mask is not None and mask.ndim == 3:
        mask = mask[:heads]
    masks = [mask, None if padding is None else padding[0]]
    additive = [_additive(mask) for mask in masks if mask is not None]
    total = additive[0] + additive[1] if len(additive) == 2 else next(iter(additive), None)
    site.see(projected(query, 0), projected(key, width), total, False, None)


def _additive(mask: Tensor) -> Tensor:
    """Convert a mask of torch.nn.MultiheadAttention, where True hides a key, to one that is added to the logits."""
    if mask.dtype != torch.bool:
        return mask.float()
    return torch.zeros(mask.shape, dtype=torch.float32, device=mask.device).masked_fill(mask, -math.inf)
