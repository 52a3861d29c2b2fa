"""first_difference: planted differences are named, equal models name nothing, and neither model is changed."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import transformers as hf
from helpers.converted import random_model
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP, LlamaModel

from omninorm.errors import InputError
from omninorm.surgery import FirstDifference, first_difference
from omninorm.thinker import Thinker, ThinkerConfig

IDS = torch.arange(24).view(2, 12)
Plant = Callable[[Any], object]


@pytest.fixture(scope="module")
def llama() -> Any:
    return random_model("llama")


@pytest.fixture(scope="module")
def thinker(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Thinker:
    """The same weights, in another implementation."""
    folder = tmp_path_factory.mktemp("llama")
    llama.save_pretrained(folder)
    return Thinker.from_pretrained(folder)


def planted(model: Any, plant: Plant) -> Any:
    other = copy.deepcopy(model)
    with torch.no_grad():
        plant(other)
    return other


def names(found: FirstDifference) -> list[str]:
    return [each.a for each in found.culprits]


# Changes of one place ---------------------------------------------------------------------------------------------


class WithoutResidual(LlamaDecoderLayer):
    """Adds no residual around attention."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        h, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        y: Tensor = h + self.mlp(self.post_attention_layernorm(h))
        return y


class WithoutMask(LlamaModel):
    """Lets every token attend to every other."""

    def forward(self, input_ids: Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
        batch, length = input_ids.shape
        mask = torch.zeros(batch, 1, length, length, dtype=self.embed_tokens.weight.dtype)
        return super().forward(input_ids, attention_mask=mask, **kwargs)


class WithoutGate(LlamaMLP):
    """Misses the product with the other branch."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)))
        return y


def swap_rows(model: Any) -> None:
    weight = model.model.layers[1].self_attn.q_proj.weight
    weight[:2] = weight[:2].flip(0)


def change_rope(model: Any) -> None:
    model.model.rotary_emb.inv_freq *= torch.linspace(1.0, 0.9, len(model.model.rotary_emb.inv_freq))


def set_class(name: str, kind: type) -> Plant:
    return lambda model: setattr(model.get_submodule(name), "__class__", kind)


def set_attribute(name: str, attribute: str, value: Any) -> Plant:
    return lambda model: setattr(model.get_submodule(name), attribute, value)


LAYER = "model.layers.1"
PLANTED: dict[str, tuple[Plant, str, str]] = {
    "one weight": (
        lambda model: model.model.layers[1].mlp.down_proj.weight[3, 5].add_(0.01),
        f"{LAYER}.mlp.down_proj",
        "weight differs by",
    ),
    "eps of one norm": (
        set_attribute(f"{LAYER}.input_layernorm", "variance_epsilon", 1e-5),
        f"{LAYER}.input_layernorm",
        "variance_epsilon is 1e-06 in a and 1e-05 in b",
    ),
    "gains one higher": (
        lambda model: model.model.norm.weight.add_(1.0),
        "model.norm",
        "weight is 1 higher everywhere in b",
    ),
    "swapped rows of q": (swap_rows, f"{LAYER}.self_attn.q_proj", "weight differs by"),
    "RoPE": (change_rope, "model.rotary_emb", "inv_freq differs by"),
    "scale of the logits": (
        set_attribute(f"{LAYER}.self_attn", "scaling", 1.0),
        f"{LAYER}.self_attn",
        "scaling is 0.25 in a and 1.0 in b",
    ),
    "activation": (
        set_attribute(f"{LAYER}.mlp", "act_fn", nn.GELU()),
        f"{LAYER}.mlp.act_fn",
        "its class is SiLUActivation in a and GELU in b",
    ),
    "residual": (
        set_class(LAYER, WithoutResidual),
        LAYER,
        f"the first module that receives another input is {LAYER}.post_attention_layernorm (hidden_states)",
    ),
    "gate": (
        set_class(f"{LAYER}.mlp", WithoutGate),
        f"{LAYER}.mlp",
        f"the first module that receives another input is {LAYER}.mlp.down_proj (input)",
    ),
    "mask": (
        set_class("model", WithoutMask),
        "model",
        "the first module that receives another input is model.layers.0 (attention_mask, which is None in a)",
    ),
}


@pytest.mark.parametrize(("plant", "place", "reason"), PLANTED.values(), ids=PLANTED)
def test_a_planted_difference_is_named_with_its_reason(llama: Any, plant: Plant, place: str, reason: str) -> None:
    found = first_difference(llama, planted(llama, plant), [IDS])
    assert found.kind == "different"
    assert names(found) == [place]
    assert any(each.startswith(reason) for each in found.culprits[0].reasons), found.culprits[0].reasons
    assert found.verdict.startswith(f"They first part in {place}: same inputs, outputs differ by ")


THROUGH_NAMES = {
    "one weight": "blocks.1.feed_forward.down",
    "eps of one norm": "blocks.1.around_attention.norm",
    "swapped rows of q": "blocks.1.attention.q",
    "RoPE": "blocks.0.attention",
    "scale of the logits": "blocks.1.attention",
    "residual": "blocks.1",
    "gate": "blocks.1.feed_forward",
}


@pytest.mark.parametrize("name", THROUGH_NAMES)
def test_a_planted_difference_is_named_between_implementations(llama: Any, thinker: Thinker, name: str) -> None:
    found = first_difference(planted(llama, PLANTED[name][0]), thinker, [IDS])
    assert found.first is not None
    assert found.first.b == THROUGH_NAMES[name]
    assert found.first.size > 1e-5


@pytest.mark.parametrize("name", THROUGH_NAMES)
def test_the_second_model_may_be_the_original(llama: Any, thinker: Thinker, name: str) -> None:
    found = first_difference(thinker, planted(llama, PLANTED[name][0]), [IDS])
    assert found.first is not None
    assert found.first.a == THROUGH_NAMES[name]


def test_the_sentence_counts_what_agrees_before(llama: Any) -> None:
    found = first_difference(llama, planted(llama, PLANTED["eps of one norm"][0]), [IDS])
    assert found.first is not None
    # the embedding, the rotary tables, and 13 modules of the first block, that block included
    assert found.verdict == (
        f"They first part in {LAYER}.input_layernorm: same inputs, outputs differ by "
        f"{100 * found.first.outputs:.2g} % (norm); before it 15 modules agree exactly."
    )


def test_the_measured_difference_is_that_of_the_module_alone(llama: Any) -> None:
    def halve(model: Any) -> None:
        model.model.layers[0].mlp.up_proj.weight *= 0.5

    found = first_difference(llama, planted(llama, halve), [IDS])
    assert found.first is not None
    assert found.first.fed == pytest.approx(0.5, rel=1e-12)
    assert (found.first.inputs, found.first.outputs) == (0.0, found.first.fed)


def test_every_place_is_named_however_much_parted_before(llama: Any) -> None:
    def several(model: Any) -> None:
        model.model.embed_tokens.weight.mul_(1.5)
        model.model.layers[1].mlp.act_fn = nn.GELU()
        model.lm_head.weight[0].add_(1.0)

    found = first_difference(llama, planted(llama, several), [IDS])
    assert names(found) == ["model.embed_tokens", "model.layers.1.mlp.act_fn", "lm_head"]
    assert "2 more modules differ as well: model.layers.1.mlp.act_fn, lm_head." in found.details


def test_exact_gelu_and_its_approximation_differ_slightly() -> None:
    config = hf.GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    model = hf.GPT2LMHeadModel(config)

    def exact(other: Any) -> None:
        other.transformer.h[1].mlp.act = nn.GELU()

    found = first_difference(model, planted(model, exact), [IDS])
    assert names(found) == ["transformer.h.1.mlp.act"]
    assert 1e-6 < found.culprits[0].size < 1e-3


# Equal models -----------------------------------------------------------------------------------------------------


class Wrapper(nn.Module):
    """Returns the logits alone."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, tokens: Tensor) -> Tensor:
        y = self.inner(tokens)
        return y if isinstance(y, Tensor) else y.logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("wrapped", [(False, False), (False, True), (True, False), (True, True)])
def test_equal_models_name_nothing_with_or_without_a_wrapper(llama: Any, wrapped: tuple[bool, bool]) -> None:
    a, b = (Wrapper(copy.deepcopy(llama)) if each else llama for each in wrapped)
    found = first_difference(a, b, [IDS])
    assert (found.kind, found.culprits, found.largest) == ("equal", (), 0.0)
    expected = 46 if all(wrapped) else 45
    assert found.verdict == f"No difference in {expected} matched modules."


def test_the_same_weights_in_another_implementation_differ_by_rounding_only(llama: Any, thinker: Thinker) -> None:
    found = first_difference(llama, thinker, [IDS])
    assert (found.kind, found.culprits) == ("rounding", ())
    assert 0.0 < found.largest < 1e-7  # its tables of RoPE are in float32
    pairs = {each.a: each.b for each in found.modules}
    assert pairs["model.layers.2.self_attn.o_proj"] == "blocks.2.attention.out"
    assert pairs["model.layers.2.self_attn"] == "blocks.2.attention"
    assert pairs["model.layers.2.mlp"] == "blocks.2.feed_forward"
    assert pairs["model.layers.2"] == "blocks.2"
    assert pairs["model.norm"] == "final_norm.norm"
    assert pairs[""] == ""
    assert "model" not in pairs, "a model without its head has no counterpart in Thinker"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, None])
