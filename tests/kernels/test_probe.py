"""Probes: what a norm passes to them, that it is right and changes no bit, and when no probe is called."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from helpers import oracle
from helpers.norm_checks import sampled
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from omninorm import functional
from omninorm.kernels import cpu, dispatch, probe

pytestmark = pytest.mark.skipif(bool(cpu.unavailable()), reason=cpu.unavailable())

EPS = 1e-3
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Blocks of 64 rows as long as 256 of them suffice, then larger ones.
ROWS = [1, 63, 64, 65, 1000, 64 * 256 + 1]


class Recorder:
    """A probe that keeps copies of everything that it receives, in the order of the calls."""

    def __init__(self) -> None:
        self.shown: list[tuple[str, tuple[Any, ...]]] = []

    def forward(self, x: Tensor, scale: Tensor, mean: Tensor | None, eps: float) -> None:
        self._note("forward", x, scale, mean, eps)

    def backward(self, dy: Tensor, dgain: Tensor | None, blocks: Tensor | None, rows_per_block: int) -> None:
        self._note("backward", dy, dgain, blocks, rows_per_block)

    def _note(self, name: str, *given: Any) -> None:
        assert not torch.is_grad_enabled()
        self.shown.append((name, tuple(g.detach().clone() if isinstance(g, Tensor) else g for g in given)))

    @property
    def calls(self) -> list[str]:
        return [name for name, _ in self.shown]

    def only(self, name: str) -> tuple[Any, ...]:
        (given,) = (given for called, given in self.shown if called == name)
        return given


@contextmanager
def watched(by: probe.Probe | None) -> Iterator[None]:
    """As a watcher does: set right before a norm, taken away right after."""
    probe.current = by
    try:
        yield
    finally:
        probe.current = None


class Norm(NamedTuple):
    """One of the four, as f(x, residual, γ, β) → (y,) or (y, x + residual)."""

    compute: Callable[..., tuple[Tensor, ...]]
    centered: bool
    adds: bool


NORMS = {
    "rms_norm": Norm(lambda x, residual, g, b: (functional.rms_norm(x, g, EPS, cast="llama"),), False, False),
    "add_rms_norm": Norm(lambda x, r, g, b: functional.add_rms_norm(x, r, g, EPS, gain_offset=1.0), False, True),
    "layer_norm": Norm(lambda x, residual, g, b: (functional.layer_norm(x, g, b, EPS),), True, False),
    "add_layer_norm": Norm(lambda x, r, g, b: functional.add_layer_norm(x, r, g, b, EPS), True, True),
}
all_norms = pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)


def leaves_of(rows: int, width: int, dtype: torch.dtype, gains: torch.dtype | None = None) -> list[Tensor]:
    """x, residual, γ, β; off centre."""
    gains = dtype if gains is None else gains
    rows_of = [(torch.randn(rows, width) + 0.3).to(dtype) for _ in range(2)]
    return [leaf.requires_grad_() for leaf in (*rows_of, *(torch.randn(width).to(gains) for _ in range(2)))]


def run(norm: Norm, leaves: list[Tensor], along: list[Tensor], by: probe.Probe | None = None) -> list[Tensor | None]:
    """Return the results and the gradients of the leaves, with the probe `by` set for the forward pass."""
    with watched(by):
        made = norm.compute(*leaves)
    trainable = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    gradients = torch.autograd.grad(made, trainable, along[: len(made)], allow_unused=True)
    return [*(t.detach() for t in made), *gradients]


def same_bits(ours: list[Tensor | None], theirs: list[Tensor | None]) -> bool:
    def same(a: Tensor | None, b: Tensor | None) -> bool:
        return a is b if a is None or b is None else a.dtype == b.dtype and torch.equal(a, b)

    return all(same(a, b) for a, b in zip(ours, theirs, strict=True))


# No bit changes --------------------------------------------------------------------------------------------------


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


QUICK = [(torch.float32, 2), (torch.bfloat16, 1)]
CASES = sampled(itertools.product(DTYPES, [1, 2]), lambda *case: case in QUICK)


@all_norms
@pytest.mark.parametrize(("dtype", "threads"), CASES, indirect=["threads"], ids=str)
def test_a_probe_changes_no_bit(norm: Norm, dtype: torch.dtype, threads: int) -> None:
    """Nor does the number of threads change the block sums that the probe receives."""
    for rows, width in [*((rows, 33) for rows in ROWS), (1, 4099), (65, 1), (130, 768)]:
        leaves = leaves_of(rows, width, dtype)
        along = [torch.randn(rows, width).to(dtype) for _ in range(2)]
        recorder = Recorder()
        assert same_bits(run(norm, leaves, along, recorder), run(norm, leaves, along)), (rows, width)
        assert recorder.calls == ["forward", "backward"]
        blocks = recorder.only("backward")[2]
        torch.set_num_threads(3 - threads)
        other = Recorder()
        run(norm, leaves, along, other)
        torch.set_num_threads(threads)
        assert torch.equal(other.only("backward")[2], blocks)


@all_norms
def test_a_probe_changes_no_bit_on_any_instruction_set(norm: Norm, instruction_set: str) -> None:
    leaves, along = leaves_of(200, 77, torch.bfloat16), [torch.randn(200, 77).bfloat16() for _ in range(2)]
    assert same_bits(run(norm, leaves, along, Recorder()), run(norm, leaves, along))


# The values that a probe receives --------------------------------------------------------------------------------


@all_norms
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_row_statistics(norm: Norm, dtype: torch.dtype) -> None:
    leaves, recorder = leaves_of(70, 33, dtype), Recorder()
    run(norm, leaves, [torch.ones(70, 33, dtype=dtype)] * 2, recorder)
    x, scale, mean, eps = recorder.only("forward")
    assert torch.equal(x, leaves[0] + leaves[1] if norm.adds else leaves[0])
    exact = x.double()
    exact_mean = exact.mean(-1) if norm.centered else torch.zeros(70)
    exact_scale = torch.rsqrt((exact - exact_mean[:, None]).square().mean(-1) + EPS)
    compute = oracle.compute_dtype(dtype)
    close = 4 * torch.finfo(compute).eps
    assert scale.dtype == compute
    torch.testing.assert_close(scale.double(), exact_scale, rtol=close, atol=0)
    assert (mean is not None) == norm.centered
    if mean is not None:
        assert mean.dtype == compute
        torch.testing.assert_close(mean.double(), exact_mean, rtol=close, atol=close)
    assert eps == EPS


@all_norms
@pytest.mark.parametrize("gains", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_gain_gradient_is_the_rounded_sum_of_the_blocks(norm: Norm, gains: torch.dtype) -> None:
    for rows in ROWS:
        leaves, recorder = leaves_of(rows, 33, torch.float32, gains), Recorder()
        along = [torch.randn(rows, 33) for _ in range(2)]
        made = run(norm, leaves, along, recorder)
        dy, dgain, blocks, _ = recorder.only("backward")
        assert torch.equal(dy, along[0])
        assert torch.equal(dgain, made[-2])
        total = torch.zeros(33, dtype=torch.float64)
        for block in blocks:  # in their order
            total = total + block
        assert torch.equal(total.float().to(gains) if gains != torch.float64 else total, dgain)


@all_norms
@pytest.mark.parametrize(("rows", "each", "number"), [(1, 64, 1), (64, 64, 1), (65, 64, 2), (1000, 64, 16)])
def test_a_block_is_the_gain_gradient_of_its_rows(norm: Norm, rows: int, each: int, number: int) -> None:
    """Bit for bit, with a gain of float64, whose gradient is not rounded."""
    leaves, recorder = leaves_of(rows, 17, torch.bfloat16, torch.float64), Recorder()
    along = [torch.randn(rows, 17).bfloat16() for _ in range(2)]
    run(norm, leaves, along, recorder)
    *_, blocks, rows_per_block = recorder.only("backward")
    assert (rows_per_block, blocks.shape, blocks.dtype) == (each, (number, 17), torch.float64)
    for at, block in enumerate(blocks):
        part = slice(at * each, (at + 1) * each)
        of_part = [leaf.detach()[part].requires_grad_() for leaf in leaves[:2]]
        *_, dgain, _ = run(norm, [*of_part, *leaves[2:]], [dy[part] for dy in along])
        assert torch.equal(block, dgain)


@all_norms
def test_many_rows_make_larger_blocks(norm: Norm) -> None:
    """With x̂ the same in every row and dy = 1, each block counts its rows."""
    rows = 64 * 256 + 1
    leaves, recorder = leaves_of(1, 2, torch.float32), Recorder()
    leaves[:2] = [leaf.detach().expand(rows, 2).clone().requires_grad_() for leaf in leaves[:2]]
    run(norm, leaves, [torch.ones(rows, 2)] * 2, recorder)
    *_, blocks, rows_per_block = recorder.only("backward")
    assert (rows_per_block, blocks.shape) == (65, (253, 2))
    counts = torch.tensor([65.0] * 252 + [rows - 252 * 65.0], dtype=torch.float64)
    torch.testing.assert_close(blocks[:, 0] / blocks[0, 0] * 65, counts)


@pytest.mark.parametrize(("norm", "dead"), [("rms_norm", (2,)), ("add_rms_norm", (2,)), ("layer_norm", (2, 3))])
def test_a_frozen_gain_has_no_blocks(norm: str, dead: tuple[int, ...]) -> None:
    for frozen in (True, False):
        leaves, recorder = leaves_of(5, 8, torch.float32), Recorder()
        for place in dead:
            leaves[place] = leaves[place].detach() if frozen else None
        run(NORMS[norm], leaves, [torch.ones(5, 8)] * 2, recorder)
        dy, dgain, blocks, _ = recorder.only("backward")
        assert (dy.shape, dgain, blocks) == ((5, 8), None, None)


def test_a_bias_alone_has_no_blocks() -> None:
    leaves, recorder = leaves_of(5, 8, torch.float32), Recorder()
    leaves[2] = None
    run(NORMS["layer_norm"], leaves, [torch.ones(5, 8)], recorder)
    assert recorder.only("backward")[1:3] == (None, None)


@all_norms
def test_a_probe_receives_an_empty_batch(norm: Norm) -> None:
    leaves, recorder = leaves_of(0, 8, torch.float32), Recorder()
    run(norm, leaves, [torch.ones(0, 8)] * 2, recorder)
    assert recorder.only("forward")[1].shape == (0,)
    _, dgain, blocks, _ = recorder.only("backward")
    assert torch.equal(dgain, torch.zeros(8))
    assert blocks.shape == (0, 8)


@all_norms
def test_rows_of_more_dimensions_and_other_strides(norm: Norm) -> None:
    flat = leaves_of(6, 8, torch.float32)
    strided = [leaf.detach().view(2, 3, 8).transpose(0, 1).contiguous().transpose(0, 1) for leaf in flat[:2]]
    along = [torch.randn(6, 8) for _ in range(2)]
    recorders = Recorder(), Recorder()
    run(norm, flat, along, recorders[0])
    run(norm, [*(leaf.requires_grad_() for leaf in strided), *flat[2:]], [a.view(2, 3, 8) for a in along], recorders[1])
    for ours, theirs in zip(recorders[1].shown, recorders[0].shown, strict=True):
        for a, b in zip(ours[1], theirs[1], strict=True):
            assert torch.equal(a.reshape(b.shape), b) if isinstance(a, Tensor) else a == b


# When ------------------------------------------------------------------------------------------------------------


@all_norms
def test_the_probe_of_the_forward_pass_receives_the_backward_pass(norm: Norm) -> None:
    """Whoever is set in between sees nothing of it."""
    first, second, leaves = Recorder(), Recorder(), leaves_of(3, 8, torch.float32)
    with watched(first):
        y = norm.compute(*leaves)[0]
    unseen = norm.compute(*leaves)[0]
    with watched(second):
        (y + unseen).sum().backward()
    assert (first.calls, second.calls) == (["forward", "backward"], [])


@all_norms
def test_without_gradients_no_probe_is_called(norm: Norm) -> None:
    recorder, leaves = Recorder(), leaves_of(3, 8, torch.float32)
    with watched(recorder):
        with torch.no_grad():
            norm.compute(*leaves)
        with torch.inference_mode():
            norm.compute(*leaves)
        norm.compute(*(leaf.detach() for leaf in leaves))
    assert recorder.calls == []


@all_norms
def test_the_reference_calls_no_probe(norm: Norm) -> None:
    recorder, leaves = Recorder(), leaves_of(3, 8, torch.float32)
    with watched(recorder), dispatch.use_backend("reference"):
        norm.compute(*leaves)[0].sum().backward()
    assert recorder.calls == []


@all_norms
def test_with_create_graph_the_backward_pass_calls_no_probe(norm: Norm) -> None:
    recorder, leaves = Recorder(), leaves_of(3, 8, torch.float64)
    with watched(recorder):
        y = norm.compute(*leaves)[0]
    (dx,) = torch.autograd.grad(y, leaves[0], torch.randn(3, 8, dtype=torch.float64), create_graph=True)
    dx.square().sum().backward()
    assert recorder.calls == ["forward"]
    assert leaves[2].grad.abs().max() > 0


@pytest.mark.parametrize("norm", ["add_rms_norm", "add_layer_norm"])
def test_a_norm_that_the_loss_does_not_depend_on_calls_no_backward_probe(norm: str) -> None:
    recorder, leaves = Recorder(), leaves_of(3, 8, torch.float32)
    with watched(recorder):
        _, total = NORMS[norm].compute(*leaves)
    total.sum().backward()
    assert recorder.calls == ["forward"]


@all_norms
def test_a_probe_receives_every_backward_pass(norm: Norm) -> None:
    recorder, leaves = Recorder(), leaves_of(3, 8, torch.float32)
    with watched(recorder):
        y = norm.compute(*leaves)[0]
    y.sum().backward(retain_graph=True)
    y.sum().backward()
    assert recorder.calls == ["forward", "backward", "backward"]


@all_norms
@pytest.mark.parametrize("reentrant", [True, False])
def test_with_checkpointing_the_recomputed_forward_pass_is_probed(norm: Norm, reentrant: bool) -> None:
    """Reentrant ones run it first in no_grad; the others run it twice, and the first is the one that is kept."""
    leaves, along = leaves_of(70, 8, torch.float32), torch.randn(70, 8)
    expected = run(Norm(lambda *given: norm.compute(*given)[:1], norm.centered, norm.adds), leaves, [along])[1:]
    recorder = Recorder()

    def layer(*given: Tensor) -> Tensor:
        with watched(recorder):
            return norm.compute(*given)[0]

    checkpoint(layer, *leaves, use_reentrant=reentrant).backward(along)
    assert recorder.calls == ["forward"] * (1 if reentrant else 2) + ["backward"]
    assert same_bits([leaf.grad for leaf in leaves], expected)


class Failing(Recorder):
    """Raises in the method of this name."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def _note(self, name: str, *given: Any) -> None:
        if name == self.where:
            raise ZeroDivisionError(name)


