"""Measures to what extent a norm's gain can undo the norm in a trained model, and to what extent it does.

A norm divides each token by a different number; γ multiplies each feature by the same number for all tokens.
With the residual stream x (tokens, features) and the normalized x̂ before the gain, the smallest possible remainder is

    min over γ (and β, if the norm has one) of  Σ (x − γ·x̂ − β)² / Σ x²

It is 0 exactly if all tokens are divided by the same number.
"""

from __future__ import annotations

import statistics

import torch
from torch import Tensor, nn

from omninorm import functional
from omninorm.device import widest
from omninorm.monitor.model_map.norms import find_gain


def measure_undo(model: nn.Module, tokens: Tensor) -> dict[str, float] | None:
    """Return the median remainder over the model's RMSNorms and LayerNorms, as a share of Σx².

    "best" is for the best possible γ and β, "learned" for those of the model. The result is None if the model has no
    such norms on inputs of shape (batch, sequence, features).
    """
    best: list[float] = []
    learned: list[float] = []

    def look(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        wide = widest(args[0].device)
        x = args[0].detach().to(wide)
        if x.ndim == 3:
            rows, normed = x.flatten(0, 1), output.detach().to(wide).flatten(0, 1)
            best.append(remainder(rows, isinstance(module, nn.LayerNorm), float(module.eps or 0.0)))  # type: ignore[arg-type]
            learned.append(float((rows - normed).square().sum() / rows.square().sum()))

    kinds = (nn.RMSNorm, nn.LayerNorm)
    hooks = [
        m.register_forward_hook(look) for m in model.modules() if isinstance(m, kinds) and find_gain(m) is not None
    ]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            model(tokens)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return {"best": statistics.median(best), "learned": statistics.median(learned)} if best else None


def remainder(x: Tensor, centred: bool, eps: float) -> float:
    """Return the share of Σx² that the best γ (and β, for a LayerNorm) leave; x is (tokens, features)."""
    normed = functional.layer_norm(x, eps=eps) if centred else functional.rms_norm(x, eps=eps)
    target, power = x, x.square().sum()
    if centred:
        normed, target = normed - normed.mean(0), x - x.mean(0)
    gain = (normed * target).sum(0) / normed.square().sum(0).clamp_min(torch.finfo(x.dtype).tiny)
    return float((target - gain * normed).square().sum() / power)