def test_a_dtype_of_16_bits_is_rounding_and_names_nothing(llama: Any, dtype: torch.dtype | None) -> None:
    found = first_difference(llama, copy.deepcopy(llama).bfloat16(), [IDS], dtype=dtype)
    assert (found.kind, found.culprits) == ("rounding", ())
    assert found.rounded_weights == ("bfloat16",)
    assert 1e-3 < found.largest < 0.05
    assert "rounded to bfloat16" in " ".join(found.details)


@pytest.mark.parametrize("dtype", [torch.float64, None])
def test_a_difference_next_to_rounding_is_still_named(llama: Any, dtype: torch.dtype | None) -> None:
    other = planted(llama, lambda model: model.model.layers[1].mlp.down_proj.weight.mul_(1.1)).bfloat16()
    found = first_difference(llama, other, [IDS], dtype=dtype)
    assert names(found) == [f"{LAYER}.mlp.down_proj"]
    assert found.culprits[0].fed == pytest.approx(0.1, abs=0.01)
    assert "fed the same input, outputs differ by 10 % (norm)" in found.verdict


def test_weights_that_were_rounded_and_stored_in_float32_count_as_rounded(llama: Any) -> None:
    found = first_difference(llama, copy.deepcopy(llama).half().float(), [IDS])
    assert (found.kind, found.rounded_weights) == ("rounding", ("float16",))


