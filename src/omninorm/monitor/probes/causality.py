"""Probe of causality: whether labels are the next tokens of the input, and whether attention shows these."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from omninorm.monitor.stats_buffer import StatsBuffer

FAR = 8  # operations
FARTHEST = 4  # tokens between a label's position and a token that it may be
MOST_MASKS = 8
MOST_NODES = 400  # of a block's graph that are searched for a mask
INVISIBLE = -50.0  # of the logarithm of a probability


class Causality:
    """The tokens of the current forward pass (batch, length): the first such tensor of integers that the model reads.

    Attributes:
        length: the number of tokens of each example; None if the model reads none.
        elsewhere: whether labels are also compared with other tokens than the next ones. This costs some operations, so
            it is only done if they were not the next ones in the sample before.
    """

    def __init__(self, buffer: StatsBuffer) -> None:
        self._buffer, self.elsewhere = buffer, False
        self.clear()

    def clear(self) -> None:
        self._tokens: Tensor | None = None
        self._end: Any = None
        self.length: int | None = None

    def read(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Keep the tokens until the loss has been computed."""
        self.clear()
        inputs = (each for name, each in kwargs.items() if name not in ("labels", "targets"))
        self._tokens = next((each for each in (*args, *inputs) if _are_tokens(each)), None)
        self.length = None if self._tokens is None else self._tokens.shape[1]

    def end(self, logits: Any) -> None:
        """Note the autograd node of the model's output, to recognize a loss of it."""
        self._end = getattr(logits, "grad_fn", None)

    def see_labels(self, logits: Any, labels: Any, inside: bool) -> None:
        """Compare the labels with the tokens, without those that are ignored (negative).

        Args:
            inside: whether the model itself computes the loss. Otherwise the logits may be another model's.
        """
        if self._tokens is None or not (inside or comes_from(logits, self._end)):
            return
        tokens, self._tokens, self._end = self._tokens, None, None
        if not isinstance(labels, Tensor) or labels.dtype != torch.long:
            return
        batch, length = tokens.shape
        if labels.numel() not in (batch * length, batch * (length - 1)):
            return
        self._compare(tokens.to(labels.device, non_blocking=True), labels.reshape(batch, -1), logits)

    def _compare(self, tokens: Tensor, labels: Tensor, logits: Tensor) -> None:
        """Measure how labels (batch, length or one fewer) lie relative to the tokens (batch, length)."""
        shares = _shares_at(tokens, labels, FARTHEST if self.elsewhere else 1)
        middle = len(shares) // 2
        self._buffer.peak("next_tokens", 0, shares[middle + 1])
        if not self.elsewhere:
            return
        self._buffer.peak("shifted_tokens", 0, torch.cat([shares[: middle + 1], shares[middle + 2 :]]).amax())
        classes, counted = logits.shape[min(1, logits.ndim - 1)], labels >= 0
        had, wanted = _counts(tokens, tokens >= 0, classes), _counts(labels, counted, classes)
        self._buffer.peak("same_tokens", 0, torch.minimum(had, wanted).sum() / wanted.sum().clamp_min(1))


def _shares_at(tokens: Tensor, labels: Tensor, farthest: int) -> Tensor:
    """Return the share of the labels that are the token at each distance from -farthest to farthest."""
    windows = F.pad(tokens, (farthest, farthest), value=-1).unfold(1, labels.shape[1], 1)[:, : 2 * farthest + 1]
    valid = (windows >= 0) & (labels >= 0).unsqueeze(1)
    equal = (windows == labels.unsqueeze(1)) & valid
    return equal.sum((0, 2)) / valid.sum((0, 2)).clamp_min(1)


def _counts(values: Tensor, chosen: Tensor, classes: int) -> Tensor:
    """Return how often each of the classes occurs among the chosen values; other values are left out."""
    chosen = chosen & (values < classes)
    empty = torch.zeros(classes, device=values.device)
    return empty.scatter_add(0, values.clamp(0, classes - 1).flatten(), chosen.flatten().to(empty.dtype))


def hidden_future(log_p: Tensor, queries: slice) -> Tensor:
    """Return the share of pairs of a token and a later one that attention hides, for each block.

    Args:
        log_p: log-probabilities (n, heads, queries, keys) of the chosen queries and all keys. They show any kind of
            mask.
        queries: which of the keys' tokens the queries are.
    """
    positions = torch.arange(log_p.shape[-1], device=log_p.device)
    later = positions[queries].unsqueeze(-1) < positions
    hidden = ((log_p < INVISIBLE) & later).flatten(1).sum(dim=1)
    return hidden / (log_p.shape[1] * later.sum()).clamp_min(1)


def masks_after_softmax(end: Any) -> Iterator[Tensor]:
    """Yield the constants that attention weights are multiplied by after the softmax, and the negated masks of
    masked_fill, in the graph of a block that ends with an autograd node: where they are 0, a key is hidden."""
    seen, waiting = {end}, deque([end])
    while waiting and len(seen) < MOST_NODES:
        node = waiting.popleft()
        parents = [parent for parent, _ in getattr(node, "next_functions", ()) if parent is not None]
        if any(parent.name() == "SoftmaxBackward0" for parent in parents):
            yield from _masks_of(node)
        waiting += [parent for parent in parents if parent not in seen]
        seen.update(parents)


def _masks_of(node: Any) -> Iterator[Tensor]:
    if node.name() == "MulBackward0":
        constants = (node._saved_self, node._saved_other)
        yield from (factor for factor in constants if isinstance(factor, Tensor) and not factor.requires_grad)
    elif node.name().startswith("MaskedFillBackward"):
        yield ~node._saved_mask


def hidden_by(mask: Tensor, queries: slice) -> Tensor:
    """Return the share of pairs of a token and a later one that a mask (…, queries, keys) hides by 0. One that differs
    among heads or examples, as that of dropout does, hides what it hides in all of them."""
    some = mask.unsqueeze(0).flatten(0, -3)[:MOST_MASKS, queries]
    positions = torch.arange(some.shape[-1], device=some.device)
    later = positions[queries].unsqueeze(-1) < positions
    return ((some == 0).all(dim=0) & later).sum() / later.sum().clamp_min(1)


def is_product(logits: Tensor) -> bool:
    """Return whether logits come from a batched product, as those of queries and keys do. A softmax over features, as
    in linear attention, has the output of a linear layer as its input."""
    return any(node.name() in ("BmmBackward0", "BaddbmmBackward0") for node in _last_operations(logits))


def comes_from(logits: Any, end: Any) -> bool:
    """Return whether the autograd node `end` is at most a few operations before logits: views, slices and casts."""
    return end is not None and any(node is end for node in _last_operations(logits))


def _last_operations(x: Any) -> Iterator[Any]:
    """Yield the autograd nodes of the last operations that made x, the last one first, along their first inputs."""
    node = getattr(x, "grad_fn", None)
    for _ in range(FAR):
        if node is None:
            return
        yield node
        node = next((before for before, _ in node.next_functions if before is not None), None)


def _are_tokens(x: Any) -> bool:
    return type(x) is Tensor and x.dtype == torch.long and x.ndim == 2 and x.shape[0] > 0 and x.shape[1] > 1
