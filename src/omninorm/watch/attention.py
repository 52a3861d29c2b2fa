"""Attention logits and entropy, seen where attention is computed: at scaled_dot_product_attention, or at a softmax.

A torch-function mode is active during sampled steps. It belongs to no architecture: queries and keys are what attention
really gets, with position, norms and scale applied. Of each call one example and some queries are looked at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C import _len_torch_function_stack
from torch.overrides import TorchFunctionMode, _pop_mode, _push_mode
from torch.utils._device import DeviceContext

from omninorm.watch.board import Board

MOST_QUERIES = 32
# Additive masks hide a key with −∞ or with a large negative number.
HIDDEN_BELOW = -1e4

SDPA = F.scaled_dot_product_attention
SOFTMAX = (torch.softmax, F.softmax, Tensor.softmax, torch.special.softmax)


class AttentionSite:
    """One block's attention."""

    def __init__(self, board: Board, index: int) -> None:
        self.board, self.index = board, index

    def see(self, q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float | None) -> None:
        """q (batch, heads, queries, d), k (batch, kv_heads, keys, d), mask as of scaled_dot_product_attention."""
        if q.ndim != 4 or k.ndim != 4 or q.is_nested or q.numel() == 0 or k.numel() == 0:
            return
        queries, keys = q.shape[-2], k.shape[-2]
        chosen = slice(queries - 1, None, None) if queries == 1 else slice(0, queries, max(1, queries // MOST_QUERIES))
        few, all_keys = q.detach()[0, :, chosen].float(), k.detach()[0].float()
        if few.shape[0] != all_keys.shape[0]:
            all_keys = all_keys.repeat_interleave(few.shape[0] // all_keys.shape[0], dim=0)
        with torch.autocast(q.device.type, enabled=False):  # which would round the products to 16 bits
            logits = few @ all_keys.transpose(-1, -2) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
        hidden = torch.zeros((), dtype=torch.bool, device=q.device)
        if causal:
            positions = torch.arange(queries, device=q.device)[chosen]
            hidden = positions.unsqueeze(-1) < torch.arange(keys, device=q.device)
        if mask is not None:
            part = mask.detach().expand(*q.shape[:2], queries, keys)[0, :, chosen]
            hidden = hidden | (~part if part.dtype == torch.bool else part < HIDDEN_BELOW)
            logits = logits if part.dtype == torch.bool else logits + part.float()
        self._add(logits, hidden.expand_as(logits))

    def see_some(self, q: Tensor, k: Tensor, mask: Tensor | None = None) -> None:
        """As `see`, in a graph: causality as a mask, the scale in q, and only in sampled steps."""
        if self.board.sampling:
            self.see(q, k, mask, False, None)

    def see_logits(self, logits: Tensor) -> None:
        """logits (batch, heads, queries, keys), masked ones included, before the softmax."""
        if logits.ndim != 4 or logits.numel() == 0:
            return
        queries = logits.shape[-2]
        few = logits.detach()[0, :, :: max(1, queries // MOST_QUERIES)].float()
        self._add(few, few < HIDDEN_BELOW)

    def _add(self, logits: Tensor, hidden: Tensor) -> None:
        """logits and which of them are hidden, (heads, queries, keys)."""
        in_sight = (~hidden).sum(dim=-1)
        self.board.peak("attention_logit", self.index, logits.masked_fill(hidden, 0).abs().amax())
        log_p = logits.masked_fill(hidden, -math.inf).log_softmax(dim=-1)
        entropy = -(log_p.exp() * log_p.masked_fill(hidden, 0)).sum(dim=-1)
        choice = in_sight >= 2  # a query that sees one key has no choice, and no entropy to lose
        share = torch.where(choice, entropy / in_sight.clamp_min(2).log(), 0)
        # Without any choice in sight the mean would be 0/0: attention over one key, not sharp attention.
        mean = torch.where(choice.any(), share.sum() / choice.sum().clamp_min(1), 1.0)
        self.board.add("attention_entropy", self.index, mean)


class AttentionMode(TorchFunctionMode):
    """Hands the arguments of every attention to the site of the block that is running.

    Args:
        site: the running block's, None outside of blocks.
        failed: told of an error of ours, which must not reach the training.
    """

    def __init__(self, site: Callable[[], AttentionSite | None], failed: Callable[[Exception], None]) -> None:
        super().__init__()
        self.site, self.failed = site, failed

    def enter(self) -> None:
        """Puts this mode onto the stack: at its bottom, where the user's may be left in any order, as far as possible.
        The default device's insists on a place below."""
        modes = _take_all()
        place = sum(isinstance(mode, DeviceContext) for mode in modes)
        _put_back([*modes[:place], self, *modes[place:]])

    def leave(self) -> None:
        """Takes this mode off the stack, wherever it stands."""
        _put_back([mode for mode in _take_all() if mode is not self])

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if (func is SDPA or func in SOFTMAX) and (site := self.site()) is not None:
            try:
                with torch.no_grad():
                    see_call(site, func, args, kwargs)
            except Exception as error:
                self.failed(error)
        return func(*args, **kwargs)


def _take_all() -> list[Any]:
    """The modes, first entered first, off their stack."""
    return [_pop_mode() for _ in range(_len_torch_function_stack())][::-1]  # type: ignore[no-untyped-call]


def _put_back(modes: Sequence[Any]) -> None:
    for mode in modes:
        _push_mode(mode)  # type: ignore[no-untyped-call]


def see_call(site: AttentionSite, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Hands on the arguments of an attention, or of a softmax over keys."""
    if func is SDPA:
        site.see(*read_attention(*args, **kwargs))
        return
    logits = args[0] if args else kwargs["input"]
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    if dim in (-1, logits.ndim - 1):
        site.see_logits(logits)


def read_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, bool, float | None]:
    """What matters of scaled_dot_product_attention's arguments."""
    return query, key, attn_mask, is_causal, scale


def see_multihead(
    site: AttentionSite, module: nn.MultiheadAttention, args: Sequence[Any], kwargs: dict[str, Any]
) -> None:
    """torch.nn.MultiheadAttention hides its calls from modes: queries and keys of its first example, computed again."""
    given = dict(zip(("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask"), args, strict=False))
    given |= kwargs
    query, key = given["query"], given["key"]
    if query.ndim != 3 or module.in_proj_weight is None:
        return
    width, heads = module.embed_dim, module.num_heads

    def projected(x: Tensor, at: int) -> Tensor:
        """The first example's queries or keys: (1, heads, length, d)."""
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
    """A mask of torch.nn.MultiheadAttention, where True hides a key, as what is added to the logits."""
    if mask.dtype != torch.bool:
        return mask.float()
    return torch.zeros(mask.shape, device=mask.device).masked_fill(mask, -math.inf)
