"""Statistics of norms. What omninorm norms compute anyway is passed on, so it needs no second pass over the data.

omninorm operators provide r = 1/√(mean(x²) + ε) of every row (with the variance, and the mean, for LayerNorm) as they
run, and in backward the sums of the gain's gradient over blocks of rows, from which each example's gradient follows.
For other norms, and for the reference implementation, the same is computed from the input and the output's gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from weakref import WeakSet

import torch
from torch import Tensor

from omninorm.kernels.autograd import by_triton, rows_per_block
from omninorm.layers.pointwise import Pointwise
from omninorm.layers.recognize import ACTIVATIONS
from omninorm.monitor.hooks.training_pass import in_backward
from omninorm.monitor.model_map.norms import Norm
from omninorm.monitor.probes.block import copied_rows, some_of, some_rows
from omninorm.monitor.probes.padding import Padding, weights_of
from omninorm.monitor.stats_buffer import StatsBuffer, fill
from omninorm.monitor.tensors import whole, widest

# Kinds of gates whose effect on the norm's input is known.
GATES = ("after", *ACTIVATIONS)
# r of a row of zeros is 1/√ε up to rounding; a row whose mean square is below this share of ε looks the same.
ROUNDING = 1e-5
SATURATED = 2.0  # for larger |αx|, tanh is above 0.96 and its slope below 0.07
# About as many norms measure gradients per example. Each needs passes over whole activations, and the noise scale is
# the ratio of two sums over the norms.
MOST_WITH_EXAMPLES = 8


class NormProbe:
    """One norm: `see` takes its input, `see_scale` the operators' statistics, `see_examples` γ's gradients.

    The methods `measure_…` measure what several norms have received."""

    def __init__(self, buffer: StatsBuffer, norm: Norm, index: int, padding: Padding) -> None:
        self.buffer, self.norm, self.index, self.padding = buffer, norm, index, padding
        self.eps = norm.facts.eps or 0.0
        self.width = 0 if norm.gain is None else norm.gain.numel()
        last_alone = norm.form.axis == -1 and norm.form.dims == 1 and norm.measured
        self.trainable = norm.gain is not None and norm.gain.requires_grad and self.width > 1 and last_alone
        self.with_examples = self.trainable
        self._waiting: WeakSet[Kept] = WeakSet()

    def keep(self, *tensors: Tensor | None) -> Kept:
        """Keep tensors for the backward pass, for as long as autograd does."""
        kept = Kept(tensors)
        if in_backward():
            # Activation checkpointing repeats a forward pass; these tensors may be for the first one's backward pass.
            if len(self._waiting) == 1:
                self._waiting.pop().tensors = tensors
        elif packs_what_is_saved():
            kept.tensors = None
            self._waiting.add(kept)
        return kept

    def see(self, x: Tensor, gate: Tensor | None = None) -> None:
        """Measure some rows of x (…, d), the norm's input, and of the gate that multiplies it."""
        form = self.norm.form
        if x.numel() == 0 or not self.norm.measured or (gate is not None and form.gate not in GATES):
            return
        x, gate = self._rows_last(x), None if gate is None else self._rows_last(gate)
        rows, wide = copied_rows(x), widest(x.device)
        if gate is not None and form.gate != "after":
            rows = rows.to(wide) * ACTIVATIONS[str(form.gate)](some_rows(gate).to(wide))
        module = self.norm.module
        if isinstance(module, Pointwise):
            saturated = (rows.to(wide) * module.alpha.detach().to(wide)).abs() > SATURATED
            self.buffer.add("saturation", self.index, saturated.to(torch.float32).mean())
        counts = some_of(self.padding.rows(x.shape[:-1], self.norm.batch_dim))
        if form.groups > 1:
            rows = rows.reshape(rows.shape[0], form.groups, -1)
            counts = None if counts is None else counts.unsqueeze(-1).expand(rows.shape[:2])
        self.buffer.batch(self.measure_rows, self, rows, counts, arguments=(self.norm.centred, self.eps))

    @staticmethod
    def measure_rows(
        sites: Sequence[NormProbe], rows: Tensor, counts: Tensor | None, centred: bool, eps: float
    ) -> None:
        """Measure n norms' inputs (n, rows, d), or (n, rows, groups, d)."""
        # In float32 the squares of an exploding stream overflow, and a small variance is lost next to a large mean.
        wide = widest(rows.device)
        square = torch.linalg.vector_norm(rows, dim=-1, dtype=wide).square() / rows.shape[-1]
        mean = rows.mean(dim=-1, dtype=wide) if centred else None
        _measure(sites, square, mean, square == 0, counts, eps)

    def _rows_last(self, x: Tensor) -> Tensor:
        """Return x with all features of a row in its last dimension."""
        form = self.norm.form
        if form.axis != -1 and x.ndim > 2:
            return x.movedim(form.axis, -1)
        return x.flatten(-form.dims) if form.dims > 1 else x

    def see_if_sampled(self, x: Tensor, gate: Tensor | None = None) -> None:
        if self.buffer.sampling:
            self.see(x, gate)

    def see_scale(self, scale: Tensor, mean: Tensor | None, shape: Sequence[int] = ()) -> None:
        """Measure scale (rows,), r of every row, and for a LayerNorm mean (rows,). `shape` is the rows' shape.

        They are kept for the backward pass anyway, and never changed.
        """
        counts = self.padding.rows(shape, self.norm.batch_dim) if shape else None
        self.buffer.batch(self.measure_scales, self, scale, mean, counts, arguments=(self.eps,))

    @staticmethod
    def measure_scales(
        sites: Sequence[NormProbe], scale: Tensor, mean: Tensor | None, counts: Tensor | None, eps: float
    ) -> None:
        """Measure r of n norms, (n, rows)."""
        spread = (scale.to(widest(scale.device)).pow(-2) - eps).clamp_min(0)
        zero = spread <= ROUNDING * eps
        zero = zero if mean is None else zero & (mean == 0)
        _measure(sites, spread if mean is None else spread + mean.to(spread.dtype).square(), mean, zero, counts, eps)

    def see_examples(self, gradients: Tensor) -> None:
        """Measure gradients (examples, d), each example's part of dγ. Their sum is the batch's gradient."""
        if gradients.shape[0] < 2:
            return
        self.buffer.batch(self.measure_examples, self, gradients)

    @staticmethod
    def measure_examples(sites: Sequence[NormProbe], gradients: Tensor) -> None:
        """Measure the gradients (n, examples, d) of n norms."""
        buffer, norms, count = sites[0].buffer, [site.index for site in sites], gradients.shape[1]
        gradients = gradients.to(widest(gradients.device))
        buffer.add_gradient("noise_small", norms, gradients.square().sum(dim=(1, 2)) * count)
        buffer.add_gradient("noise_big", norms, gradients.sum(dim=1).square().sum(dim=1))
        examples = fill(float(count), gradients.device, gradients.dtype)
        buffer.add("examples", norms, examples.expand(len(norms)))

    def see_output(self, dy: Tensor, y: Tensor) -> None:
        """Measure the output's gradient dy and the output y, both (examples, …, d). x̂ is (y − β)/γ where γ is not 0."""
        gain = self.norm.gain
        assert gain is not None
        effective = (whole(gain.detach()).flatten() + self.norm.offset).float()
        bias = self.norm.bias
        scaled = y if bias is None else y - bias.detach().flatten()
        sums = self.per_example(dy * scaled.to(dy.dtype))
        self.buffer.batch(self.measure_scaled_examples, self, sums, effective)

    @staticmethod
    def measure_scaled_examples(sites: Sequence[NormProbe], sums: Tensor, gains: Tensor) -> None:
        """Measure the gradients (n, examples, d) of n norms, times their gains (n, d)."""
        gains = gains.unsqueeze(1)
        NormProbe.measure_examples(sites, torch.where(gains == 0, 0, sums / gains))

    def see_output_if_sampled(self, dy: Tensor, y: Tensor) -> None:
        if self.buffer.sampling and self.has_examples(y.shape):
            self.see_output(dy, y)

    def has_examples(self, shape: torch.Size) -> bool:
        """Return whether an input of this shape holds several examples, whose gradients are measured."""
        return self.with_examples and len(shape) >= 3 and shape[-1] == self.width and shape[self.norm.batch_dim] > 1

    def per_example(self, products: Tensor) -> Tensor:
        """Sum (…, d) over all but the examples and the features: (examples, d), in float32 or wider."""
        by_example = products.movedim(self.norm.batch_dim, 0).flatten(1, -2)
        wide = torch.promote_types(products.dtype, torch.float32)
        return by_example.sum(dim=1, dtype=wide)


