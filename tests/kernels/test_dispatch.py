"""Back-end selection: plain CPU tensors reach the operators, all others the reference; `use_backend` is obeyed or refused."""

import importlib.metadata
import re
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import omninorm
from omninorm import functional
from omninorm.errors import ConfigError, InputError
from omninorm.kernels import cpu, dispatch, gpu

needs_operators = pytest.mark.skipif(bool(cpu.unavailable()), reason=cpu.unavailable())


class Watch(TorchDispatchMode):
    """Records which of omninorm's operators are called inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "omninorm":
            self.seen.append(func._schema.name.removeprefix("omninorm::"))
        return func(*args, **(kwargs or {}))


NORMS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "rms_norm": lambda x, weight: functional.rms_norm(x, weight),
    "add_rms_norm": lambda x, weight: functional.add_rms_norm(x, x, weight)[0],
    "layer_norm": lambda x, weight: functional.layer_norm(x, weight, weight),
    "add_layer_norm": lambda x, weight: functional.add_layer_norm(x, x, weight, weight)[0],
}


@needs_operators
@pytest.mark.parametrize("name", NORMS)
def test_plain_cpu_tensors_reach_the_operators(name: str, instruction_set: str) -> None:
    """One operator without gradients; with them the one that keeps the statistics, and the backward operator."""
    x, weight = torch.randn(3, 8), torch.nn.Parameter(torch.randn(8))
    with Watch() as watch, torch.no_grad():
        NORMS[name](x, weight)
    assert watch.seen == [name]
    with Watch() as watch:
        NORMS[name](x, weight).sum().backward()
    assert watch.seen == [f"{name}_forward", f"{name.removeprefix('add_')}_backward"]


@needs_operators
@pytest.mark.parametrize("layer", [omninorm.RMSNorm, omninorm.LayerNorm])
def test_the_layers_reach_the_operators(layer) -> None:
    with Watch() as watch, torch.inference_mode():
        layer(8)(torch.randn(2, 8))
    assert len(watch.seen) == 1


@pytest.mark.parametrize("name", NORMS)
def test_the_reference_does_not_call_the_operators(name: str) -> None:
    x, weight = torch.randn(3, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    with dispatch.use_backend("reference"), Watch() as watch:
        NORMS[name](x, weight).sum().backward()
    assert watch.seen == []


class Subclass(Tensor):
    pass


def under_vmap(x: Tensor) -> None:
    torch.func.vmap(functional.rms_norm)(x)


UNSUITED: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "a subclass": (lambda x: functional.rms_norm(x.as_subclass(Subclass)), "Subclass on cpu"),
    "a meta tensor": (lambda x: functional.layer_norm(x.to("meta")), "Tensor on meta"),
    "a meta pair": (lambda x: functional.add_rms_norm(x.to("meta"), x.to("meta")), "Tensor on meta"),
    "vmap": (under_vmap, "Tensor on cpu"),
}


@needs_operators
@pytest.mark.parametrize("name", UNSUITED)
def test_unsuited_tensors_go_to_the_reference_or_are_refused(name: str) -> None:
    compute, received = UNSUITED[name]
    with Watch() as watch:
        compute(torch.randn(3, 8))
    assert watch.seen == []
    with dispatch.use_backend("cpu"), pytest.raises(InputError) as caught:
        compute(torch.randn(3, 8))
    assert caught.value.received == received
    assert "'cpu' only computes plain CPU tensors" in caught.value.invariant


@needs_operators
def test_forward_differentiation_gets_the_reference() -> None:
    assert dispatch.has_operators(torch.ones(1))
    with forward_ad.dual_level():
        assert not dispatch.has_operators(torch.ones(1))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch's own, on its first tangent
@pytest.mark.parametrize("norm", [functional.rms_norm, functional.layer_norm])
def test_tangents_are_those_of_reverse_mode(norm) -> None:
    x, tangent = torch.randn(3, 8, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)
    y, dy = torch.func.jvp(norm, (x,), (tangent,))
    expected = torch.autograd.functional.jacobian(norm, x).flatten(2).flatten(0, 1) @ tangent.flatten()
    torch.testing.assert_close(y, norm(x))
    torch.testing.assert_close(dy.flatten(), expected)


class Wrapped(torch.Tensor):
    """A subclass of whatever behaviour."""


def test_a_subclass_as_gain_or_residual_gets_the_reference() -> None:
    x, gain = torch.randn(2, 8), torch.randn(8)
    assert dispatch.has_operators(x, gain, None)
    assert not dispatch.has_operators(x, gain.as_subclass(Wrapped))
    with dispatch.use_backend("reference"):
        expected = functional.rms_norm(x, gain)
    assert torch.equal(functional.rms_norm(x, gain.as_subclass(Wrapped)), expected)


def test_the_sum_needs_a_gradient_only_if_its_parts_do() -> None:
    x, gain = torch.randn(2, 8), torch.randn(8, requires_grad=True)
    y, total = functional.add_rms_norm(x, x, gain)
    assert (y.requires_grad, total.requires_grad) == (True, False)
    y, total = functional.add_layer_norm(x, x.clone().requires_grad_(), gain)
    assert (y.requires_grad, total.requires_grad) == (True, True)


def test_an_unknown_back_end_is_refused_with_the_choices() -> None:
    with pytest.raises(ConfigError, match="torch, triton, cpu, reference, got 'gpu'"), dispatch.use_backend("gpu"):
        pass


def test_a_back_end_that_is_missing_is_refused_with_the_reason(monkeypatch) -> None:
    monkeypatch.setattr(cpu, "_reason", "no compiler was there")
    monkeypatch.setattr(dispatch, "CPU_RUNS", False)
    assert not {backend.name: backend for backend in dispatch.backends()}["cpu"].available
    with pytest.raises(ConfigError) as caught, dispatch.use_backend("cpu"):
        pass
    assert "'cpu' is not available on this machine (no compiler was there)" in caught.value.invariant
    assert "reference" in caught.value.remedy
    assert "cpu" not in caught.value.remedy


@pytest.mark.skipif(gpu.INTERPRETED, reason="the interpreter computes them")
def test_triton_is_refused_without_a_gpu_and_cpu_tensors_with_one(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    reason = "'triton' is not available on this machine (PyTorch sees no GPU)"
    with pytest.raises(ConfigError, match=re.escape(reason)), dispatch.use_backend("triton"):
        pass
    monkeypatch.setattr(gpu, "device", lambda: "some GPU")
    with dispatch.use_backend("triton"), pytest.raises(InputError) as caught:
        functional.rms_norm(torch.ones(2, 4))
    assert "'triton' only computes plain tensors on a GPU" in caught.value.invariant
    assert caught.value.received == "Tensor on cpu"


@pytest.mark.parametrize(
    ("versions", "reason"),
    [
        ({}, "Triton is not installed"),
        ({"triton": "3.2.0"}, "Triton 3.2.0 is too old, version 3.3 or later is needed"),
        ({"triton": "3.10.1+git1"}, ""),
        ({"pytorch-triton-rocm": "3.4.0"}, ""),
    ],
)
def test_a_missing_or_old_triton_is_named(monkeypatch, versions: dict[str, str], reason: str) -> None:
    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError
        return versions[name]

    monkeypatch.setattr(gpu.importlib.metadata, "version", version)
    assert gpu._unavailable.__wrapped__() == reason


def test_the_choice_is_restored_after_an_error_and_blocks_nest() -> None:
    def refused_inside() -> None:
        with dispatch.use_backend("reference"):
            with pytest.raises(ConfigError), dispatch.use_backend("gpu"):
                pass
            assert dispatch._forced == "reference"
            raise ZeroDivisionError

    before = dispatch._forced
    with pytest.raises(ZeroDivisionError):
        refused_inside()
    assert dispatch._forced == before


@needs_operators
def test_blocks_of_two_threads_may_end_in_any_order() -> None:
    entered, left = threading.Event(), threading.Event()
    seen = []

    def other() -> None:
        with omninorm.use_backend("cpu"):
            entered.set()
            left.wait(10)
            seen.append(dispatch._forced)

    thread = threading.Thread(target=other)
    with omninorm.use_backend("reference"):
        thread.start()
        entered.wait(10)
    left.set()
    thread.join()
    assert seen == ["cpu"]
    assert dispatch._forced is None


@needs_operators
def test_the_choice_holds_in_all_threads() -> None:
    """Backward runs on threads of autograd's own."""
    seen: list[bool] = []
    with dispatch.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(dispatch.has_operators(torch.ones(1))))
        thread.start()
        thread.join()
    assert seen == [False]
    assert dispatch.has_operators(torch.ones(1))


