"""fold_gains and center are exact in float64 on real architectures, undone bit for bit, or refused with a reason."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from helpers import surgery_models as subjects
from torch import nn

import omninorm
from omninorm import NormConfig, Thinker, ThinkerConfig
from omninorm.errors import InputError
from omninorm.surgery import center, fold_gains, swap_norms, swapped, verify
from omninorm.surgery import fold as fold_module
from omninorm.surgery.report import fingerprint
from omninorm.surgery.verify import distance, outputs

PRE_NORM = [name for name in subjects.MODELS if name not in ("bert", "olmo2", "gemma2")]
WITH_LAYER_NORM = ["gpt2", "opt", "gpt_neox", "vit", "thinker layernorm", "phi"]
# Norms of queries and keys are followed by a rotation, not by a linear layer.
UNFOLDABLE = {"qwen3": "_norm", "whisper encoder": "layer_norm", "olmo2": "norm", "gemma2": "post_"}


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", PRE_NORM)
def test_gains_are_folded_exactly_and_undone_bit_for_bit(name: str) -> None:
    model, probes = subjects.build(name), subjects.inputs(name)
    before, weights = copy.deepcopy(model), state(model)
    report = fold_gains(model, probes)
    assert len(report.changed) >= 3  # Phi's blocks have one
    assert all(UNFOLDABLE.get(name, "?") in each for each in report.refused), report.refused
    proof = verify(before, model, probes)
    assert proof.exact
    assert 0 <= proof.relative <= 1e-10
    assert not same(weights, state(model))
    for each in report.changed:
        norm = model.get_submodule(each)
        offset = 1.0 if name == "gemma" else 0.0
        assert torch.all(norm.weight + offset == 1)
        assert getattr(norm, "bias", None) is None or not norm.bias.any()
    report.undo()
    assert same(weights, state(model))
    assert verify(before, model, probes).largest == 0


@pytest.mark.parametrize("name", WITH_LAYER_NORM)
def test_layer_norms_become_rms_norms_exactly_and_are_undone(name: str) -> None:
    model, probes = subjects.build(name), subjects.inputs(name)
    before, weights = copy.deepcopy(model), state(model)
    report = center(model, probes)
    became = [each for each, what in report.changed.items() if "RMSNorm" in what]
    kept = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    assert len(became) >= 3
    assert len(kept) == len(report.refused)
    assert all(isinstance(model.get_submodule(each), omninorm.RMSNorm) for each in became)
    assert all(model.get_submodule(each).eps == before.get_submodule(each).eps for each in became)
    assert verify(before, model, probes).relative <= 1e-10
    report.undo()
    assert same(weights, state(model))
    assert [type(module) for module in model.modules()] == [type(module) for module in before.modules()]


@pytest.mark.parametrize("name", WITH_LAYER_NORM)
def test_centered_float32_logits_stay_within_1e_4(name: str) -> None:
    model, probes = subjects.build(name, torch.float32), subjects.inputs(name)
    before = [outputs(model, probe) for probe in probes]
    center(model, probes)
    for probe, expected in zip(probes, before, strict=True):
        assert float((outputs(model, probe) - expected).abs().max()) <= 1e-4


def test_trained_thinker_is_centered_and_undone() -> None:
    """A LayerNorm Thinker after some steps on text, whose gains and biases have moved."""
    torch.manual_seed(0)
    model = Thinker(ThinkerConfig(d_model=32, n_layers=3, n_heads=2, norm=NormConfig("layernorm", "pre")))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    text = torch.tensor(
        [list(b"In the beginning God created the heaven and the earth. And the earth was without form")]
    )
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(text[:, :-1])[0], text[0, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(loss.detach()) < 3
    before = copy.deepcopy(model)
    report = center(model)
    assert report.refused == {}
    assert report.error <= 1e-10
    with torch.no_grad():
        assert float((model(text) - before(text)).abs().max()) <= 1e-4
    assert not any(isinstance(module, nn.LayerNorm) for module in model.modules())
    assert model.head is not None
    assert not model.config.tied_head
    report.undo()
    assert model.head is None
    assert model.config == before.config


def test_tied_head_is_untied_and_tied_again_by_undo() -> None:
    model = subjects.build("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    report = center(model)
    assert model.lm_head.weight is not model.transformer.wte.weight
    assert model.config.tie_word_embeddings is False
    report.undo()
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.config.tie_word_embeddings is True


@pytest.mark.parametrize("name", ["bert", "olmo2", "gemma2"])
def test_norms_on_or_after_the_stream_are_refused_and_the_rest_folded(name: str) -> None:
    """BERT's norms are on the stream itself; those of OLMo-2 and half of Gemma-2's follow a sublayer."""
    model = subjects.build(name)
    before, weights = copy.deepcopy(model), state(model)
    folded = fold_gains(model)
    assert folded.refused
    assert verify(before, model).exact
    folded.undo()
    centred = center(model)
    assert centred.changed == {}
    assert bool(centred.refused) == (name == "bert")
    assert same(weights, state(model))


def test_norm_whose_input_keeps_a_mean_is_refused() -> None:
    """Whisper's residual stream begins after a GELU, whose mean no weight can remove."""
    model, probes = subjects.build("whisper encoder"), subjects.inputs("whisper encoder")
    weights = state(model)
    report = center(model, probes)
    assert report.changed == {}
    assert "its input keeps a mean" in report.refused["layers.0.self_attn_layer_norm"]
    assert same(weights, state(model))


