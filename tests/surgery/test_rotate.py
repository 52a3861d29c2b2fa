"""rotate is exact in float64 on real architectures, undone bit for bit, or refused with the reason."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import surgery_models as subjects
from helpers import zoo
from torch import Tensor, nn

from omninorm.errors import ConfigError, InputError
from omninorm.surgery import center, rotate, verify
from omninorm.surgery.orthogonal import rotation

WIDTH = subjects.WIDTH
# Models with RMSNorm before every sublayer → the weights of a block that are rotated.
LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ROUTED = (*LLAMA[:4], "gate", "gate_up_proj", "down_proj")
PRE_NORM = {
    "llama": LLAMA,
    "gemma": LLAMA,
    "qwen3": LLAMA,
    "qwen2": (*LLAMA, "v_proj.bias"),
    "mistral": LLAMA,
    "phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    "mixtral": ROUTED,
    "qwen3_moe": ROUTED,
    "thinker": ("q", "k", "v", "out", "gate", "up", "down"),
}
# More model types of docs/surgery.md, without those that are refused in part.
OTHERS = (
    "apertus", "aria_text", "bamba", "bitnet", "deepseek_v2", "deepseek_v3", "dots1", "falcon_h1", "glm4_moe", "gpt_oss",
    "granitemoehybrid", "jamba", "jetmoe", "lfm2_moe", "llama4_text", "minicpm3", "minimax_m2", "nemotron_h", "olmoe",
    "recurrent_gemma",
)  # fmt: skip
NO_ATTENTION = ("falcon_mamba", "mamba", "mamba2")
# Gains after the sublayers, between a writer and the stream.
POST_NORM = ("gemma2", "gemma3_text", "olmo2")


def build(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    return subjects.build(name, dtype) if name in subjects.MODELS else zoo.build(name, dtype)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def matrix(kind: str, width: int) -> Tensor:
    return rotation(kind, width)(torch.eye(width, dtype=torch.float64)).T


@pytest.mark.parametrize("kind", ["hadamard", "random"])
@pytest.mark.parametrize("name", PRE_NORM)
def test_stream_and_heads_are_rotated_exactly_and_undone_bit_for_bit(name: str, kind: str) -> None:
    model = build(name)
    before, weights = copy.deepcopy(model), state(model)
    report = rotate(model, kind=kind)
    assert report.refused == {}
    assert report.error <= 1e-12
    assert verify(before, model).relative <= 1e-12
    rotated = [each for each, what in report.changed.items() if what.startswith("rotated")]
    assert len(rotated) == 2 + 2 * len(PRE_NORM[name]), rotated  # two blocks, the embedding and the head
    assert str(report).startswith(f"5 norms folded, {len(rotated)} weights rotated, maximum relative difference")
    after = state(model)
    for each in rotated:
        key = each if each in after else f"{each}.weight"
        assert key not in weights or not torch.allclose(weights[key], after[key]), key  # the Thinker's head was tied
    report.undo()
    assert same(weights, state(model))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*OTHERS, *NO_ATTENTION, "qwen3_next"])
def test_other_model_types_are_rotated_exactly(name: str) -> None:
    model = zoo.build(name)
    before = copy.deepcopy(model)
    report = rotate(model)
    expected = {"qwen3_next": "values of heads (model.layers.1.self_attn.v_proj.weight)"}
    expected |= dict.fromkeys(NO_ATTENTION, "values of heads")
    assert list(report.refused) == ([expected[name]] if name in expected else [])
    assert any("residual stream" in what for what in report.changed.values())
    assert report.proof.coverage == 1
    assert verify(before, model).relative <= 1e-12


@pytest.mark.parametrize("kind", ["hadamard", "random"])
def test_weights_are_multiplied_by_the_orthogonal_matrices(kind: str) -> None:
    """The equations of the docstring, with grouped queries: four query heads share the rotations of two values."""
    model = build("llama")
    before = copy.deepcopy(model).state_dict()
    rotate(model, kind=kind)
    after = model.state_dict()
    q, heads = matrix(kind, WIDTH), torch.block_diag(*[matrix(kind, 8)] * 4)
    layer = "model.layers.1"
    gain = before[f"{layer}.input_layernorm.weight"]
    fed = before[f"{layer}.post_attention_layernorm.weight"]
    expected = {
        "model.embed_tokens": before["model.embed_tokens.weight"] @ q.T,
        "lm_head": before["lm_head.weight"] * before["model.norm.weight"] @ q.T,
        f"{layer}.self_attn.q_proj": before[f"{layer}.self_attn.q_proj.weight"] * gain @ q.T,
        f"{layer}.self_attn.v_proj": heads[:16, :16] @ before[f"{layer}.self_attn.v_proj.weight"] * gain @ q.T,
        f"{layer}.self_attn.o_proj": q @ before[f"{layer}.self_attn.o_proj.weight"] @ heads.T,
        f"{layer}.mlp.up_proj": before[f"{layer}.mlp.up_proj.weight"] * fed @ q.T,
        f"{layer}.mlp.down_proj": q @ before[f"{layer}.mlp.down_proj.weight"],
    }
    for name, value in expected.items():
        assert torch.allclose(after[f"{name}.weight"], value, atol=1e-14), name


@pytest.mark.parametrize(("which", "rotated"), [("head", 4), (["residual"], 16), (("residual", "head"), 16)])
def test_only_the_chosen_spaces_are_rotated(which: Any, rotated: int) -> None:
    model = build("llama")
    before = copy.deepcopy(model)
    report = rotate(model, which=which)
    weights = [what for what in report.changed.values() if what.startswith("rotated")]
    assert len(weights) == rotated
    assert any("heads" in what for what in weights) == ("head" in which)
    assert any("stream" in what for what in weights) == ("residual" in which)
    assert verify(before, model).relative <= 1e-12


@pytest.mark.parametrize("name", POST_NORM)
def test_stream_after_gains_that_cannot_be_folded_is_refused_and_heads_are_rotated(name: str) -> None:
    model = build(name)
    before, weights = copy.deepcopy(model), state(model)
    refused = rotate(model, which="residual")
    assert not refused.changed
    assert same(weights, state(model))
    report = rotate(model)
    assert [each.split(" (")[0] for each in report.refused] == ["residual stream"]
    (why,) = report.refused.values()
    assert "gain of model.layers.0.post_attention_layernorm differs between features and cannot be folded" in why
    assert all("heads" in what for what in report.changed.values())
    assert len(report.changed) == 4
    assert verify(before, model).relative <= 1e-12


@pytest.mark.parametrize("name", POST_NORM)
def test_stream_after_even_gains_is_rotated(name: str) -> None:
    """A gain that is the same for all features commutes with a rotation."""
    model = build(name)
    for each, parameter in model.named_parameters():
        if "post_" in each:
            nn.init.constant_(parameter, 0.7)
    before = copy.deepcopy(model)
    report = rotate(model)
    assert report.refused == {}
    assert verify(before, model).relative <= 1e-12


@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt_neox", "phi", "vit", "thinker layernorm"])
def test_layer_norm_is_refused_until_it_is_centered(name: str) -> None:
    """Among their writers are position tables, biases, a convolution and a class token."""
    model, probes = subjects.build(name), subjects.inputs(name)
    before, weights = copy.deepcopy(model), state(model)
    refused = rotate(model, probes, which="residual")
    assert not refused.changed
    assert "is a LayerNorm, which subtracts the mean: call center first" in refused.table()
    assert same(weights, state(model))
    center(model, probes)
    report = rotate(model, probes)
    assert report.refused == {}
    assert verify(before, model, probes).relative <= 1e-12


def test_norms_of_queries_and_keys_in_a_fused_projection_do_not_concern_its_values() -> None:
    """Persimmon normalizes queries and keys by LayerNorm, which lie in one matrix with the values."""
    model = zoo.build("persimmon")
    before = copy.deepcopy(model)
    report = rotate(model, which="head")
    assert report.refused == {}
    assert len(report.changed) == 6  # with the biases
    assert verify(before, model).relative <= 1e-12


@pytest.mark.parametrize("name", ["bert", "whisper encoder"])
def test_post_norm_and_activated_streams_are_refused_and_unchanged(name: str) -> None:
    model, probes = subjects.build(name), subjects.inputs(name)
    weights = state(model)
    assert not rotate(model, probes, which="residual").changed
    assert same(weights, state(model))


def test_stream_that_is_an_output_is_refused() -> None:
    model = build("llama").model
    report = rotate(model)
    assert report.refused == {"residual stream (embed_tokens.weight)": "the output last_hidden_state would be rotated"}
    assert all("heads" in what for what in report.changed.values())


def test_head_stays_tied_if_no_gain_is_folded() -> None:
    model = zoo.build("llama", tie_word_embeddings=True)
    before = copy.deepcopy(model)
    report = rotate(model)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is False
    report.undo()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is True
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.ones_(parameter)
    before = copy.deepcopy(model)
    assert rotate(model).refused == {}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert verify(before, model).relative <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_rounded_once(dtype: torch.dtype) -> None:
    """Folded and rotated in float64, then rounded to the model's dtype."""
    model = build("llama", dtype)
    exact = copy.deepcopy(model).double()
    rotate(model)
    rotate(exact)
    for name, value in model.state_dict().items():
        assert value.dtype == dtype
        assert torch.equal(value, exact.state_dict()[name].to(dtype)), name


