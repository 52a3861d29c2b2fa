"""Norms of DTensors: each process's part of the computation, and the communication between processes.

- Sharded rows (batch or sequence): each process normalizes its rows. Gains are replicated. The gradient of a gain is
  the sum over the processes; its placement is Partial, so DTensor computes this sum.
- Replicated rows: each process normalizes all of them.
- Features sharded over one dimension of the mesh: each process computes statistics of its part of every row. One
  all-gather of a few numbers per row combines them, with the same bits on every process. The backward pass sums two
  numbers per row in one all-reduce. Gains are sharded like the features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from omninorm.errors import InputError
from omninorm.kernels import reference


def is_distributed(x: Tensor) -> bool:
    """Return whether x is a DTensor, without importing torch.distributed.tensor."""
    return x.__class__.__name__ == "DTensor"


def rms_norm(
    x: Any, weight: Any, eps: float | None, gain_offset: float, cast: str, on_rows: Callable[..., Tensor]
) -> Any:
    """Compute `reference.rms_norm_forward` for a DTensor; `on_rows` is the norm for rows that are not split."""
    parts = Parts(x, {"weight": weight})
    if parts.features is None:
        return parts.whole(on_rows(parts.x, *parts.gains, eps, gain_offset, cast))
    offset = 0.0 if weight is None else gain_offset
    constants = _eps(eps, parts.x), offset, cast, False, parts.width, parts.features
    return parts.whole(ShardedNormFunction.apply(parts.x, *parts.gains, None, *constants))  # type: ignore[no-untyped-call]


def layer_norm(x: Any, weight: Any, bias: Any, eps: float | None, on_rows: Callable[..., Tensor]) -> Any:
    """Compute `reference.layer_norm_forward` for a DTensor; `on_rows` is the norm for rows that are not split."""
    parts = Parts(x, {"weight": weight, "bias": bias})
    if parts.features is None:
        return parts.whole(on_rows(parts.x, *parts.gains, eps))
    constants = _eps(eps, parts.x), 0.0, "fp32", True, parts.width, parts.features
    return parts.whole(ShardedNormFunction.apply(parts.x, *parts.gains, *constants))  # type: ignore[no-untyped-call]


class Parts:
    """This process's part of x and of the gains; `whole` turns a result into a DTensor again.

    Args:
        x: a DTensor; partial sums are reduced first.
        gains: by name, a DTensor on x's mesh or None.

    Attributes:
        x, gains: local tensors. The placements of their gradients are set, so DTensor sums those of the gains.
        width: number of features of a whole row.
        features: the process group over which features are sharded, or None.

    Raises:
        InputError: a gain is not a DTensor or is on another mesh, or features are sharded twice or unevenly.
    """

    def __init__(self, x: Any, gains: dict[str, Any]) -> None:
        from torch.distributed.tensor import Partial, Replicate, Shard

        placements = [Replicate() if each.is_partial() else each for each in x.placements]
        x = x.redistribute(placements=placements)
        self._like, self._mesh, self._placements = x, x.device_mesh, placements
        self.width = x.shape[-1]
        over = [dim for dim, each in enumerate(placements) if each.is_shard(x.ndim - 1) or each.is_shard(-1)]
        if len(over) > 1:
            remedy = "redistribute x over one dimension of the mesh"
            invariant = "Features may be sharded over one mesh dimension only"
            raise InputError(invariant, f"placements {placements}", remedy)
        self.features = self._mesh.get_group(over[0]) if over else None
        if over and self.width % self._mesh.size(over[0]):
            received = f"{self.width} features over {self._mesh.size(over[0])} processes"
            remedy = "choose a width that is a multiple of the number of processes, or shard rows"
            raise InputError("Features must be sharded evenly", received, remedy)
        self.x = x.to_local()
        there = [Shard(0) if dim in over else Replicate() for dim in range(len(placements))]
        summed = [
            Partial() if each.is_shard() and dim not in over else there[dim] for dim, each in enumerate(placements)
        ]
        self.gains = [self._gain(name, gain, there, summed) for name, gain in gains.items()]

    def whole(self, y: Tensor) -> Any:
        """Return the DTensor whose local part on this process is y."""
        from torch.distributed.tensor import DTensor

        like = self._like
        stride = torch.empty(like.shape, device="meta").stride()  # y's rows are contiguous
        return DTensor.from_local(y, self._mesh, self._placements, run_check=False, shape=like.shape, stride=stride)

    def _gain(self, name: str, gain: Any, placements: Sequence[Any], of_gradient: Sequence[Any]) -> Tensor | None:
        if gain is None:
            return None
        if not is_distributed(gain) or gain.device_mesh != self._mesh:
            what = "a DTensor on another mesh" if is_distributed(gain) else f"a {type(gain).__name__}"
            remedy = (
                "replicate it on that mesh, with parallelize_module and SequenceParallel() or with distribute_tensor"
            )
            raise InputError(f"{name} of a distributed x must be a DTensor on x's mesh", what, remedy)
        local: Tensor = gain.redistribute(placements=placements).to_local(grad_placements=of_gradient)
        return local


class ShardedNormFunction(torch.autograd.Function):
    """RMSNorm or LayerNorm of rows whose features are sharded; differentiable once."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, gain_offset: float, cast: str,
        centered: bool, width: int, group: Any,
    ) -> Tensor:  # fmt: skip
        rows = reference.as_rows(x).to(reference.compute_dtype(x.dtype))
        center, *frame = _measure(rows, eps, centered, width, group)
        normed = _normalize(rows, center, *frame)
        rounded = reference.round_before_gain(normed, x.dtype, cast)
        y = rounded * reference.gain(weight, gain_offset, normed.dtype)
        y = y if bias is None else y + bias.to(y.dtype)
        ctx.save_for_backward(x, weight, bias, center, *frame)
        ctx.constants = gain_offset, cast, centered, width, group
        return y.to(x.dtype).reshape(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, center, rest, per_unit, root = ctx.saved_tensors
        gain_offset, cast, centered, width, group = ctx.constants
        normed = _normalize(reference.as_rows(x).to(root.dtype), center, rest, per_unit, root)
        dy = reference.as_rows(dy).to(normed.dtype)
        g = dy * reference.gain(weight, gain_offset, normed.dtype)
        sums = torch.stack([reference.ordered_sum(each, 1).squeeze(1) for each in (g * normed, g)])
        dist.all_reduce(sums, group=group)
        mean_product, mean_g = (sums / width).unsqueeze(-1)
        dx = (g - normed * mean_product - (mean_g if centered else 0.0)) * root * per_unit
        dx = dx.to(x.dtype).reshape(x.shape)
        rounded = reference.round_before_gain(normed, x.dtype, cast)
        dweight = None if weight is None else reference.column_sum(dy * rounded).to(weight.dtype)
        dbias = None if bias is None else reference.column_sum(dy).to(bias.dtype)
        return dx, dweight, dbias, *[None] * 6


def _normalize(rows: Tensor, center: Tensor, rest: Tensor, per_unit: Tensor, root: Tensor) -> Tensor:
    """Return x̂ = ((x − center) · per_unit − rest) · root."""
    return ((rows - center) * per_unit - rest) * root


def _measure(rows: Tensor, eps: float, centered: bool, width: int, group: Any) -> tuple[Tensor, ...]:
    """Return center, rest, per_unit and root of `_normalize`, (rows, 1) each.

    The processes exchange three numbers per row, in float64: the mean μᵢ of their part, the sum of squared deviations
    from it, and their unit. The sums are combined by Σ(x − μ)² = Σᵢ (Σ(x − μᵢ)² + n (μᵢ − μ)²) for parts of n features
    (Chan, Golub and LeVeque 1983).
    """
    count = rows.shape[1]
    center = reference.rounded_mean(rows) if centered else torch.zeros_like(rows[:, :1])
    rows = rows - center
    own_unit = reference.reciprocal_unit(rows, eps)
    rows = rows * own_unit
    rest = reference.mean(rows) if centered else torch.zeros_like(center)
    squares = reference.ordered_sum((rows - rest).square(), 1)

    mine = center.double() + rest.double() / own_unit.double()
    means, sums, units = _gather(torch.stack([mine, squares.double(), own_unit.double()]).squeeze(-1), group)
    mean = means[:1] + (means - means[:1]).mean(0, keepdim=True)
    unit = units.amin(0, keepdim=True)
    between = (means - mean).square().sum(0) * unit[0].square() * count
    power = ((sums * (unit / units).square()).sum(0) + between) / width + eps * unit[0].square()
    if not centered:
        mean = torch.zeros_like(mean)
    root, per_unit, mean = (each.reshape(-1, 1) for each in (power.rsqrt(), unit, mean))
    rest = (mean - center.double()) * per_unit
    return center, *(each.to(center.dtype) for each in (rest, per_unit, root))


def _gather(mine: Tensor, group: Any) -> Tensor:
    """Gather a tensor (numbers, rows) of every process; return (numbers, processes, rows)."""
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, mine.contiguous(), group=group)
    return torch.stack(everyone, 1)


def _eps(eps: float | None, x: Tensor) -> float:
    return reference.resolve_eps(eps, reference.compute_dtype(x.dtype))