def test_norm_with_a_nonlinear_consumer_is_refused() -> None:
    """The linear layer is found by its storage; that the output is also added, only by comparing outputs."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.norm, self.out = nn.Embedding(10, 8), nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            normed = self.norm(self.table(tokens))
            return self.out(normed) + normed

    model = Both().double()
    nn.init.uniform_(model.norm.weight, 0.5, 2.0)
    weights = state(model)
    report = fold_gains(model)
    assert report.changed == {}
    assert "something besides linear layers" in report.refused["norm"]
    assert same(weights, state(model))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (4, 2)))).flatten(-2),
        lambda x: x.as_strided(x.shape, (x.stride(0), 0, 1)),
        lambda x: x.view(torch.int64).view(torch.float64),
    ],
    ids=["complex", "strides", "dtype"],
)
def test_norm_whose_output_is_viewed_otherwise_is_refused(view) -> None:
    class Viewed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.norm, self.out = nn.Embedding(10, 8), nn.RMSNorm(8), nn.Linear(8, 8)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.out(view(self.norm(self.table(tokens))))

    model = Viewed().double()
    nn.init.uniform_(model.norm.weight, 0.5, 2.0)
    weights = state(model)
    report = fold_gains(model)
    assert report.changed == {}
    assert "no linear layer consumes its output directly" in report.refused["norm"]
    assert same(weights, state(model))


def test_linear_layer_after_two_norms_is_refused() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.a, self.b, self.out = (
                nn.Embedding(10, 8),
                nn.LayerNorm(8),
                nn.LayerNorm(8),
                nn.Linear(8, 8),
            )

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            x = self.table(tokens)
            return self.out(self.a(x)) + self.out(self.b(x + 1))

    report = fold_gains(Shared())
    assert report.changed == {}
    assert all("another norm's" in why for why in report.refused.values())


@pytest.mark.parametrize("operation", [fold_gains, center])
def test_meta_and_quantized_weights_are_refused(operation) -> None:
    with pytest.raises(InputError, match="no values"):
        operation(nn.Sequential(nn.Embedding(4, 8), nn.LayerNorm(8)).to("meta"))
    quantized = nn.Sequential(nn.Embedding(4, 8), nn.LayerNorm(8))
    quantized.register_parameter("packed", nn.Parameter(torch.zeros(4, dtype=torch.int8), requires_grad=False))
    with pytest.raises(InputError, match="int8"):
        operation(quantized)


def test_missing_or_unsuitable_inputs_are_refused() -> None:
    with pytest.raises(InputError, match="ViTForImageClassification has no embedding"):
        fold_gains(subjects.build("vit"))
    with pytest.raises(InputError, match="LlamaForCausalLM failed"):
        fold_gains(subjects.build("llama"), [{"pixels": subjects.TOKENS}])


def test_verify_finds_a_difference_and_its_first_block() -> None:
    before = subjects.build("llama")
    after = copy.deepcopy(before)
    after.model.layers[1].mlp.down_proj.weight.data += 1e-6
    proof = verify(before, after)
    assert not proof.exact
    assert proof.relative > 1e-8
    assert proof.blocks["model.layers.0"] == 0
    assert proof.blocks["model.layers.1"] > 0
    assert verify(before, after, limit=1e-2).exact


@pytest.mark.parametrize("broken", [0, 1])
def test_nan_is_never_exact(broken: int) -> None:
    models = [nn.Linear(4, 4), nn.Linear(4, 4)]
    models[1].load_state_dict(models[0].state_dict())
    probes = [torch.randn(3, 4)]
    assert verify(*models, probes).exact
    models[broken].weight.data[2, 2] = math.nan
    proof = verify(*models, probes)
    assert not proof.exact
    assert proof.relative == math.inf
    models[1 - broken].weight.data[2, 2] = math.nan
    assert not verify(*models, probes).exact


def test_equal_infinities_are_equal() -> None:
    """As in logits of masked tokens."""
    a = torch.tensor([1.0, -math.inf, 3.0])
    assert distance(a, a.clone()) == 0
    assert distance(a, torch.tensor([1.0, -math.inf, 3.3])) == pytest.approx(0.1)
    assert distance(a, torch.tensor([1.0, 2.0, 3.0])) == math.inf


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ([], "an empty list"),
        (torch.ones(2, 4), "a Tensor"),
        ([["x"]], "got a list"),
        ([torch.ones(0, 4)], "an empty tensor"),
    ],
)
def test_inputs_without_anything_to_compare_are_refused(inputs: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        verify(nn.Linear(4, 4), nn.Linear(4, 4), inputs)


def test_outputs_of_different_shapes_are_refused() -> None:
    with pytest.raises(InputError, match=r"\(2, 4\) and \(2, 1\)"):
        verify(nn.Linear(4, 4), nn.Linear(4, 1), [torch.ones(2, 4)])


@pytest.mark.parametrize("operation", [fold_gains, center])
@pytest.mark.parametrize("inputs", [[{"wrong": torch.ones(1)}], [["x"]], []])
def test_refused_model_is_unchanged(operation: Any, inputs: Any) -> None:
    model = Thinker(ThinkerConfig(d_model=16, n_layers=1, n_heads=2, norm=NormConfig("layernorm")))
    before = {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
    with pytest.raises(InputError):
        operation(model, inputs)
    assert {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)} == before


def test_error_midway_restores_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Thinker(ThinkerConfig(d_model=16, n_layers=2, n_heads=2, norm=NormConfig("layernorm")))
    for block in model.blocks:
        block.around_attention.norm.weight.data.uniform_(0.5, 2)
        block.around_feed_forward.norm.weight.data.uniform_(0.5, 2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    real, folded = fold_module.fold, []

    def fail(target: nn.Module, name: str, *rest: Any) -> None:
        if target is model:
            folded.append(name)
            if len(folded) == 3:
                raise ZeroDivisionError
        real(target, name, *rest)

    monkeypatch.setattr(fold_module, "fold", fail)
    with pytest.raises(ZeroDivisionError):
        fold_gains(model)
    assert len(folded) == 3
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("operation", [fold_gains, center])
def test_original_modules_are_not_called(operation: Any) -> None:
    """They may lie on another device than the probes, and may have hooks."""
    model = nn.Sequential(nn.Embedding(9, 8), nn.LayerNorm(8), nn.Linear(8, 8))
    model[1].weight.data.uniform_(0.5, 2)
    called = []
    for module in model:
        module.register_forward_hook(lambda module, args, output: called.append(module))
    own = list(model)
    assert operation(model).changed
    assert not [module for module in called if any(module is each for each in own)]


# Undoing ---------------------------------------------------------------------------------------------------------


def gpt2() -> nn.Module:
    return subjects.build("gpt2")


@pytest.mark.parametrize(("first", "second"), [(fold_gains, center), (swap_norms, center)])
def test_operations_are_undone_in_reverse_order_only(first: Any, second: Any) -> None:
    model = gpt2()
    weights, kinds = state(model), [type(module) for module in model.modules()]
    one = first(model)
    middle, between = state(model), copy.deepcopy(model)
    two = second(model)
    with pytest.raises(InputError, match="Undo later operations first"):
        one.undo()
    two.undo()
    assert same(middle, state(model))
    assert verify(between, model).largest == 0
    one.undo()
    assert same(weights, state(model))
    assert [type(module) for module in model.modules()] == kinds


def test_undoing_an_earlier_operation_invalidates_a_later_one() -> None:
    model = gpt2()
    weights = state(model)
    centred, folded = center(model), fold_gains(model)
    assert folded.changed  # gains that are 1 already
    centred.undo()
    assert same(weights, state(model))
    with pytest.raises(InputError, match="Cannot undo"):
        folded.undo()
    assert same(weights, state(model))


@pytest.mark.parametrize("operation", [fold_gains, center])
def test_undo_after_training_is_refused(operation: Any) -> None:
    model = gpt2()
    report = operation(model)
    changed = report._kept.values()
    for parameter in changed:
        before = parameter.detach().clone()
        with torch.no_grad():
            parameter.view(-1)[-1] += 1e-6
        trained = state(model)
        with pytest.raises(InputError, match=f"1 of {len(report._intact)} tensors or modules changed"):
            report.undo()
        assert same(trained, state(model))
        parameter.data.copy_(before)


def test_fingerprint_depends_on_values_and_their_order() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        weight = torch.randn(5, 7, 3).to(dtype)
        same_bits = weight.transpose(0, 1).contiguous().transpose(0, 1)
        assert fingerprint(same_bits) == fingerprint(weight)
        others = [weight.flip(0), weight.flip(1), weight.flip(2), weight.roll(1), -weight, weight[:4], weight.flatten()]
        nudged = weight.clone()
        nudged[3, 2, 1] = torch.nextafter(nudged[3, 2, 1].float(), torch.tensor(9.0)).to(dtype) + nudged[3, 2, 1] / 64
        for other in (*others, nudged):
            assert fingerprint(other) != fingerprint(weight)
    assert fingerprint(torch.tensor(1.0)) != fingerprint(torch.tensor(2.0))
    assert fingerprint(torch.zeros(0, 4)) == fingerprint(torch.zeros(0, 4)) != fingerprint(torch.zeros(4, 0))


def test_undo_after_a_consumer_was_replaced_is_refused() -> None:
    model = gpt2()
    report = fold_gains(model)
    block = model.transformer.h[0]
    folded, block.attn.c_attn = block.attn.c_attn, copy.deepcopy(block.attn.c_attn)
    with pytest.raises(InputError, match="Cannot undo"):
        report.undo()
    block.attn.c_attn = folded
    report.undo()


def test_fold_inside_swapped_can_be_undone_afterwards() -> None:
    model = gpt2()
    weights = state(model)
    with swapped(model):
        report = fold_gains(model)
    report.undo()
    assert same(weights, state(model))


def test_error_inside_swapped_is_not_replaced_by_another() -> None:
    model = gpt2()

    def interrupted() -> None:
        with swapped(model):
            model.transformer.ln_f = nn.Identity()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert type(model.transformer.ln_f) is nn.Identity
    assert type(model.transformer.h[0].ln_1) is nn.LayerNorm


def test_undo_of_a_refused_operation_keeps_training() -> None:
    model = subjects.build("bert")
    report = center(model, subjects.inputs("bert"))
    assert not report.changed
    for parameter in model.parameters():
        parameter.data += 1.0
    trained = state(model)
    report.undo()
    assert same(trained, state(model))