def test_a_factor_that_moved_into_a_weight_is_no_difference(llama: Any) -> None:
    def move(model: Any) -> None:
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(layer.self_attn.scaling)
            layer.self_attn.scaling = 1.0

    found = first_difference(llama, planted(llama, move), [IDS])
    assert (found.kind, found.culprits) == ("equal", ())
    assert [each.a for each in found.modules if each.compensated] == [
        f"model.layers.{block}.self_attn.q_proj" for block in range(3)
    ]
    assert "Rearranged" in found.details[0]


class Fused(nn.Module):
    """A gated feed-forward layer with one matrix for gate and up."""

    def __init__(self, split: Any) -> None:
        super().__init__()
        both = torch.cat((split.gate_proj.weight, split.up_proj.weight))
        self.gate_up_proj, self.down_proj = nn.Linear(both.shape[1], len(both), bias=False), split.down_proj
        self.gate_up_proj.weight = nn.Parameter(both.clone())

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(nn.functional.silu(gate) * up)  # type: ignore[no-any-return]


def test_fused_matrices_are_part_of_the_module_around_them(llama: Any) -> None:
    def fuse(model: Any) -> None:
        for layer in model.model.layers:
            layer.mlp = Fused(layer.mlp)

    fused = planted(llama, fuse)
    found = first_difference(llama, fused, [IDS])
    assert (found.kind, len(found.only_a), len(found.only_b)) == ("equal", 9, 3)
    faulty = planted(fused, lambda model: model.model.layers[1].mlp.gate_up_proj.weight[3].mul_(2.0))
    for pair in ((llama, faulty), (faulty, llama)):
        assert names(first_difference(*pair, [IDS])) == ["model.layers.1.mlp"]


