"""The norms that are timed: omninorm's back ends, torch, torch.compile, Liger and quack."""

from __future__ import annotations

import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import omninorm
from gpu_check.place import OURS, compiles, our_backends
from omninorm import functional

EPS = 1e-6
KINDS = ("rms_norm", "layer_norm")
Norm = Callable[[Tensor, Tensor, Tensor], Any]


class Contestant(NamedTuple):
    """A norm of x with a gain and a bias, the same norm of x + residual or None, and the context for calling them."""

    name: str
    norm: Norm
    add: Callable[[Tensor, Tensor, Tensor, Tensor], Any] | None
    context: Callable[[], AbstractContextManager[object]] = nullcontext


def load(folder: Path | None) -> dict[str, str]:
    """Unpack the wheels of a folder into a temporary one for this process; return the versions of the peers."""
    if folder is not None:
        site = tempfile.mkdtemp(prefix="omninorm-peers-")
        for wheel in sorted(folder.glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(site)
        sys.path.append(site)
    return {name: _state(module) for name, module in (("liger", "liger_kernel.ops"), ("quack", "quack"))}


def _state(module: str) -> str:
    """Return "available", or the reason why a package cannot be imported."""
    try:
        __import__(module)
    except Exception as failure:  # a broken peer must not end the check
        return f"{type(failure).__name__}: {str(failure).splitlines()[0] if str(failure) else ''}"[:160]
    return "available"


def contestants(kind: str, device: str) -> Iterator[Contestant]:
    for name in our_backends(device):
        yield _ours(kind, name)
    yield Contestant("torch", _torch_norm(kind), _two_steps(_torch_norm(kind)))
    if compiles(device):
        yield _compiled(kind, device)
    if device == "cuda":
        for build in (_liger, _quack):
            try:
                yield build(kind)
            except Exception:  # `load` has recorded why
                continue


def _ours(kind: str, backend: str) -> Contestant:
    def context() -> AbstractContextManager[object]:
        return omninorm.use_backend(backend)

    name = f"{OURS} {backend}"
    if kind == "rms_norm":
        norm: Norm = lambda x, w, b: functional.rms_norm(x, w, EPS)  # noqa: E731
        return Contestant(name, norm, lambda x, r, w, b: functional.add_rms_norm(x, r, w, EPS), context)
    norm = lambda x, w, b: functional.layer_norm(x, w, b, EPS)  # noqa: E731
    return Contestant(name, norm, lambda x, r, w, b: functional.add_layer_norm(x, r, w, b, EPS), context)


def _torch_norm(kind: str) -> Norm:
    if kind == "rms_norm":
        return lambda x, w, b: F.rms_norm(x, x.shape[-1:], w, EPS)
    return lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b, EPS)


def _two_steps(norm: Norm) -> Callable[[Tensor, Tensor, Tensor, Tensor], Any]:
    def add(x: Tensor, residual: Tensor, w: Tensor, b: Tensor) -> Any:
        total = x + residual
        return norm(total, w, b), total

    return add


def plain_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS) * weight).to(x.dtype)


def _compiled(kind: str, device: str) -> Contestant:
    """Return the formula, compiled by torch.compile; without a GPU only traced, because compiling takes long."""
    options: dict[str, Any] = {"dynamic": False, "fullgraph": True}
    options |= {} if device == "cuda" else {"backend": "aot_eager"}
    norm = (lambda x, w, b: plain_rms_norm(x, w)) if kind == "rms_norm" else _torch_norm(kind)
    torch._dynamo.reset()  # Dynamo compiles a function for at most eight sizes
    return Contestant("torch.compile", torch.compile(norm, **options), torch.compile(_two_steps(norm), **options))


def _liger(kind: str) -> Contestant:
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    if kind == "layer_norm":
        return Contestant("liger", lambda x, w, b: LigerLayerNormFunction.apply(x, w, b, EPS), None)
    return Contestant(
        "liger",
        # "gemma" computes everything in float32, like our norm. It is not in place, because gradients are used again.
        lambda x, w, b: LigerRMSNormFunction.apply(x, w, EPS, 0.0, "gemma", False),
        lambda x, r, w, b: LigerFusedAddRMSNormFunction.apply(x, r, w, EPS, 0.0, "gemma", False),
    )


def _quack(kind: str) -> Contestant:
    from quack import rmsnorm

    if kind != "rms_norm":
        raise ImportError("quack's LayerNorm has no autograd function")
    return Contestant("quack", lambda x, w, b: rmsnorm(x, w, eps=EPS), _quack_add)


def _quack_add(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Any:
    from quack import rmsnorm

    return rmsnorm(x, weight, residual=residual, eps=EPS, prenorm=True)
