"""The host's cost of one eager norm call: Python frames and operators, which launching a kernel must not outweigh."""

import sys
from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import omninorm

PAIRS = [(omninorm.RMSNorm, nn.RMSNorm), (omninorm.LayerNorm, nn.LayerNorm)]


def frames(call: Callable[[], object]) -> list[str]:
    """Return the names of the Python functions that a call enters."""
    entered: list[str] = []

    def note(frame: Any, event: str, argument: Any) -> None:
        if event == "call":
            entered.append(frame.f_code.co_name)

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return entered


class Operators(TorchDispatchMode):
    """Records the operators that are called inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def microseconds(norms: list[Callable[[Tensor], object]], x: Tensor, turns: int = 60, calls: int = 200) -> list[float]:
    """Return the median time of each norm's call; the norms take turns."""
    times: list[list[float]] = [[] for _ in norms]
    for _ in range(turns):
        for norm, found in zip(norms, times, strict=True):
            start = perf_counter()
            for _ in range(calls):
                norm(x)
            found.append((perf_counter() - start) / calls * 1e6)
    return [median(each) for each in times]


@pytest.mark.parametrize("needs_grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("layer", [omninorm.RMSNorm, omninorm.LayerNorm])
def test_call_enters_at_most_five_functions_before_pytorchs_operator(layer, needs_grad: bool) -> None:
    """As on a GPU, whose default is this back end."""
    norm, x = layer(64), torch.randn(1, 64)
    with omninorm.use_backend("torch"), torch.set_grad_enabled(needs_grad):
        entered = frames(lambda: norm.forward(x))
    assert entered[:2] == ["<lambda>", "forward"]
    assert len(entered) - 1 <= 5, entered


@pytest.mark.parametrize("layer", [omninorm.RMSNorm, omninorm.LayerNorm])
def test_call_enters_at_most_five_functions_before_the_cpus_operator(layer) -> None:
    norm, x = layer(64), torch.randn(1, 64)
    with torch.no_grad():
        entered = frames(lambda: norm.forward(x))
    assert len(entered) - 1 <= 5, entered


def test_layer_norm_calls_one_operator_per_direction() -> None:
    norm, x = omninorm.LayerNorm(64), torch.randn(1, 64)
    with omninorm.use_backend("torch"), Operators() as forward:
        y = norm(x)
    with Operators() as backward:
        torch.autograd.backward(y, torch.ones_like(y.detach()))
    assert forward.seen == ["aten.native_layer_norm.default"]
    assert [name for name in backward.seen if "norm" in name] == ["aten.native_layer_norm_backward.default"]


@pytest.mark.slow
@pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=["RMSNorm", "LayerNorm"])
def test_call_takes_at_most_1_3_times_as_long_as_torch_nns(ours, theirs) -> None:
    """One row of 64 on the CPU with PyTorch's operators: what differs is Python. Repeated, as other processes disturb."""
    x, norms = torch.randn(1, 64), [ours(64), theirs(64)]
    ratios = []
    with omninorm.use_backend("torch"):
        for _ in range(5):
            mine, other = microseconds(norms, x)
            ratios.append(mine / other)
            if ratios[-1] <= 1.3:
                return
    pytest.fail(f"ratios {ratios}")
