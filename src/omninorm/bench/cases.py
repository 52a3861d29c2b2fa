"""Benchmark cases: each function builds the contestants for one job on the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from omninorm import functional
from omninorm.bench import peers
from omninorm.bench.buffers import Buffers
from omninorm.bench.peers import EPS, Unavailable
from omninorm.kernels import cpu
from omninorm.timing import OURS, Case, Contestant

RMS_FORWARD = "RMSNorm forward"
RMS_BACKWARD = "RMSNorm backward"
RMS_BOTH = "RMSNorm forward+backward"
RMS_COMPILED = "RMSNorm forward+backward, compiled"
ADD_RMS_FORWARD = "add_rms_norm forward"
LAYER_BOTH = "LayerNorm forward+backward"
ONE_ROW = "RMSNorm, one row"
BY_AUTOGRAD = "omninorm by autograd"

Skip = Callable[[str, str], None]
Norm = Callable[[Tensor], Any]
# A peer's name, its role, and the function that builds it.
_Entry = tuple[str, str, Callable[[], Norm]]


class Context(NamedTuple):
    """Arguments for building a case: the inputs, the number of threads, and a callback for peers that are left out."""

    buffers: Buffers
    threads: int
    skip: Skip

    def module(self, make: Callable[[int, torch.dtype], nn.Module]) -> nn.Module:
        return make(self.buffers.width, self.buffers.dtype)


def rms_forward(context: Context) -> Case:
    """Compute y from x without a graph: 1 read + 1 write."""
    b = context.buffers

    def onnx() -> Norm:
        return peers.onnx_rms_norm(b.rows, b.width, b.dtype, context.threads)

    entries: list[_Entry] = [
        (OURS, "ours", lambda: context.module(peers.our_rms_norm)),
        ("torch.nn", "peer", lambda: context.module(peers.torch_rms_norm)),
        ("transformers Llama", "peer", lambda: context.module(peers.llama_rms_norm)),
        ("transformers Qwen3", "peer", lambda: context.module(peers.qwen3_rms_norm)),
        ("onnxruntime", "peer", onnx),
        ("torch.nn.LayerNorm", "other", lambda: context.module(peers.torch_layer_norm)),
    ]
    present = [Contestant(n, _forward(norm, b), role, 2 * b.bytes) for n, role, norm in _present(context, entries)]
    return Case(RMS_FORWARD, [*present, _clone(b)], b.count, grad=False)


def rms_backward(context: Context) -> Case:
    """Compute dx and dγ from dy: 2 reads + 1 write.

    Ours is the operator itself, as for clone; the same through autograd is a separate contestant. The peers have no
    backward operator that could be called, so autograd runs through graphs that were built before.
    """
    b = context.buffers
    ours = context.module(peers.our_rms_norm)
    entries = [
        (BY_AUTOGRAD, "other", ours),
        ("torch.nn", "peer", context.module(peers.torch_rms_norm)),
        ("torch.nn.LayerNorm", "other", context.module(peers.torch_layer_norm)),
    ]
    found = [Contestant(name, _backward(module, b), role, 3 * b.bytes) for name, role, module in entries]
    operator = Contestant(OURS, _backward_operator(ours, b), "ours", 3 * b.bytes)
    return Case(RMS_BACKWARD, [operator, *found, _clone(b)], b.count, grad=True)


def rms_both(context: Context) -> Case:
    """Compute y from x, then dx and dγ, by autograd: 3 reads + 2 writes."""
    entries: list[_Entry] = [
        (OURS, "ours", lambda: context.module(peers.our_rms_norm)),
        ("torch.nn", "peer", lambda: context.module(peers.torch_rms_norm)),
        ("transformers Llama", "peer", lambda: context.module(peers.llama_rms_norm)),
        ("torch.nn.LayerNorm", "other", lambda: context.module(peers.torch_layer_norm)),
    ]
    return _both(RMS_BOTH, context, entries)


def rms_compiled(context: Context) -> Case:
    """Compute the same as `rms_both`, with both modules compiled by torch.compile."""
    entries: list[_Entry] = [
        (OURS, "ours", lambda: peers.compiled(context.module(peers.our_rms_norm))),
        ("torch.compile", "peer", lambda: peers.compiled(context.module(peers.torch_rms_norm))),
    ]
    return _both(RMS_COMPILED, context, entries)


def layer_both(context: Context) -> Case:
    """Compute the same as `rms_both` for LayerNorm: y, then dx, dγ and dβ."""
    entries: list[_Entry] = [
        (OURS, "ours", lambda: context.module(peers.our_layer_norm)),
        ("torch.nn", "peer", lambda: context.module(peers.torch_layer_norm)),
    ]
    return _both(LAYER_BOTH, context, entries)


def add_rms_forward(context: Context) -> Case:
    """Compute x + residual and its norm without a graph: 2 reads + 2 writes; torch.add has 2 + 1."""
    b = context.buffers
    weight = torch.ones(b.width, dtype=b.dtype)
    stock = context.module(peers.torch_rms_norm)

    def two_steps(i: int) -> tuple[Tensor, Tensor]:
        total = b.x[i] + b.residual[i]
        return stock(total), total

    ours = Contestant(OURS, lambda i: functional.add_rms_norm(b.x[i], b.residual[i], weight, EPS), "ours", 4 * b.bytes)
    peer = Contestant("torch.add, torch.nn", two_steps, "peer", 4 * b.bytes)
    limit = Contestant("torch.add", lambda i: torch.add(b.x[i], b.residual[i]), "limit", 3 * b.bytes)
    return Case(ADD_RMS_FORWARD, [ours, peer, limit], b.count, grad=False)


def one_row(context: Context) -> Case:
    """Call a module on one row without a graph, to measure the overhead of a call.

    The row is always the same, so it is in the cache, like a row that another layer has just computed.
    """
    b = context.buffers
    entries = [
        (OURS, "ours", context.module(peers.our_rms_norm)),
        ("torch.nn", "peer", context.module(peers.torch_rms_norm)),
        ("torch.nn.LayerNorm", "other", context.module(peers.torch_layer_norm)),
    ]
    return Case(ONE_ROW, [Contestant(n, _forward(m, b), role) for n, role, m in entries], 1, grad=False)


CASES: dict[str, Callable[[Context], Case]] = {
    RMS_FORWARD: rms_forward,
    RMS_BACKWARD: rms_backward,
    ADD_RMS_FORWARD: add_rms_forward,
    RMS_BOTH: rms_both,
    LAYER_BOTH: layer_both,
    RMS_COMPILED: rms_compiled,
    ONE_ROW: one_row,
}


def check_agreement(case: Case) -> None:
    """Raise Unavailable unless every peer computes the same values, to the precision of the dtype."""
    with torch.set_grad_enabled(case.grad):
        ours = _tensors(next(each.call(0) for each in case.contestants if each.role == "ours"))
        for peer in (each for each in case.contestants if each.role == "peer"):
            for mine, theirs in zip(ours, _tensors(peer.call(0)), strict=True):
                scale = mine.float().abs().max().clamp_min(1e-30)
                error = ((mine.float() - theirs.float()).abs().max() / scale).item()
                if not error <= _tolerance(mine):
                    raise Unavailable(f"{peer.name} gives other values: the maximum relative difference is {error:.1e}")


def _tolerance(result: Tensor) -> float:
    """Return the tolerated difference between two implementations, relative to the largest element."""
    if result.dtype == torch.float32:
        return 1e-4
    # Half precision rounds at 2⁻⁸ or finer, and Llama's order rounds twice. Gradients of gains are sums over all rows,
    # and some implementations accumulate them in half precision.
    return 0.25 if result.ndim == 1 else 4e-2


def _both(name: str, context: Context, entries: Iterable[_Entry]) -> Case:
    b = context.buffers
    found = [
        Contestant(n, _forward_backward(norm, b), role, 5 * b.bytes) for n, role, norm in _present(context, entries)
    ]
    return Case(name, [*found, _clone(b)], b.count, grad=True)


def _present(context: Context, entries: Iterable[_Entry]) -> list[tuple[str, str, Norm]]:
    found = []
    for name, role, build in entries:
        try:
            found.append((name, role, build()))
        except Unavailable as reason:
            if role == "ours":
                raise
            context.skip(name, str(reason))
    return found


def _clone(b: Buffers) -> Contestant:
    xs = [x.detach() for x in b.x]
    return Contestant("clone", lambda i: xs[i].clone(), "limit", 2 * b.bytes)


def _forward(norm: Norm, b: Buffers) -> Callable[[int], Any]:
    xs = b.x
    return lambda i: norm(xs[i])


def _backward(module: nn.Module, b: Buffers) -> Callable[[int], Sequence[Tensor]]:
    parameters = list(module.parameters())
    outputs = [module(x) for x in b.x]
    return lambda i: torch.autograd.grad(outputs[i], [b.x[i], *parameters], b.dy[i], retain_graph=True)


def _backward_operator(norm: nn.Module, b: Buffers) -> Callable[[int], Sequence[Tensor]]:
    """Return a call of the C++ backward operator, or of autograd if the operators were not built."""
    if cpu.unavailable():
        return _backward(norm, b)
    weight = next(norm.parameters()).detach()
    rows = [(b.dy[i], None, b.x[i].detach()) for i in range(b.count)]
    scales = [torch.ops.omninorm.rms_norm_forward(x, weight, EPS)[1] for _, _, x in rows]
    operator = torch.ops.omninorm.rms_norm_backward.default
    return lambda i: operator(*rows[i], scales[i], weight, EPS)


def _forward_backward(norm: Norm, b: Buffers) -> Callable[[int], tuple[Any, Sequence[Tensor]]]:
    parameters = list(norm.parameters()) if isinstance(norm, nn.Module) else []

    def call(i: int) -> tuple[Any, Sequence[Tensor]]:
        y = norm(b.x[i])
        return y.detach(), torch.autograd.grad(y, [b.x[i], *parameters], b.dy[i])

    return call


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value.detach()]
    if isinstance(value, (tuple, list)):
        return [tensor for each in value for tensor in _tensors(each)]
    return [torch.from_numpy(value)]