def test_outlier_features_are_spread() -> None:
    model = build("llama", torch.float32)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 5] *= 100

    def peak() -> float:
        x = model.model.embed_tokens(subjects.TOKENS.clamp_min(1)).detach()  # the row of token 0, padding, is 0
        return float((x.abs().amax(-1) / x.square().mean(-1).sqrt()).mean())

    plain = peak()
    rotate(model)
    assert plain > 5  # of at most √32
    assert peak() < 1.5


# Refusals ----------------------------------------------------------------------------------------------------------


class Small(nn.Module):
    """An embedding, two branches and a head; `change` alters the stream before the last norm."""

    def __init__(self, change: Callable[[Any, Tensor], Tensor], width: int = 8) -> None:
        super().__init__()
        self.table = nn.Embedding(10, width)
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))
        self.inner, self.outer = nn.Linear(width, 5), nn.Linear(5, width)
        self.head = nn.Linear(width, 10)
        self.register_buffer("shift", torch.randn(width))
        self.change = change

    def forward(self, tokens: Tensor) -> Any:
        x = self.table(tokens)
        x = x + self.outer(self.inner(self.norms[0](x)).tanh())
        return self.head(self.norms[1](self.change(self, x)))


def filled(model: Any, x: Tensor) -> Tensor:
    """Zeros are neutral, unless something has written to them."""
    buffer = torch.zeros_like(x)
    buffer[..., :2].fill_(1.0)
    return x + buffer