def test_a_model_is_compared_with_its_own_backbone(llama: Any) -> None:
    for pair in ((llama, llama.model), (llama.model, llama)):
        found = first_difference(*pair, [IDS])
        assert (found.kind, len(found.modules)) == ("equal", 43)


def test_a_missing_block_is_named(llama: Any) -> None:
    def drop(model: Any) -> None:
        model.model.layers = model.model.layers[:2]

    shorter = planted(llama, drop)
    for a, b, only in ((llama, shorter, "only_a"), (shorter, llama, "only_b")):
        found = first_difference(a, b, [IDS])
        assert names(found) == ["model"]
        assert getattr(found, only) == ("model.layers.2",)
        assert "the first module that receives another input is model.norm (hidden_states)" in found.culprits[0].reasons


# Padding, non-finite values, experts ------------------------------------------------------------------------------


class Masked(nn.Module):
    """Its outputs at padded positions are whatever `fill` is."""

    def __init__(self, fill: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.line, self.fill = nn.Embedding(12, 4), nn.Linear(4, 4), Fill(fill)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.line(self.fill(self.table(input_ids), attention_mask))  # type: ignore[no-any-return]


class Fill(nn.Module):
    def __init__(self, fill: float) -> None:
        super().__init__()
        self._fill = fill

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask.bool().unsqueeze(-1), x, self._fill)


@pytest.mark.parametrize("fill", [7.0, math.nan, math.inf])
def test_padded_positions_are_not_compared(fill: float) -> None:
    ids = torch.arange(8).view(2, 4)
    padded = {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1]])}
    found = first_difference(Masked(0.0), Masked(fill), [padded])
    assert (found.kind, found.largest) == ("equal", 0.0)
    whole = {"input_ids": ids, "attention_mask": torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 1.0, 1.0, 1.0]])}
    assert names(first_difference(Masked(0.0), Masked(fill), [whole])) == ["fill"], "only integers mark padding"


@pytest.mark.parametrize(("which", "said"), [("b", "b returns"), ("a", "a returns"), ("both", "both return")])
def test_nan_is_a_difference_even_in_both(llama: Any, which: str, said: str) -> None:
    bad = planted(llama, lambda model: model.model.layers[1].post_attention_layernorm.weight[0].fill_(math.nan))
    pair = {"b": (llama, bad), "a": (bad, llama), "both": (bad, bad)}[which]
    found = first_difference(*pair, [IDS])
    assert names(found) == [f"{LAYER}.post_attention_layernorm"]
    assert found.culprits[0].nonfinite == which
    assert f"same inputs, {said} NaN or infinite values" in found.verdict


def test_a_single_expert_is_found_in_a_mixture() -> None:
    model = random_model("mixtral")
    found = first_difference(model, copy.deepcopy(model), [IDS])
    assert found.kind == "equal"
    other = planted(model, lambda each: each.model.layers[1].mlp.experts.down_proj[1].mul_(1.5))
    assert names(first_difference(model, other, [IDS])) == ["model.layers.1.mlp.experts"]


# Other inputs, outputs and classes --------------------------------------------------------------------------------