def choose_with_examples(probes: Sequence[NormProbe]) -> None:
    """Choose the norms that measure gradients per example, evenly spaced in the model."""
    able = [probe for probe in probes if probe.trainable]
    for at, probe in enumerate(able):
        probe.with_examples = at % -(-len(able) // MOST_WITH_EXAMPLES) == 0


def _measure(
    sites: Sequence[NormProbe], square: Tensor, mean: Tensor | None, zero: Tensor, counts: Tensor | None, eps: float
) -> None:
    """Add the means over each norm's rows that count and are not zero; over all rows if none is left.

    Args:
        square: the mean squares of the rows of n norms (n, rows), or (n, rows, groups) like all others.
        mean: the means of the rows.
        zero: which rows are zero.
        counts: which rows count.
    """
    buffer, norms = sites[0].buffer, [site.index for site in sites]
    zeros = zero.flatten(1).to(torch.float32).mean(dim=1)
    for site, share in zip(sites, zeros.unbind(), strict=True):
        if not site.norm.facts.block:  # the zero embeddings of padding reach the first block
            buffer.add("zero_rows", 0, share)
    mean_of = _means(~zero if counts is None else counts & ~zero, square.dtype, counts is not None)
    buffer.add("norm_ms", norms, mean_of(square))
    spread = square
    if mean is not None:
        of_mean = mean.to(square.dtype).square()
        spread = (square - of_mean).clamp_min(0)
        buffer.add("mean_share", norms, mean_of(of_mean / square.clamp_min(1e-30)))
    if eps:
        buffer.add("eps_share", norms, mean_of(eps / (spread + eps)))


def _means(counts: Tensor, dtype: torch.dtype, masked: bool) -> Callable[[Tensor], Tensor]:
    """Return a function for the means over rows that count. Rows of zeros are finite; masked rows may be NaN."""
    counts = counts.flatten(1)
    weights = weights_of(counts, dtype)

    def means(values: Tensor) -> Tensor:
        values = values.flatten(1)
        return ((torch.where(counts, values, 0) if masked else values) * weights).sum(dim=1)

    return means


class Kept:
    """Tensors for a backward pass; `tensors` is None until a repeated forward pass provides them."""

    def __init__(self, tensors: tuple[Tensor | None, ...]) -> None:
        self.tensors: tuple[Tensor | None, ...] | None = tensors


def packs_what_is_saved() -> bool:
    """Return whether hooks, such as those of activation checkpointing, pack the tensors that autograd saves."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


Safely = Callable[[Callable[[], None]], None]


class NormCall:
    """One call of an omninorm norm: receives the statistics of its operators (a `kernels.probe.Probe`).

    Args:
        shape: the shape of the input, (examples, …, d).
        counts: whether the forward pass counts; False if activation checkpointing repeats it.
        safely: calls a function in no_grad and suppresses its errors.
    """

    def __init__(self, site: NormProbe, shape: torch.Size, counts: bool, safely: Safely) -> None:
        self.site, self.shape, self.counts, self._safely = site, shape, counts, safely
        self.reached = False
        self._kept: Kept | None = None

    def forward(self, x: Tensor, scale: Tensor, mean: Tensor | None, eps: float) -> None:
        self.reached = True
        self.site.eps = eps
        self._safely(lambda: self._see(x, scale, mean))

    def _see(self, x: Tensor, scale: Tensor, mean: Tensor | None) -> None:
        if self.counts:
            rows = self.shape[: len(self.shape) - self.site.norm.form.dims]
            self.site.see_scale(scale, mean, rows)
        if self.site.has_examples(self.shape) and not self._ends_blocks(rows_per_block(scale.numel(), by_triton(x))):
            self._kept = self.site.keep(x.detach(), scale, mean)

    def backward(self, dy: Tensor, dgain: Tensor | None, blocks: Tensor | None, rows_per_block: int) -> None:
        if self.site.with_examples:
            self._safely(lambda: self._see_gradient(dy, blocks, rows_per_block))

    def _see_gradient(self, dy: Tensor, blocks: Tensor | None, rows_per_block: int) -> None:
        kept, self._kept = self._kept, None
        if not self.site.has_examples(self.shape):
            return
        examples, width = self.shape[0], self.shape[-1]
        if blocks is not None and self._ends_blocks(rows_per_block):
            self.site.see_examples(blocks.reshape(examples, -1, width).sum(dim=1))
        elif kept is not None and kept.tensors is not None:
            x, scale, mean = kept.tensors
            assert x is not None
            assert scale is not None
            one_each = (*self.shape[:-1], 1)
            deviation = x if mean is None else x - mean.view(one_each)
            self.site.see_examples(self.site.per_example(dy * (deviation * scale.view(one_each))))

    def _ends_blocks(self, rows_per_block: int) -> bool:
        """Return whether every example ends at the end of a block of rows."""
        return self.site.norm.batch_dim == 0 and self.shape[1:-1].numel() % rows_per_block == 0


def hook_examples(site: NormProbe, y: Tensor, safely: Safely) -> None:
    """Measure each example's dγ of a norm that is not from omninorm, from the gradient of its output y.

    Args:
        safely: calls a function in no_grad and suppresses its errors.
    """
    if not y.requires_grad or not site.has_examples(y.shape):
        return
    # A detached alias: otherwise the hook and the tensor would keep each other alive. The next layer keeps it anyway.
    kept = site.keep(y.detach())

    def see(dy: Tensor) -> None:
        values = None if kept.tensors is None else kept.tensors[0]
        if values is not None and values._version == version:  # otherwise it was overwritten in place
            site.see_output(dy, values)

    version = y._version
    y.register_hook(lambda dy: safely(lambda: see(dy)))  # type: ignore[no-untyped-call]
