"""torch.compile: one graph with the operators, the same bits and gradients, no recompilation, autocast."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from omninorm import functional, use_backend
from omninorm.kernels import cpu

pytestmark = [
    pytest.mark.skipif(bool(cpu.unavailable()), reason=cpu.unavailable()),
    # Dynamo makes an instance of every autograd.Function that it traces, and torch warns of that.
    pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated:DeprecationWarning"),
    # Inductor's own, when it is imported.
    pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning"),
]


def rms(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    return (functional.rms_norm(x, weight, gain_offset=1.0, cast="llama") + bias,)


def add_rms(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    return functional.add_rms_norm(x, x.flip(0), weight)


def layer(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    return (functional.layer_norm(x, weight, bias),)


def add_layer(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    return functional.add_layer_norm(x, x.flip(0), weight, bias)


@pytest.fixture(autouse=True)
def reset_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def results(norm: Callable[..., tuple[Tensor, ...]], rows: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """Return the results of `norm` and its gradients, for the same numbers in every call."""
    numbers = torch.Generator().manual_seed(rows * width)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=numbers)

    leaves = [random(rows, width).to(dtype), random(width), random(width)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    made = norm(*leaves)
    along = [random(rows, width).to(dtype) for _ in made]
    gradients = torch.autograd.grad(made, leaves, along, allow_unused=True)
    return [t.detach() for t in (*made, *gradients) if t is not None]


# The bits are those of the operators. Only "rms" has another operation, an addition, which is a separate step.
@pytest.mark.parametrize(
    ("norm", "dtype"),
    [
        (rms, torch.bfloat16),
        (add_layer, torch.float32),
        pytest.param(rms, torch.float32, marks=pytest.mark.slow),
        pytest.param(add_rms, torch.float32, marks=pytest.mark.slow),
        pytest.param(add_rms, torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(layer, torch.float32, marks=pytest.mark.slow),
        pytest.param(layer, torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(add_layer, torch.bfloat16, marks=pytest.mark.slow),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_one_graph_without_breaks_and_the_same_bits(norm, dtype: torch.dtype) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(norm, fullgraph=True, backend=counter, dynamic=False)
    for ours, expected in zip(results(compiled, 6, 33, dtype), results(norm, 6, 33, dtype), strict=True):
        assert ours.dtype == expected.dtype
        assert torch.equal(ours, expected)
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize("norm", [rms, layer])
def test_inputs_of_two_and_four_dimensions_in_turns_are_compiled_once_each(norm) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(norm, fullgraph=True, backend=counter, dynamic=True)
    weight, bias = torch.randn(16, requires_grad=True), torch.randn(16, requires_grad=True)
    attempts = []
    for turn in range(8):
        for shape in [(6 + turn, 16), (2, 3, 5 + turn, 16)]:
            x = torch.randn(shape, requires_grad=True)
            assert torch.equal(compiled(x, weight, bias)[0], norm(x, weight, bias)[0])
        attempts.append(counter.frame_count)
    assert attempts[-1] == attempts[1] <= 4


@pytest.mark.parametrize("norm", [rms, pytest.param(add_layer, marks=pytest.mark.slow)])
def test_dynamic_shapes_are_not_compiled_again(norm) -> None:
    """The first call may take Dynamo several attempts; the sizes that follow take none."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(norm, fullgraph=True, backend=counter, dynamic=True)
    results(compiled, 6, 33, torch.float32)
    attempts = counter.frame_count
    for rows, width in [(3, 64), (1000, 5), (9, 700), (6, 33)]:
        ours, theirs = (results(f, rows, width, torch.float32) for f in (compiled, norm))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert counter.frame_count == attempts >= 1


@pytest.mark.slow
@pytest.mark.parametrize("norm", [rms])
def test_inductor_runs_the_operators(norm) -> None:
    """The whole way to C++ code, with static sizes and then with dynamic ones."""
    compiled = torch.compile(norm, fullgraph=True)
    for rows in (6, 11):
        for ours, expected in zip(
            results(compiled, rows, 33, torch.bfloat16), results(norm, rows, 33, torch.bfloat16), strict=True
        ):
            torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("norm", [functional.rms_norm, pytest.param(functional.layer_norm, marks=pytest.mark.slow)])
def test_autocast_keeps_bfloat16_and_casts_nothing(norm) -> None:
    """Eager and compiled: torch's own norms are in autocast's float32 list, which costs a cast each way."""
    x = torch.randn(4, 32).bfloat16()
    weight = torch.randn(32)
    expected = norm(x, weight)
    counter = CompileCounterWithBackend("aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for compute in (norm, torch.compile(norm, fullgraph=True, backend=counter)):
            y = compute(x, weight)
            assert y.dtype == torch.bfloat16
            assert torch.equal(y, expected)
            assert norm(x.float(), weight).dtype == torch.float32
    assert counter.frame_count == 1


def test_the_compiled_graph_holds_one_operator() -> None:
    """Not the reference's thirty operations."""
    seen: list[str] = []

    def look(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    with torch.no_grad():
        torch.compile(functional.rms_norm, fullgraph=True, backend=look)(torch.randn(3, 8))
    assert [target for target in seen if "omninorm" in target] == ["omninorm.rms_norm.default"]
    assert not [target for target in seen if "rsqrt" in target or "sum" in target]


@pytest.mark.parametrize("norm", [functional.rms_norm, pytest.param(functional.layer_norm, marks=pytest.mark.slow)])
def test_compiled_function_transforms_differentiate(norm) -> None:
    """Inside torch.func, requires_grad is False; an operator without its derivative would give zeros."""
    x, weight = torch.randn(3, 8), torch.randn(8)

    def loss(row: torch.Tensor) -> torch.Tensor:
        return norm(row, weight).square().mul(torch.arange(8.0)).sum()

    for transform in (lambda f: torch.func.grad(f), lambda f: torch.func.vmap(torch.func.grad(f))):
        expected = transform(loss)(x)
        compiled = torch.compile(lambda rows, transform=transform: transform(loss)(rows), backend="aot_eager")
        assert expected.abs().max() > 0.01
        torch.testing.assert_close(compiled(x), expected)


def test_the_same_tensor_may_be_passed_twice() -> None:
    """Dynamo does not accept one tensor as two arguments of an autograd.Function."""
    x, weight = torch.randn(3, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    for norm in (
        lambda: functional.add_rms_norm(x, x, weight)[0],
        lambda: functional.layer_norm(x, weight, weight),
        lambda: functional.add_layer_norm(x, x, weight, weight)[0],
    ):
        eager = torch.autograd.grad(norm().square().sum(), (x, weight))
        compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")()
        assert torch.equal(compiled, norm())
        for one, other in zip(torch.autograd.grad(compiled.square().sum(), (x, weight)), eager, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_llamas_rounding_of_the_reference_survives_inductor(dtype: torch.dtype) -> None:
    """Inductor removes a cast to a narrower dtype that is followed by the cast back."""
    x, weight = torch.randn(64, 256).to(dtype), torch.randn(256).to(dtype)
    x.requires_grad_()
    exact = x.detach().float() * torch.rsqrt(x.detach().float().square().mean(-1, keepdim=True) + 1e-6)
    with use_backend("reference"):
        norm = torch.compile(lambda: functional.rms_norm(x, weight, 1e-6, cast="llama"), fullgraph=True)
        y = norm()
    # one unit where rsqrt rounds otherwise; a quarter of all differ where the rounding is left out
    assert (y.detach() != exact.to(dtype) * weight).float().mean() < 0.01
    y.sum().backward()
    assert x.grad.isfinite().all()