class Pair(nn.Module):
    """Takes keywords, returns nested outputs, and changes its input in place."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.scale, self.first, self.second = InPlace(), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor, *, bonus: Tensor | None = None) -> Any:
        h = self.scale(self.first(x))
        h = h if bonus is None else h + bonus
        return {"a": h, "rest": (self.second(h), [h.sum()])}


class InPlace(nn.Module):
    factor = 2.0

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(self.factor)


def test_keywords_nested_outputs_and_modules_that_work_in_place() -> None:
    probe = {"x": torch.randn(5, 4), "bonus": torch.ones(5, 4)}
    assert first_difference(Pair(), Pair(), [probe]).largest == 0.0
    other = Pair()
    other.scale.factor = 2.5
    found = first_difference(Pair(), other, [probe])
    assert (names(found), found.culprits[0].fed) == (["scale"], pytest.approx(0.25))
    assert found.culprits[0].reasons == ("factor is 2.0 in a and 2.5 in b",)


def test_the_first_input_that_differs_is_reported() -> None:
    class Branch(Pair):
        def forward(self, x: Tensor, *, bonus: Tensor | None = None) -> Any:
            return super().forward(x, bonus=None if bonus is None else 3 * bonus)

    probes = [{"x": torch.randn(5, 4)}, {"x": torch.randn(5, 4), "bonus": torch.ones(5, 4)}]
    found = first_difference(Pair(), Branch(), probes)
    assert (found.kind, found.inputs, names(found)) == ("different", "input 2 of 2", [""])
    assert "the first module that receives another input is second (input)" in found.culprits[0].reasons


class Caching(nn.Module):
    """Each layer appends to a cache that the model makes, as a decoder does by default."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.layers = nn.ModuleList(Remembering() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        cache = Cache()
        for layer in self.layers:
            x = layer(x, cache)
        return x


class Cache:
    def __init__(self) -> None:
        self.kept: list[Tensor] = []