@all_norms
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_exception_of_a_probe_reaches_the_caller_and_changes_nothing(norm: Norm, where: str) -> None:
    leaves, along = leaves_of(3, 8, torch.float32), [torch.randn(3, 8) for _ in range(2)]
    expected = run(norm, leaves, along)
    with pytest.raises(ZeroDivisionError, match=where):
        run(norm, leaves, along, Failing(where))
    assert all(leaf.grad is None for leaf in leaves)
    assert same_bits(run(norm, leaves, along), expected)


# torch.compile ---------------------------------------------------------------------------------------------------


@all_norms
@pytest.mark.parametrize(
    "first", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["first call probed", "first call not probed"]
)
@pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated:DeprecationWarning")
def test_compiled_norms_ignore_the_probe(norm: Norm, first: bool) -> None:
    """One graph, with and without a probe, which is never called."""
    torch._dynamo.reset()
    counter, recorder = CompileCounterWithBackend("aot_eager"), Recorder()
    compiled = norm._replace(compute=torch.compile(norm.compute, fullgraph=True, backend=counter, dynamic=False))
    leaves, along = leaves_of(6, 33, torch.float32), [torch.randn(6, 33) for _ in range(2)]
    expected = run(norm, leaves, along)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for by in (recorder, None, recorder, None, Recorder())[0 if first else 1 :]:
            assert same_bits(run(compiled, leaves, along, by), expected)
    assert counter.frame_count == 1
    assert recorder.calls == []
    torch._dynamo.reset()
