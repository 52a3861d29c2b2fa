"""The host's cost of one eager norm call: Python frames and operators, which launching a kernel must not outweigh."""

import functools
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import omninorm

PAIRS = [(omninorm.RMSNorm, nn.RMSNorm), (omninorm.LayerNorm, nn.LayerNorm)]


def calls(call: Callable[[], object], *events: str) -> list[str]:
    """Return the names of the functions that a call enters: Python's for the event "call", C's for "c_call"."""
    entered: list[str] = []

    def note(frame: Any, event: str, argument: Any) -> None:
        if event in events:
            entered.append(frame.f_code.co_name if event == "call" else argument.__name__)

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


@pytest.mark.parametrize("needs_grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("layer", [omninorm.RMSNorm, omninorm.LayerNorm])
def test_call_enters_at_most_five_functions_before_pytorchs_operator(layer, needs_grad: bool) -> None:
    """As on a GPU, whose default is this back end."""
    norm, x = layer(64), torch.randn(1, 64)
    with omninorm.use_backend("torch"), torch.set_grad_enabled(needs_grad):
        entered = calls(lambda: norm.forward(x), "call")
    assert entered[:2] == ["<lambda>", "forward"]
    assert len(entered) - 1 <= 5, entered


@pytest.mark.parametrize("layer", [omninorm.RMSNorm, omninorm.LayerNorm])
def test_call_enters_at_most_five_functions_before_the_cpus_operator(layer) -> None:
    norm, x = layer(64), torch.randn(1, 64)
    with torch.no_grad():
        entered = calls(lambda: norm.forward(x), "call")
    assert len(entered) - 1 <= 5, entered


def test_layer_norm_calls_one_operator_per_direction() -> None:
    norm, x = omninorm.LayerNorm(64), torch.randn(1, 64)
    with omninorm.use_backend("torch"), Operators() as forward:
        y = norm(x)
    with Operators() as backward:
        torch.autograd.backward(y, torch.ones_like(y.detach()))
    assert forward.seen == ["aten.native_layer_norm.default"]
    assert [name for name in backward.seen if "norm" in name] == ["aten.native_layer_norm_backward.default"]


@pytest.mark.parametrize("needs_grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=["RMSNorm", "LayerNorm"])
def test_call_makes_at_most_five_calls_more_than_torch_nns(ours, theirs, needs_grad: bool) -> None:
    """With PyTorch's operators, so that both end in the same one. Functions written in C are counted too."""
    norms, x = [ours(64), theirs(64)], torch.randn(1, 64)
    with omninorm.use_backend("torch"), torch.set_grad_enabled(needs_grad):
        mine, other = (calls(functools.partial(norm, x), "call", "c_call") for norm in norms)
    assert len(mine) <= len(other) + 5, (mine, other)