class Remembering(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(4, 4)

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        cache.kept.append(x)
        return self.line(x) + torch.stack(cache.kept).sum(0)  # type: ignore[no-any-return]


def test_a_cache_that_modules_fill_is_not_filled_twice() -> None:
    model = Caching()
    found = first_difference(model, copy.deepcopy(model), [torch.randn(3, 4)])
    assert (found.kind, found.largest) == ("equal", 0.0)
    other = planted(model, lambda each: each.layers[1].line.bias.add_(0.5))
    assert names(first_difference(model, other, [torch.randn(3, 4)])) == ["layers.1.line"]


class Noisy(nn.Module):
    """Adds noise even in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(8)
        self.layers = nn.Sequential(nn.Linear(4, 4), Noise(), nn.Linear(4, 4), Noise())

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)  # type: ignore[no-any-return]


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


def test_both_models_draw_the_same_random_numbers() -> None:
    x = torch.randn(3, 4)
    found = first_difference(Noisy(), Noisy(), [x])
    assert (found.kind, found.largest, max(each.fed or 0.0 for each in found.modules)) == ("equal", 0.0, 0.0)
    other = planted(Noisy(), lambda each: each.layers[2].bias.add_(0.5))
    assert names(first_difference(Noisy(), other, [x])) == ["layers.2"]


def test_models_that_can_run_without_a_cache_do() -> None:
    class Asked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line, self.asked = nn.Linear(4, 4), []

        def forward(self, x: Tensor, use_cache: bool | None = None) -> Tensor:
            self.asked.append(use_cache)
            return self.line(x)  # type: ignore[no-any-return]

    x = torch.randn(3, 4)
    for probe, expected in ((x, False), ({"x": x}, False), ({"x": x, "use_cache": True}, True)):
        model = Asked()
        first_difference(model, model, [probe], dtype=None)
        assert set(model.asked) == {expected}


class Renamed(nn.Module):
    """A Thinker's feed-forward network under names that no rule knows, with a fused product and no modules inside."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.alpha, self.beta, self.gamma = nn.Linear(width, 12), nn.LayerNorm(12), nn.Linear(12, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.gamma(nn.functional.silu(self.beta(self.alpha(x))))
        return y


def renamed_as_sequence(offset: float = 0.0) -> nn.Module:
    one = Renamed()
    with torch.no_grad():
        one.beta.weight.add_(offset)
    return nn.Sequential(nn.Identity(), one.alpha, nn.Dropout(0.5), one.beta, nn.SiLU(), one.gamma)


def test_modules_are_matched_by_order_and_shape_when_no_name_fits() -> None:
    inputs = [torch.randn(6, 8)]
    found = first_difference(Renamed(), renamed_as_sequence(), inputs)
    assert found.kind == "equal"
    assert [(each.a, each.b) for each in found.modules] == [("", ""), ("alpha", "1"), ("beta", "3"), ("gamma", "5")]
    found = first_difference(Renamed(), renamed_as_sequence(1.0), inputs)
    assert [(each.a, each.b) for each in found.culprits] == [("beta", "3")]
    assert found.only_b == ("4",), "modules that do nothing in evaluation are not listed"


def test_a_module_that_is_called_twice_is_compared_call_by_call() -> None:
    class Twice(nn.Module):
        def __init__(self, between: float) -> None:
            super().__init__()
            torch.manual_seed(4)
            self.line, self.between = nn.Linear(4, 4), Times(between)

        def forward(self, x: Tensor) -> Tensor:
            return self.line(self.between(self.line(x)))  # type: ignore[no-any-return]

    found = first_difference(Twice(1.0), Twice(2.0), [torch.randn(3, 4)])
    assert names(found) == ["between"]
    assert [(each.a, each.call) for each in found.modules] == [("", 1), ("line", 1), ("between", 1), ("line", 2)]
    assert [each.outputs > 0 for each in found.modules] == [True, False, True, True]


class Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


class Settling(nn.Module):
    """Replaces a module by another one while it runs for the first time, as BigBird does for short inputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.first, self.line, self.settled = nn.Linear(4, 4), nn.Linear(4, 4), False

    def forward(self, x: Tensor) -> Tensor:
        if not self.settled:
            self.first, self.settled = nn.Sequential(self.first, nn.Tanh()), True
        return self.line(self.line(self.first(x)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", [torch.float64, None])
def test_modules_that_are_replaced_in_the_first_run_are_not_mixed_up(dtype: torch.dtype | None) -> None:
    model = Settling()
    found = first_difference(model, copy.deepcopy(model), [torch.randn(3, 4)], dtype=dtype)
    assert (found.kind, [each.a for each in found.modules if each.compensated]) == ("equal", [])
    other = planted(Settling(), lambda each: each.line.bias.add_(0.5))
    assert names(first_difference(Settling(), other, [torch.randn(3, 4)])) == ["line", "line"]


def test_a_function_as_argument_cannot_be_fed_and_the_inputs_decide() -> None:
    """Thinker's placements call attention through a function, which belongs to the other model."""
    config = ThinkerConfig(d_model=32, n_layers=2, n_heads=2)
    torch.manual_seed(5)
    model = Thinker(config)
    found = first_difference(model, copy.deepcopy(model), [IDS])
    placed = next(each for each in found.modules if each.a == "blocks.0.around_attention")
    assert (found.kind, placed.fed, placed.not_fed) == (
        "equal", None, "one of its arguments is a function of the other model",
    )  # fmt: skip
    other = planted(model, lambda each: each.blocks[1].feed_forward.down.weight.mul_(2.0))
    assert names(first_difference(model, other, [IDS])) == ["blocks.1.feed_forward.down"]


# The models themselves --------------------------------------------------------------------------------------------


def state(model: nn.Module) -> dict[str, Any]:
    return {
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "dtypes": [each.dtype for each in model.parameters()],
        "modes": [each.training for each in model.modules()],
        "hooks": [(len(each._forward_hooks), len(each._forward_pre_hooks)) for each in model.modules()],
    }


def same(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    equal = all(torch.equal(value, after["values"][name]) for name, value in before["values"].items())
    return equal and all(before[name] == after[name] for name in ("dtypes", "modes", "hooks"))


class Failing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("no")


@pytest.mark.parametrize("dtype", [torch.float64, None])
@pytest.mark.parametrize("fails", [False, True])
def test_models_modes_and_hooks_are_as_before_even_after_an_error(dtype: torch.dtype | None, fails: bool) -> None:
    a = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4)).train()
    b = nn.Sequential(copy.deepcopy(a[0]), nn.Dropout(0.9), Failing() if fails else copy.deepcopy(a[2]))
    a[1].eval()
    before = state(a), state(b)
    x = torch.randn(6, 4)
    if fails:
        with pytest.raises(InputError, match="failed on the inputs"):
            first_difference(a, b, [x], dtype=dtype)
    else:
        found = first_difference(a, b, [x], dtype=dtype)
        assert found.largest < 1e-6, "nothing is dropped"
    assert all(same(*pair) for pair in zip(before, (state(a), state(b)), strict=True))


