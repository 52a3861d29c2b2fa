"""torch.compile of norms on a GPU: operations that Inductor can fuse, no operator of omninorm.

Without a GPU, Dynamo traces fake tensors on "cuda", without gradients; the graph with gradients is that of the same
back end on the CPU.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._subclasses import FakeTensorMode

import omninorm
from omninorm import functional
from omninorm.kernels import gpu, measured, reference

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning"),
]

Norm = Callable[[Tensor, Tensor], Any]
NORMS: dict[str, Norm] = {
    "rms_norm": lambda x, weight: functional.rms_norm(x, weight),
    "Llama's order": lambda x, weight: functional.rms_norm(x, weight, cast="llama"),
    "Gemma's offset": lambda x, weight: functional.rms_norm(x, weight, gain_offset=1.0),
    "a float32 gain": lambda x, weight: functional.rms_norm(x, weight.float()),
    "layer_norm": lambda x, weight: functional.layer_norm(x, weight, weight),
    "layer_norm with a float32 gain": lambda x, weight: functional.layer_norm(x, weight.float()),
    "add_rms_norm": lambda x, weight: functional.add_rms_norm(x, x + 1, weight)[0],
    "add_layer_norm": lambda x, weight: functional.add_layer_norm(x, x + 1, weight)[0],
}


@pytest.fixture(autouse=True)
def reset_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def triton_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "unavailable", lambda: "")


def names(graph: torch.fx.GraphModule) -> list[str]:
    """Return what a graph and the graphs inside it call."""
    inner = [each for each in graph.modules() if isinstance(each, torch.fx.GraphModule)]
    return [str(node.target) for each in inner for node in each.graph.nodes if node.op == "call_function"]


def traced(norm: Norm, device: str) -> list[str]:
    """Return the calls in Dynamo's graph of a norm of bfloat16 rows on a device, without gradients."""
    seen: list[str] = []

    def look(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.extend(names(graph))
        return graph.forward

    with FakeTensorMode(), torch.no_grad():
        x, weight = (torch.empty(shape, dtype=torch.bfloat16, device=device) for shape in [(4, 16), (16,)])
        torch.compile(norm, fullgraph=True, backend=look)(x, weight)
    return seen


@pytest.mark.parametrize("name", NORMS)
def test_graph_on_a_gpu_holds_no_opaque_operator(name: str) -> None:
    calls = traced(NORMS[name], "cuda")
    assert calls
    assert not [call for call in calls if "omninorm" in call]
    assert any("norm" in call or "rsqrt" in call for call in calls)


def test_graph_on_the_cpu_holds_the_operator() -> None:
    """This shows that the test above would find an operator."""
    seen: list[str] = []

    def look(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.extend(names(graph))
        return graph.forward

    with torch.no_grad():
        torch.compile(NORMS["rms_norm"], fullgraph=True, backend=look)(torch.randn(4, 16), torch.randn(16))
    assert any("omninorm" in call for call in seen)


def test_requested_triton_stays_one_operator_on_a_gpu(monkeypatch) -> None:
    monkeypatch.setattr(gpu, "device", lambda: "a GPU")
    with omninorm.use_backend("triton"):
        assert "omninorm.rms_norm.default" in traced(NORMS["rms_norm"], "cuda")


def test_measured_operator_stays_one_operator_on_a_gpu(monkeypatch) -> None:
    row = measured.Measurement("NVIDIA H100*", "rms_norm", "bfloat16", 16, 4096, "triton", "gpu.json", compiled=True)
    monkeypatch.setattr(measured, "MEASUREMENTS", [row])
    monkeypatch.setattr(measured, "ALWAYS_DEFAULT", row.backend == measured.DEFAULT)
    monkeypatch.setattr(measured, "device_name", lambda device: "NVIDIA H100 80GB HBM3")
    measured._chosen.cache_clear()
    try:
        assert "omninorm.rms_norm.default" in traced(NORMS["rms_norm"], "cuda")
        assert "omninorm.rms_norm.default" in traced(NORMS["Llama's order"], "cuda")
        assert not [call for call in traced(NORMS["layer_norm"], "cuda") if "omninorm" in call]
    finally:
        measured._chosen.cache_clear()


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("norm", [functional.rms_norm, functional.layer_norm])
def test_graphs_with_gradients_hold_no_opaque_operator(backend: str, norm: Callable[..., Tensor]) -> None:
    """Forward and backward graphs of what computes norms on a GPU: PyTorch's operators, or the formula."""
    seen: list[list[str]] = []

    def look(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.append(names(graph))
        return make_boxed_func(graph.forward)

    x, weight = torch.randn(4, 16, requires_grad=True), torch.randn(16, requires_grad=True)
    compiled = torch.compile(norm, fullgraph=True, backend=aot_autograd(fw_compiler=look, bw_compiler=look))
    with omninorm.use_backend(backend):
        gradients = torch.autograd.grad(compiled(x, weight).square().sum(), (x, weight))
        expected = torch.autograd.grad(norm(x, weight).square().sum(), (x, weight))
    assert len(seen) == 2
    assert not [call for calls in seen for call in calls if "omninorm" in call]
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_with_integers_equals_the_cast(dtype: torch.dtype) -> None:
    edges = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, 2**-25]
    x = torch.cat([torch.randn(100_000) * 10 ** torch.empty(100_000).uniform_(-9, 4), torch.tensor(edges)])
    expected = x.to(dtype).float()
    assert torch.equal(reference.rounded_by_bits(x, dtype).nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0))
    numbers = ~x.isnan()
    assert torch.equal(torch.signbit(reference.rounded_by_bits(x, dtype))[numbers], torch.signbit(expected)[numbers])
    assert not torch.equal(x, expected)
