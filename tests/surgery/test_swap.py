"""swap_norms keeps parameters, keys and hooks, is as accurate as the stock norms, and can be undone."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from helpers import surgery_models as subjects
from torch import nn

import omninorm
from omninorm.errors import InputError
from omninorm.surgery import center, fold_gains, identify, swap_norms, swapped, verify


@pytest.mark.parametrize("name", subjects.MODELS)
def test_every_norm_is_swapped_without_other_changes(name: str) -> None:
    model = subjects.build(name, torch.float32)
    before = copy.deepcopy(model)
    keys = {key: value.data_ptr() for key, value in model.state_dict().items()}
    report = swap_norms(model)
    if not name.startswith("thinker"):
        assert report.changed
    assert report.refused == {}
    assert {key: value.data_ptr() for key, value in model.state_dict().items()} == keys
    kinds = (omninorm.RMSNorm, omninorm.LayerNorm)
    assert all(isinstance(model.get_submodule(each), kinds) for each in report.changed)
    assert verify(before, model, subjects.inputs(name)).exact
    report.undo()
    assert [type(module) for module in model.modules()] == [type(module) for module in before.modules()]


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_bfloat16_outputs_are_within_one_unit_and_logits_as_accurate_as_stock(name: str) -> None:
    check_in_bfloat16(subjects.build(name, torch.bfloat16), batches=6)


@pytest.mark.exhaustive  # the slow tests have Qwen3 at its real width
def test_real_weights_in_bfloat16_are_as_accurate_as_with_stock_norms(smollm2: Path) -> None:
    stock = hf.AutoModelForCausalLM.from_pretrained(
        str(smollm2.parent),
        gguf_file=smollm2.name,
        dtype=torch.bfloat16,
        quantization_config=hf.GgufConfig(dequantize=True),
    )
    assert check_in_bfloat16(stock) == 61


@pytest.mark.slow
def test_qwen3_at_its_real_width_is_as_accurate_as_with_stock_norms() -> None:
    config = hf.Qwen3Config(
        hidden_size=1024, head_dim=128, num_attention_heads=16, num_key_value_heads=8, intermediate_size=3072,
        num_hidden_layers=6, vocab_size=4096,
    )  # fmt: skip
    stock = hf.Qwen3ForCausalLM(config).bfloat16().eval()
    subjects.draw_vectors(stock)
    assert check_in_bfloat16(stock) == 6 * 4 + 1


def check_in_bfloat16(stock: nn.Module, batches: int = 2) -> int:
    """How many norms were swapped. Logits are compared by the root mean square of their distance to float64's."""
    ours, truth = copy.deepcopy(stock), copy.deepcopy(stock).double()
    swap_norms(truth)  # stock norms compute in float32 even then
    report = swap_norms(ours)
    for each in report.changed:
        norm, own = stock.get_submodule(each), ours.get_submodule(each)
        x = (torch.randn(64, norm.weight.numel(), generator=torch.Generator().manual_seed(1)) * 3).bfloat16()
        with torch.no_grad():
            theirs, here = norm(x), own(x)
        # A unit of the row's largest output, as the numerics contract counts. Of its own an output may be two off in
        # Llama's order: where x̂ is rounded the other way, at most one in a thousand.
        unit = 2.0 ** (theirs.abs().amax(-1, keepdim=True).double().log2().floor() - 7)
        assert ((theirs.double() - here.double()).abs() <= unit).all()
        steps = (theirs.view(torch.int16).int() - here.view(torch.int16).int()).abs()
        assert int(steps.max()) <= 2
        assert float((steps > 0).float().mean()) <= 1e-3
    squares = dict.fromkeys(("stock", "ours"), 0.0)
    with torch.no_grad():
        for tokens in _batches(batches, stock.config.vocab_size):
            expected = truth(tokens).logits
            for label, model in (("stock", stock), ("ours", ours)):
                squares[label] += float((model(tokens).logits.double() - expected).square().sum())
    assert 0 < squares["ours"] <= 1.05**2 * squares["stock"]
    return len(report.changed)


def _batches(count: int, vocabulary: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, vocabulary, (4, 24), generator=generator) for _ in range(count)]


def test_optimizer_keeps_training_swapped_gains() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    report = swap_norms(model)
    model(torch.randn(4, 8)).square().sum().backward()
    optimizer.step()
    moved = model[1].weight.detach().clone()
    assert not torch.equal(moved, torch.ones(8))
    report.undo()
    assert type(model[1]) is nn.LayerNorm
    assert torch.equal(model[1].weight, moved)