def through_a_view(model: Any, x: Tensor) -> Tensor:
    y = x * 2
    y.view(-1)[3] = 1.0
    return y


REFUSED: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "activation": (lambda model, x: x.relu(), "aten.relu.default in the model does not commute with a rotation"),
    "vector": (lambda model, x: x * model.shift, "aten.mul.Tensor in the model does not commute"),
    "buffer": (lambda model, x: x + model.shift, "aten.add.Tensor in the model adds something"),
    "number": (lambda model, x: x + 1.0, "aten.add.Tensor in the model adds something"),
    "order": (lambda model, x: x + x.flip(-1), "aten.add.Tensor in the model does not commute"),
    "clamp": (lambda model, x: x.clamp_(-1, 1), "aten.clamp_.default in the model does not commute"),
    "filled zeros": (filled, "aten.add.Tensor in the model adds something"),
    "view": (through_a_view, "does not commute with a rotation"),
    "other features": (
        lambda model, x: x * model.inner(x.flip(-1)).mean(-1, keepdim=True),
        "inner takes different features of it at different times",
    ),
    "used weight": (lambda model, x: x * model.outer.weight.sum(), "also used by aten.sum.default in the model"),
    "other vectors": (
        lambda model, x: x + model.outer(model.head(x)[..., :5]) * model.head(model.shift.expand_as(x)).mean(),
        "head is also used by",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_stream_that_does_not_commute_with_a_rotation_is_refused_with_the_operation(what: str) -> None:
    change, why = REFUSED[what]
    model = Small(change).double()
    weights = state(model)
    report = rotate(model, which="residual")
    assert not report.changed
    assert why in report.refused["residual stream (table.weight)"]
    assert same(weights, state(model))
    report.undo()


ALLOWED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "plain": lambda model, x: x,
    "number": lambda model, x: -2.5 * x / 3,
    "factor per token": lambda model, x: x * (1 + torch.arange(x.shape[1])[:, None]),
    "sums of tokens": lambda model, x: x + x.mean(1, keepdim=True) + x.sum(1, keepdim=True),
    "in place": lambda model, x: x.clone().add_(x).mul_(0.5),
    "experts": lambda model, x: torch.zeros_like(x).index_add_(1, torch.arange(2), x[:, :2]) + x,
    "chosen tokens": lambda model, x: x[:, torch.arange(x.shape[1] - 1, -1, -1)],
    "dropout": lambda model, x: nn.functional.dropout(x, 0.5, model.training),
}


