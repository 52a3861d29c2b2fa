"""Removes norms whose outputs are normalized again after linear layers, which makes the first norm redundant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from omninorm.surgery.fold import Plans, fold, plan_folds, probe, undone_by_errors, untie_head
from omninorm.surgery.gains import Gain, find_gains
from omninorm.surgery.linear import read_linear
from omninorm.surgery.report import Surgery
from omninorm.surgery.settle import Probed, settle
from omninorm.surgery.spaces import Spaces
from omninorm.surgery.verify import EXACT
from omninorm.surgery.walk import find_spaces

# Norms that do not depend on the size of a vector, but for ε.
_SCALE_FREE = ("RMSNorm", "LayerNorm", "LayerNorm1P")
_READ, _NORMALIZED = "read by ", "normalized by "


def cancel_norms(model: nn.Module, inputs: Sequence[Any] | None = None, *, limit: float = EXACT) -> Surgery:
    """Remove every RMSNorm that only linear layers read whose outputs only other norms read, in place.

        norm₂(W·norm₁(x)) = norm₂(W·diag(γ₁)·x)  if ε₂ = 0, since norm₁ divides x by a number and norm₂ divides it out

    γ₁ is folded into W, which must have no bias, and norm₁ becomes `torch.nn.Identity`. With ε₂ > 0 the outputs change
    by about ε₂·abs(1 − mean(x²)) / (2·mean((W·x̂)²)), where x̂ = norm₁(x) without gain. The difference is measured in
    float64 as by `fold_gains`, and a norm is refused if it exceeds `limit`. In 16 bits, W·x may overflow where W·x̂
    does not.

    Args:
        model: any model.
        inputs: probes as in `verify`; None means random tokens.
        limit: the largest difference of the outputs relative to the largest output. The default only removes norms
            where ε₂ is 0 or so small that it does not matter in float64.

    Returns:
        A report: `changed` (norm → the layers that read it and the norms after them), `refused` (norm → reason),
        `error`, `table()`, `undo()`. Norms that are not followed by linear layers and norms alone are in neither.

    Raises:
        InputError: as in `fold_gains`.

    Example:
        >>> import torch
        >>> parts = [torch.nn.RMSNorm(4, eps=0), torch.nn.Linear(4, 6, bias=False), torch.nn.RMSNorm(6, eps=0)]
        >>> model = torch.nn.Sequential(torch.nn.Embedding(9, 4), *parts)
        >>> cancel_norms(model).changed
        {'1': 'removed before 2, because 3 normalizes again'}
    """
    before = probe(model, inputs)
    done = Surgery(operation="canceled", device=before.device)
    with undone_by_errors(done):
        untie_head(model, done)
        _cancel_all(before, model, done, limit)
        done.finish()
    return done


def _cancel_all(before: Probed, model: nn.Module, done: Surgery, limit: float) -> None:
    """Cancel the norms of a float64 copy, and of the original model."""
    made, unfolded = before.model, dict[str, str]()
    plans = plan_folds(before, unfolded, new_biases=False)
    gains = find_gains(made, before.main)
    spaces = find_spaces(made, [name for name, gain in gains.items() if gain.kind in _SCALE_FREE], before.runs)
    found = {
        name: what
        for name, gain in gains.items()
        if gain.kind == "RMSNorm" and (what := _cancelable(made, name, spaces, gains))
    }
    for name in [name for name in found if gains[name].gain is not None and name not in plans]:
        del found[name]
        done.refused[name] = f"its gain cannot be folded: {unfolded[name]}"

    def attempt(names: Sequence[str], trial: Surgery) -> float:
        for name in names:
            _cancel(made, name, plans, trial, made)
        return before.distance()

    accepted, rejected = settle(list(found), attempt, limit)
    for name, error in rejected.items():
        why = f"the outputs would change by {error:.1e}: the ε of the norms after it matters"
        done.refused[name] = f"{why}. Pass limit={_above(error)} to accept that"
    for name, error in accepted.items():
        _cancel(model, name, plans, done, made)
        done.changed[name] = found[name]
        done.error = max(done.error, error)
    done.proof = before.proof
    if not done.changed:
        done.undo()


def _cancelable(model: nn.Module, name: str, spaces: Spaces, gains: Mapping[str, Gain]) -> str:
    """Return what makes a norm redundant, or an empty text if its output's size matters somewhere."""
    readers, after = [], []
    for use in sorted(spaces.uses.get(name, ())):
        reader = use.removeprefix(_READ).removesuffix(".weight")
        uses = sorted(spaces.uses.get(reader, ()))
        if not use.startswith(_READ) or not uses or any(not each.startswith(_NORMALIZED) for each in uses):
            return ""
        found = read_linear(model.get_submodule(reader)) if reader in dict(model.named_modules()) else None
        if found is None or found.bias is not None:
            return ""
        readers.append(reader)
        after += [each.removeprefix(_NORMALIZED) for each in uses]
    verb = "normalizes" if len(after) == 1 else "normalize"
    return f"removed before {', '.join(readers)}, because {', '.join(after)} {verb} again" if readers else ""


def _cancel(model: nn.Module, name: str, plans: Plans, done: Surgery, measured: nn.Module) -> None:
    """Fold a norm's gain, if any, and replace the norm."""
    if name in plans:
        fold(model, name, plans[name], done, measured)
    parent, _, child = name.rpartition(".")
    done.set_module(model.get_submodule(parent), child, nn.Identity())


def _above(error: float) -> str:
    """Return the next power of ten."""
    return f"1e{int(f'{error:e}'.partition('e')[2]) + 1:03d}"
