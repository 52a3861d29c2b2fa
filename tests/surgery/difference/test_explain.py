"""What differs between two modules: weights, settings, and norms whose settings have other names."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import omninorm
from omninorm.surgery.difference.explain import reasons, rounded_weights


def line(change: Callable[[Tensor], object] | None = None) -> nn.Linear:
    torch.manual_seed(0)
    made = nn.Linear(6, 4)
    if change is not None:
        with torch.no_grad():
            change(made.weight)
    return made


def test_equal_modules_have_no_differences() -> None:
    assert reasons(line(), line()) == []
    assert reasons(line(), line().double()) == []


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (line(lambda weight: weight.mul_(2.0)), "weight differs by 100 %"),
        (line(lambda weight: weight.add_(1.0)), "weight is 1 higher everywhere in b"),
        (line(lambda weight: weight.sub_(0.25)), "weight is 0.25 lower everywhere in b"),
        (line(lambda weight: weight[0, 0].fill_(torch.nan)), "weight holds NaN or infinite values"),
        (line().bfloat16().float(), "weight differs by 0.1"),
        (nn.Linear(6, 5), "weight is (4, 6) in a and (5, 6) in b"),
    ],
)
def test_weights_are_compared(other: nn.Module, expected: str) -> None:
    assert reasons(line(), other)[0].startswith(expected)


def test_rounding_explains_a_difference_only_if_one_is_the_other_rounded() -> None:
    assert reasons(line(), line().bfloat16().float())[0].endswith(", as rounding to bfloat16 explains")
    assert rounded_weights(line(), line().bfloat16()) == torch.bfloat16
    assert rounded_weights(line().half().double(), line().double()) == torch.float16
    assert rounded_weights(line(), line()) is None
    close = line(lambda weight: weight[0, 0].mul_(1 + 1e-6))
    assert torch.equal(close.weight.bfloat16(), line().weight.bfloat16())
    assert rounded_weights(line(), close) is None
    both = copy.deepcopy(line()).bfloat16().float()
    with torch.no_grad():
        both.bias.mul_(3.0)
    assert rounded_weights(line(), both) is None, "only one of its tensors is rounded"
    assert rounded_weights(line(), nn.Linear(6, 5)) is None


def test_a_parameter_that_only_one_has_is_reported() -> None:
    assert reasons(nn.Linear(4, 4, bias=False), nn.Linear(4, 4))[-1] == "only b has the parameter bias"


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (LlamaRMSNorm(8, eps=1e-5), omninorm.RMSNorm(8, eps=1e-6), "its epsilon is 1e-05 in a and 1e-06 in b"),
        (LlamaRMSNorm(8), GemmaRMSNorm(8), "it adds 0 to its gain in a and 1 in b"),
        (nn.LayerNorm(8), nn.RMSNorm(8, eps=1e-5), "its kind is layernorm in a and rmsnorm in b"),
    ],
)
def test_norms_of_other_classes_are_compared_by_probing(a: nn.Module, b: nn.Module, expected: str) -> None:
    assert expected in reasons(a.double(), b.double())


def test_norms_of_other_classes_that_agree_differ_in_their_class_alone() -> None:
    assert reasons(LlamaRMSNorm(8, eps=1e-5), omninorm.RMSNorm(8, eps=1e-5)) == [
        "its class is LlamaRMSNorm in a and RMSNorm in b"
    ]