def test_hooks_ties_and_shared_modules_are_kept() -> None:
    norm = nn.LayerNorm(8)
    other = nn.LayerNorm(8)
    other.weight = norm.weight
    model = nn.ModuleDict({"a": norm, "b": norm, "c": other})
    seen = []
    norm.register_forward_hook(lambda module, args, output: seen.append(type(module)))
    norm.note = "kept"
    report = swap_norms(model)
    assert set(report.changed) == {"a", "b", "c"}
    assert model["a"] is model["b"]
    assert model["a"].weight is model["c"].weight is norm.weight
    assert model["a"].note == "kept"
    model["a"](torch.randn(2, 8))
    assert seen == [omninorm.LayerNorm]


def test_swapped_restores_norms_after_an_error() -> None:
    model = nn.Sequential(nn.LayerNorm(8))
    seen = []

    def fail() -> None:
        with swapped(model) as report:
            seen.extend([type(model[0]), report.changed])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert seen[0] is omninorm.LayerNorm
    assert seen[1]
    assert type(model[0]) is nn.LayerNorm


class RMSNormWithScale(nn.Module):
    """In many codebases the gain is called scale."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * self.scale


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (RMSNormWithScale(), "its parameters are named 'scale'"),
        (nn.BatchNorm1d(8), "cannot be called"),
        (nn.GroupNorm(2, 8), "cannot be called"),
        (nn.LayerNorm((2, 4)), "not vectors of one size"),
    ],
)
def test_unsupported_norm_is_refused_with_a_reason(module: nn.Module, why: str) -> None:
    model = nn.Sequential(module, nn.Linear(8, 8))
    report = swap_norms(model)
    assert report.changed == {}
    assert why in report.refused["0"]
    assert model[0] is module


def test_unsupported_order_of_rounding_is_refused_in_bfloat16_only() -> None:
    class BF16Norm(nn.Module):
        """All in the input's dtype."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(8) + 0.5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * self.weight

    assert "rounds in an order" in swap_norms(nn.Sequential(BF16Norm()).bfloat16()).refused["0"]
    assert set(swap_norms(nn.Sequential(BF16Norm())).changed) == {"0"}


def test_forward_replaced_on_the_instance_is_refused() -> None:
    """accelerate's hooks replace it, and it is bound to the module that would go."""
    model = nn.Sequential(nn.LayerNorm(8))
    own = model[0].forward
    model[0].forward = lambda x: own(x)
    report = swap_norms(model)
    assert "forward was replaced" in report.refused["0"]
    assert not report.changed


@pytest.mark.parametrize(
    "function", [swap_norms, fold_gains, center, identify, lambda model: verify(nn.Linear(2, 2), model)]
)
@pytest.mark.parametrize(("model", "kind"), [([1], "a list"), (None, "a NoneType"), (nn.Linear, "a type")])
def test_what_is_not_a_module_is_refused(function: Callable[[Any], object], model: object, kind: str) -> None:
    with pytest.raises(InputError) as error:
        function(model)
    assert error.value.received == kind


def test_report_prints_a_summary_and_a_table_on_request() -> None:
    model = nn.Sequential(nn.Embedding(9, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.BatchNorm1d(8))
    model[1].weight.data.uniform_(0.5, 2)
    report = swap_norms(model)
    assert str(report) == "1 norm swapped, 1 refused"
    assert repr(report) == "<SwapReport: 1 norm swapped, 1 refused>"
    changed, refused = report.table().splitlines()
    assert changed.split()[:2] == ["changed", "1"]
    assert report.changed["1"] in changed
    assert refused.split()[:2] == ["refused", "3"]
    assert report.refused["3"] in refused
    assert str(swap_norms(nn.Sequential())) == "0 norms swapped, 0 refused"


def test_reports_of_fold_and_center_count_what_was_changed() -> None:
    model = nn.Sequential(nn.Embedding(9, 8), nn.LayerNorm(8), nn.Linear(8, 8))
    model[1].weight.data.uniform_(0.5, 2)
    folded, centered = fold_gains(copy.deepcopy(model)), center(model)
    difference = r"maximum relative difference \d(e-\d+|e\+00) in float64"
    assert re.fullmatch(rf"1 norm folded, {difference}, 0 refused", str(folded))
    assert folded.table() == "changed  1  into 2"
    assert re.fullmatch(rf"1 norm centered, 1 weight centered, {difference}, 0 refused", str(centered))
    assert [line.split()[1] for line in centered.table().splitlines()] == list(centered.changed)
