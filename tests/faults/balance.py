"""Load balancing for mixtures of experts, without which routers of healthy models collapse within a few dozen steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

COEFFICIENT = 0.01


class Balance:
    """The load-balancing loss of all routers of a model: experts · Σ share of tokens · mean probability.

    Fedus et al., Switch Transformers, arXiv 2101.03961, equation 4.
    """

    def __init__(self, routers: list[nn.Module]) -> None:
        self._terms: list[Tensor] = []
        for router in routers:
            router.register_forward_hook(self._see)

    def _see(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if not torch.is_grad_enabled():
            return
        logits, *_, chosen = output
        experts = logits.shape[-1]
        shares = nn.functional.one_hot(chosen, experts).float().sum(-2).flatten(0, -2).mean(0)
        self._terms.append(experts * (shares * logits.float().softmax(-1).flatten(0, -2).mean(0)).sum())

    def add_to(self, loss: Tensor) -> Tensor:
        """Return the loss with the gradient of the balancing losses, but with its value unchanged."""
        terms, self._terms = self._terms, []
        if not terms or not loss.requires_grad:
            return loss
        balance = COEFFICIENT * torch.stack(terms).sum()
        return loss + (balance - balance.detach())
