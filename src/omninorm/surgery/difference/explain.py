"""What differs between two modules themselves: their class, parameters, buffers, and settings."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from omninorm.layers.identify import Identity, identify
from omninorm.surgery.difference.measure import percent, relative

_SAME_SHIFT = 1e-3  # a shift of all values that was rounded to 16 bits
_SAME_EPS = 1e-3  # of one that was found by probing
_LONGEST = 60  # characters of a setting


def reasons(a: nn.Module, b: nn.Module) -> list[str]:
    """Return what differs between two modules, without those inside of them, as clauses."""
    found = [] if type(a) is type(b) else [f"its class is {type(a).__name__} in a and {type(b).__name__} in b"]
    ours, theirs = (_tensors(each) for each in (a, b))
    for name in ours:
        if name in theirs and (text := _tensor_reason(ours[name], theirs[name])):
            found.append(f"{name} {text}")
    found += [f"only {which} has the parameter {name}" for name, which in _alone(ours, theirs)]
    found += [
        f"{name} is {mine!s:.{_LONGEST}} in a and {yours!s:.{_LONGEST}} in b"
        for name, mine, yours in _settings(a, b)
        if mine != yours
    ]
    return found + (_norm_reasons(a, b) if type(a) is not type(b) else [])


def _norm_reasons(a: nn.Module, b: nn.Module) -> list[str]:
    """Return what differs between norms of two classes, whose settings may have other names; found by probing."""
    if any(True for each in (a, b) for _ in each.children()):
        return []
    ours, theirs = identify(a), identify(b)
    if not (isinstance(ours, Identity) and isinstance(theirs, Identity)):
        return []
    found = [f"its kind is {ours.kind} in a and {theirs.kind} in b"] if ours.kind != theirs.kind else []
    if ours.gain_offset != theirs.gain_offset:
        found.append(f"it adds {ours.gain_offset:g} to its gain in a and {theirs.gain_offset:g} in b")
    if ours.eps and theirs.eps and not math.isclose(ours.eps, theirs.eps, rel_tol=_SAME_EPS):
        found.append(f"its epsilon is {ours.eps:.3g} in a and {theirs.eps:.3g} in b")
    return found


def rounded_weights(a: nn.Module, b: nn.Module) -> torch.dtype | None:
    """Return the dtype to which two modules' own weights are equal; None if they are equal, or differ by more."""
    ours, theirs = (_tensors(each) for each in (a, b))
    pairs = [(ours[name], theirs[name]) for name in ours if name in theirs]
    if any(one.shape != other.shape for one, other in pairs):
        return None
    changed = [pair for pair in pairs if relative(*pair)]
    found = [_rounded_to(*pair) for pair in changed]
    known = [each for each in found if each is not None]
    return max(known, key=lambda each: torch.finfo(each).eps) if known and len(known) == len(found) else None


def _rounded_to(a: Tensor, b: Tensor) -> torch.dtype | None:
    """Return the finest dtype to which one tensor is the other, rounded; None if there is none."""
    a, b = a.double(), b.to(a.device, torch.float64)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        one, other = a.to(dtype), b.to(dtype)
        if torch.equal(one, other) and (torch.equal(one.double(), a) or torch.equal(other.double(), b)):
            return dtype
    return None


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    own = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
    return {name: each.detach() for name, each in own.items()}


def _alone(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[tuple[str, str]]:
    return [(name, "a" if name in ours else "b") for name in sorted(ours.keys() ^ theirs.keys())]


def _tensor_reason(a: Tensor, b: Tensor) -> str:
    if a.shape != b.shape:
        return "" if sorted(a.shape) == sorted(b.shape) else f"is {tuple(a.shape)} in a and {tuple(b.shape)} in b"
    gap = relative(a, b)
    if not gap:
        return ""
    if not math.isfinite(gap):
        return "holds NaN or infinite values"
    if (dtype := _rounded_to(a, b)) is not None:
        return f"differs by {percent(gap)}, as rounding to {str(dtype).removeprefix('torch.')} explains"
    shift = b.to(a.device, torch.float64) - a.double()
    if a.numel() > 1 and relative(shift, shift.mean().expand_as(shift)) < _SAME_SHIFT:
        return f"is {abs(float(shift.mean())):.4g} {'higher' if shift.mean() > 0 else 'lower'} everywhere in b"
    return f"differs by {percent(gap)}"


def _settings(a: nn.Module, b: nn.Module) -> Iterator[tuple[str, Any, Any]]:
    """Yield the attributes of both that are numbers, texts or flags."""
    for name in sorted(vars(a).keys() | vars(b).keys()):
        mine, yours = getattr(a, name, None), getattr(b, name, None)
        if all(isinstance(each, (bool, int, float, str)) for each in (mine, yours)) and not _is_own(name):
            yield name, mine, yours


def _is_own(name: str) -> bool:
    """Return whether an attribute belongs to nn.Module or is private."""
    return name.startswith("_") or name == "training"