# Bad input -------------------------------------------------------------------------------------------------------

X = torch.ones(2, 4)
BAD_CALLS: dict[str, Callable[[], Any]] = {
    "integers": lambda: functional.rms_norm(X.int()),
    "complex numbers": lambda: functional.layer_norm(X.to(torch.complex64)),
    "sparse rows": lambda: functional.rms_norm(X.to_sparse()),
    "a sparse gain": lambda: functional.layer_norm(X, torch.ones(4).to_sparse()),
    "a gain on another device": lambda: functional.rms_norm(X, torch.ones(4, device="meta")),
    "a bias on another device": lambda: functional.layer_norm(X, None, torch.ones(4, device="meta")),
    "rows on another device": lambda: functional.rms_norm(X.to("meta"), torch.ones(4)),
    "a residual on another device": lambda: functional.add_rms_norm(X, X.to("meta")),
    "a residual of another dtype": lambda: functional.add_rms_norm(X, X.half()),
    "a residual that would broadcast": lambda: functional.add_layer_norm(X, X[:1]),
    "a residual of equal size": lambda: functional.add_layer_norm(X, X.view(4, 2)),
    "a narrow gain": lambda: functional.add_rms_norm(X, X, torch.ones(3)),
    "a wide bias": lambda: functional.add_layer_norm(X, X, None, torch.ones(5)),
    "an integer gain": lambda: functional.add_rms_norm(X, X, torch.ones(4).int()),
    "a scalar": lambda: functional.rms_norm(torch.tensor(1.0)),
    "width 0": lambda: functional.add_layer_norm(X[:, :0], X[:, :0]),
    "eps beyond float32": lambda: functional.layer_norm(X, eps=1e300),
    "an infinite offset": lambda: functional.rms_norm(X, gain_offset=float("inf")),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_input_raises_the_same_error_on_every_back_end(name: str) -> None:
    """The operators refuse these calls too; test_operators shows that they read nothing before."""
    texts = set()
    for backend in [backend.name for backend in dispatch.backends() if backend.available]:
        with dispatch.use_backend(backend), pytest.raises(InputError) as caught:
            BAD_CALLS[name]()
        texts.add(str(caught.value))
    assert len(texts) == 1