def test_the_generator_of_random_numbers_is_as_before(llama: Any) -> None:
    before = torch.get_rng_state()
    first_difference(llama, llama)
    assert torch.equal(before, torch.get_rng_state())


def test_random_tokens_follow_the_seed_and_stay_in_both_vocabularies() -> None:
    def model(vocabulary: int) -> nn.Module:
        torch.manual_seed(6)
        table, line = nn.Embedding(100, 4), nn.Linear(4, 2)
        return nn.Sequential(nn.Embedding.from_pretrained(table.weight[:vocabulary]), line)

    assert first_difference(model(100), model(7)).kind == "equal"
    assert first_difference(model(7), model(100), seed=1).inputs == "random tokens from seed 1"


def test_fewer_stored_rows_find_the_same_module(llama: Any) -> None:
    other = planted(llama, PLANTED["swapped rows of q"][0])
    assert names(first_difference(llama, other, [IDS], rows=3)) == names(first_difference(llama, other, [IDS]))


def test_the_slightest_change_of_a_setting_is_named_between_equal_classes(llama: Any) -> None:
    other = planted(llama, set_attribute("model.norm", "variance_epsilon", 1.0001e-6))
    found = first_difference(llama, other, [IDS])
    assert names(found) == ["model.norm"]
    assert 1e-10 < found.culprits[0].size < 1e-6
    assert found.allowance == "up to 1e-10 for one module, 1e-06 if the classes differ"


def test_a_change_whose_effect_fades_is_named(llama: Any) -> None:
    """One weight of one token's vector, which most of the outputs do not depend on."""

    def nudge(model: Any) -> None:
        model.model.embed_tokens.weight[5, 7] += 1e-6

    found = first_difference(llama, planted(llama, nudge), [IDS])
    assert names(found) == ["model.embed_tokens"]


def test_the_limit_decides_what_counts_as_rounding(llama: Any, thinker: Thinker) -> None:
    assert first_difference(llama, thinker, [IDS]).kind == "rounding"
    found = first_difference(llama, thinker, [IDS], limit=1e-12)
    assert names(found)[0] == "model.layers.0.self_attn"
    other = planted(llama, PLANTED["one weight"][0])
    assert first_difference(llama, other, [IDS], limit=0.5).kind == "rounding"
    rounded = copy.deepcopy(llama).bfloat16()
    assert first_difference(llama, rounded, [IDS], limit=0.1).kind == "rounding"
    assert names(first_difference(llama, rounded, [IDS], limit=1e-4))[0] == "model.embed_tokens"


def test_the_record_is_plain_json(llama: Any) -> None:
    bad = planted(llama, lambda model: model.model.norm.weight[0].fill_(math.nan))
    record = json.loads(json.dumps(first_difference(llama, bad, [IDS]).to_record(), allow_nan=False))
    assert (record["kind"], record["culprits"][0]["label"]) == ("different", "model.norm")
    assert record["culprits"][0]["fed"] == "inf"
    assert len(record["modules"]) == 45


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"a": "text"}, "model must be a torch.nn.Module, got a str"),
        ({"inputs": []}, "inputs must be a list with at least one input"),
        ({"inputs": torch.zeros(2)}, "inputs must be a list with at least one input, got a Tensor"),
        ({"inputs": ["text"]}, "Each of inputs must be a tensor or a dictionary, got a str"),
        ({"dtype": torch.int64}, "dtype must be a floating-point dtype of torch, got torch.int64"),
        ({"limit": 0.0}, "limit must be a positive number, got 0.0"),
        ({"limit": math.nan}, "limit must be a positive number, got nan"),
        ({"rows": 0}, "rows must be at least 1, got 0"),
        ({"inputs": None}, "has no embedding, so its inputs cannot be drawn"),
        ({"b": nn.Flatten(0)}, "No module of one model matches a module of the other"),
        ({"b": nn.Linear(5, 4)}, "Linear failed on the inputs in float64"),
    ],
)
def test_errors_say_what_to_pass(change: dict[str, Any], said: str) -> None:
    given: dict[str, Any] = {"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "inputs": [torch.randn(3, 4)], **change}
    with pytest.raises(InputError) as caught:
        first_difference(**given)
    assert said in str(caught.value)