@pytest.mark.parametrize("what", ALLOWED)
def test_operations_that_commute_with_a_rotation_are_followed(what: str) -> None:
    model = Small(ALLOWED[what]).double()
    before = copy.deepcopy(model)
    report = rotate(model, which="residual")
    assert report.refused == {}
    assert len(report.changed) == 5  # and outer's bias
    assert verify(before, model).relative <= 1e-12


def test_reading_some_features_only_splits_the_stream() -> None:
    """The norm's features are still rotated, in two parts, so that a reader of one part can be corrected."""

    class Halves(Small):
        def forward(self, tokens: Tensor) -> Tensor:
            x = self.table(tokens)
            x = x + self.outer(self.inner(self.norms[0](x)).tanh())
            return self.head(x[..., :4])

    model = Halves(lambda model, x: x).double()
    model.norms, model.head = nn.ModuleList([nn.RMSNorm(8)]), nn.Linear(4, 10).double()
    model.double()
    before = copy.deepcopy(model)
    report = rotate(model, which="residual")
    assert report.refused == {}
    assert verify(before, model).relative <= 1e-12
    half = matrix("hadamard", 4)
    assert torch.allclose(model.head.weight, before.head.weight @ half.T)
    assert torch.allclose(model.table.weight, before.table.weight @ torch.block_diag(half, half).T)


def test_width_without_a_hadamard_matrix_is_refused_and_rotated_at_random() -> None:
    model = Small(ALLOWED["plain"], width=6).double()
    weights = state(model)
    report = rotate(model, which="residual")
    assert "No Hadamard matrix of width 6 is built" in report.refused["residual stream (table.weight)"]
    assert same(weights, state(model))
    before = copy.deepcopy(model)
    assert rotate(model, which="residual", kind="random").refused == {}
    assert verify(before, model).relative <= 1e-12


def test_unreached_parameter_that_could_read_the_stream_is_refused() -> None:
    model = Small(ALLOWED["plain"]).double()
    model.unused = nn.Linear(8, 3).double()
    assert "no run reached unused" in rotate(model).table()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kind": "givens"}, "hadamard, random"),
        ({"which": "mlp"}, "residual"),
        ({"which": ()}, "residual"),
    ],
)
def test_unknown_choices_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        rotate(build("llama"), **options)


def test_quantized_weights_are_refused() -> None:
    model = build("llama")
    model.register_parameter("packed", nn.Parameter(torch.zeros(4, dtype=torch.int8), requires_grad=False))
    with pytest.raises(InputError, match="int8"):
        rotate(model)


def test_undo_after_training_is_refused() -> None:
    model = build("llama")
    report = rotate(model)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] += 1e-6
    trained = state(model)
    with pytest.raises(InputError, match=r"1 of .* changed"):
        report.undo()
    assert same(trained, state(model))


def test_original_modules_are_not_called() -> None:
    model = build("llama")
    called = []
    own = list(model.modules())
    for module in own:
        module.register_forward_hook(lambda module, args, output: called.append(module))
    assert rotate(model).changed
    assert not [module for module in called if any(module is each for each in own)]
