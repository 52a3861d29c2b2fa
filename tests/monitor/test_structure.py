"""Recognition of blocks, norms, attention, writers to the stream and parameter groups in many models."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.watched_models import HEADS, WIDTH, Decoder, FeedForward, adamw, signal, train_watched
from torch import Tensor, nn

from omninorm import NormConfig, Thinker, ThinkerConfig
from omninorm.layers import DynamicTanh, LayerNorm, RMSNorm
from omninorm.monitor.model_map.norms import Recognizer, read_norm
from omninorm.monitor.model_map.structure import find_structure, unwrap

SMALL = {"vocab_size": 23, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = torch.arange(12).reshape(2, 6)


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(intermediate_size=32, num_key_value_heads=2, **SMALL))


def qwen3() -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(intermediate_size=32, num_key_value_heads=2, head_dim=4, **SMALL))


def gemma2() -> Any:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(intermediate_size=32, num_key_value_heads=2, head_dim=4, **SMALL)
    return Gemma2ForCausalLM(config)


def mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(intermediate_size=32, num_key_value_heads=2, num_local_experts=3, **SMALL)
    return MixtralForCausalLM(config)


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=23, n_embd=16, n_layer=2, n_head=4, n_positions=16, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config)


def bert() -> Any:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig(intermediate_size=32, max_position_embeddings=16, **SMALL))


def vit() -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    shape = {key: SMALL[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    return ViTForImageClassification(ViTConfig(intermediate_size=32, image_size=8, patch_size=4, **shape))


def t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    shape = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(vocab_size=23, decoder_start_token_id=0, **shape))


def blocks_of(prefix: str, attention: str, feed_forward: str) -> dict[str, list[str]]:
    names = [f"{prefix}.{at}" for at in (0, 1)]
    return {
        "blocks": names,
        "attentions": [f"{name}.{attention}" for name in names],
        "feed_forwards": [f"{name}.{feed_forward}" for name in names],
    }


def joined(*parts: dict[str, list[str]]) -> dict[str, list[str]]:
    return {key: [name for part in parts for name in part[key]] for key in parts[0]}


def tokens_loss(model: nn.Module, step: int) -> Tensor:
    return model(input_ids=TOKENS, labels=TOKENS).loss  # type: ignore[no-any-return]


def image_loss(model: nn.Module, step: int) -> Tensor:
    return model(pixel_values=torch.ones(2, 3, 8, 8), labels=torch.tensor([0, 1])).loss  # type: ignore[no-any-return]


# Model, what must be found in it, the kind and number of its norms, its placement, its loss.
FOREIGN: dict[str, tuple[Any, dict[str, list[str]], str, int, str, Any]] = {
    "Llama": (llama, blocks_of("model.layers", "self_attn", "mlp"), "LlamaRMSNorm", 5, "pre", tokens_loss),
    "Qwen3": (qwen3, blocks_of("model.layers", "self_attn", "mlp"), "Qwen3RMSNorm", 9, "pre", tokens_loss),
    "Gemma 2": (gemma2, blocks_of("model.layers", "self_attn", "mlp"), "Gemma2RMSNorm", 9, "sandwich", tokens_loss),
    "Mixtral": (mixtral, blocks_of("model.layers", "self_attn", "mlp"), "MixtralRMSNorm", 5, "pre", tokens_loss),
    "GPT-2": (gpt2, blocks_of("transformer.h", "attn", "mlp"), "LayerNorm", 5, "pre", tokens_loss),
    "BERT": (bert, blocks_of("bert.encoder.layer", "attention", "output"), "LayerNorm", 6, "post", tokens_loss),
    "ViT": (vit, blocks_of("vit.layers", "attention", "mlp"), "LayerNorm", 5, "pre", image_loss),
    "T5": (
        t5,
        joined(
            blocks_of("encoder.block", "layer.0", "layer.1.DenseReluDense"),
            blocks_of("decoder.block", "layer.0", "layer.2.DenseReluDense"),
        ),
        "T5LayerNorm",
        12,
        "pre",
        tokens_loss,
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_transformers_models_are_recognized(name: str) -> None:
    build, wanted, kind, norms, placement, loss_of = FOREIGN[name]
    torch.manual_seed(0)
    watched = train_watched(model := build(), adamw(model), 2, loss_of)
    facts = watched.history.facts
    assert {key: list(getattr(facts, key)) for key in wanted} == wanted
    assert len(facts.norms) == norms
    assert {norm.kind for norm in facts.norms} == {kind}
    assert all(norm.eps is not None for norm in facts.norms)
    assert watched.history.placement == placement
    signals = watched.history.samples[-1].signals
    everywhere = ("stream_rms", "branch_ratio", "attention_ratio", "feed_forward_ratio", "angle", "stream_grad")
    for signal_name in (*everywhere, "attention_logit", "attention_entropy", "norm_rms", "eps_share"):
        assert all(v is not None and math.isfinite(v) for v in signals[signal_name]), signal_name
    for signal_name in ("logz", "grad_norm", "gain_max", "update_ratio", "adam_ratio"):
        assert signal_name in signals
    assert ("mean_share" in signals) == (kind == "LayerNorm")
    assert sum(p.numel() for group in find_structure(model).groups.values() for _, p in group) == facts.parameters
    assert all(1.0 <= v < 3.0 for v in signals["gain_max"])  # Gemma's is stored as γ − 1


@pytest.mark.parametrize(
    "placement",
    [
        "pre",
        "post",
        "sandwich",
        "reordered",
        "deepnorm",
        "lns",
        "mix",
        "hybrid",
        "residual",
        "keel",
        "normformer",
        "none",
    ],
)
def test_placements_of_a_thinker_are_measured(placement: str) -> None:
    kind = "none" if placement == "none" else "rmsnorm"
    config = ThinkerConfig(
        vocab_size=23, d_model=16, n_layers=4, n_heads=4, norm=NormConfig(normalization=kind, norm_placement=placement)
    )
    model = Thinker(config)

    def loss_of(model: nn.Module, step: int) -> Tensor:
        return F.cross_entropy(model(TOKENS).flatten(0, 1), TOKENS.flatten())

    watched = train_watched(model, adamw(model), 1, loss_of)
    facts = watched.history.facts
    assert facts.blocks == tuple(f"blocks.{at}" for at in range(4))
    assert facts.attentions == tuple(f"{block}.attention" for block in facts.blocks)
    assert facts.feed_forwards == tuple(f"{block}.feed_forward" for block in facts.blocks)
    alike = {"deepnorm": "post", "residual": "post", "keel": "both", "lns": "pre", "mix": "pre", "normformer": "pre"}
    assert watched.history.placement == {**alike, "hybrid": None}.get(placement, placement)
    assert bool(watched.history.placement_reason) == (placement == "hybrid")
    assert all(norm.ours for norm in facts.norms)
    assert all(v is not None for v in signal(watched, "feed_forward_ratio"))


def test_feed_forward_as_wide_as_the_stream_is_recognized() -> None:
    """Then the widths do not tell which layer writes to it."""
    for kind in ("swiglu", "gelu"):
        model = Thinker(ThinkerConfig(vocab_size=23, d_model=16, n_layers=2, n_heads=4, d_ff=16, feed_forward=kind))
        for block, module in zip(find_structure(model).blocks, model.blocks, strict=True):
            assert block.feed_forward_writer is module.feed_forward.down
            assert block.attention_writer is module.attention.out


class Mixer(nn.Module):
    """Attention under a name that does not say so: one matrix, or three with one key and value head for all queries."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.sizes = [16, 16, 16] if fused else [16, 4, 4]
        self.inward = nn.ModuleList(nn.Linear(16, size) for size in ([48] if fused else self.sizes))
        self.out = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        made = torch.cat([layer(x) for layer in self.inward], -1)
        q, k, v = (part.unflatten(-1, (-1, 4)).transpose(1, 2) for part in made.split(self.sizes, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2))


class MixerBlock(nn.Module):
    def __init__(self, mixer: nn.Module, hidden: int) -> None:
        super().__init__()
        self.one, self.two = nn.LayerNorm(16), nn.LayerNorm(16)
        self.mixer = mixer
        self.mlp = nn.Sequential(nn.Linear(16, hidden), nn.GELU(), nn.Linear(hidden, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.one(x))
        return x + self.mlp(self.two(x))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("hidden", [16, 48, 64])
def test_attention_is_recognized_without_its_name(fused: bool, hidden: int) -> None:
    blocks = nn.ModuleList(MixerBlock(Mixer(fused), hidden) for _ in range(2))
    model = nn.Sequential(nn.Embedding(23, 16), *blocks)
    for block, module in zip(find_structure(model).blocks, blocks, strict=True):
        assert block.attention_module is module.mixer
        assert block.attention_writer is module.mixer.out
        assert block.feed_forward_writer is module.mlp[2]


@pytest.mark.parametrize("hidden", [16, 48])
def test_feed_forward_alone_is_not_taken_for_attention(hidden: int) -> None:
    """Gated and plain, and another mixer of tokens than attention."""
    gated = Thinker(ThinkerConfig(vocab_size=23, d_model=16, n_heads=4, d_ff=hidden)).blocks[0].feed_forward
    model = nn.Sequential(nn.Embedding(23, 16), *(MixerBlock(copy.deepcopy(gated), hidden) for _ in range(2)))
    assert [block.attention for block in find_structure(model).blocks] == [None, None]
    square = nn.ModuleDict({"a": nn.Linear(16, 16), "b": nn.Linear(16, 16), "c": nn.Linear(16, 16)})
    halves = nn.ModuleDict({"a": nn.Linear(16, 32), "b": nn.Linear(16, 16)})
    for other in (square, halves):
        kind = type("Gated", (nn.Module,), {})
        blocks = [MixerBlock(kind(), hidden) for _ in range(2)]
        for block in blocks:
            for name, layer in other.items():
                setattr(block.mixer, name, copy.deepcopy(layer))
        model = nn.Sequential(nn.Embedding(23, 16), *blocks)
        assert [block.attention for block in find_structure(model).blocks] == [None, None]
    convolution = nn.Conv1d(16, 16, 3)
    model = nn.Sequential(nn.Embedding(23, 16), *(MixerBlock(copy.deepcopy(convolution), hidden) for _ in range(2)))
    assert [block.attention for block in find_structure(model).blocks] == [None, None]


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_torch_transformer_is_recognized(batch_first: bool, norm_first: bool) -> None:
    options: dict[str, Any] = {"dropout": 0.0, "batch_first": batch_first, "norm_first": norm_first}
    model = nn.Transformer(WIDTH, HEADS, 2, 3, 32, **options)
    source, target = torch.randn(2, 2, 5, WIDTH).unbind()
    watched = train_watched(model, adamw(model), 1, lambda m, s: m(source, target).square().mean())
    facts = watched.history.facts
    assert facts.blocks == tuple(
        f"{stack}.layers.{at}" for stack, count in (("encoder", 2), ("decoder", 3)) for at in range(count)
    )
    assert facts.attentions == tuple(f"{block}.self_attn" for block in facts.blocks)
    assert facts.feed_forwards == tuple(f"{block}.linear2" for block in facts.blocks)
    assert watched.history.placement == ("pre" if norm_first else "post")
    for name in (
        "stream_rms",
        "branch_ratio",
        "attention_ratio",
        "feed_forward_ratio",
        "attention_logit",
        "dead_units",
    ):
        assert all(v is not None for v in signal(watched, name)), name


class LoRALinear(nn.Module):
    """Someone's adapter around a frozen layer."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner.requires_grad_(False)
        self.a, self.b = nn.Linear(inner.in_features, 2, bias=False), nn.Linear(2, inner.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x) + self.b(self.a(x))
        return y


class PeftLinear(nn.Module):
    """As peft names the parts."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.base_layer = inner.requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(inner.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, inner.out_features, bias=False)})

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))
        return y


@pytest.mark.parametrize("adapter", [LoRALinear, PeftLinear])
def test_adapted_layers_are_recognized(adapter: type[nn.Module]) -> None:
    """The adapted layer writes to the stream, not its low-rank part."""
    model = Decoder()
    for block in model.blocks:
        block.attention.out = adapter(block.attention.out)
        block.feed_forward.down = adapter(block.feed_forward.down)
    for block, module in zip(find_structure(model).blocks, model.blocks, strict=True):
        assert block.attention_writer is module.attention.out
        assert block.feed_forward_writer is module.feed_forward.down
        assert (block.attention, block.feed_forward) == (f"{block.name}.attention", f"{block.name}.feed_forward")
    watched = train_watched(model, adamw(model), 1)
    assert all(v is not None for v in signal(watched, "dead_units"))


class Experts(nn.Module):
    """A mixture of feed-forwards, each token to one."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 3)
        self.experts = nn.ModuleList(FeedForward() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        p = self.router(x).softmax(-1)
        y = torch.zeros_like(x)
        for at, expert in enumerate(self.experts[:2]):  # the last one is never chosen
            y = y + p[..., at : at + 1] * expert(x)
        return y


def test_mixtures_of_experts_are_recognized() -> None:
    """The mixture as a whole writes to the stream."""
    model = Decoder()
    for block in model.blocks:
        block.feed_forward = Experts()
    for block, module in zip(find_structure(model).blocks, model.blocks, strict=True):
        assert block.feed_forward_writer is module.feed_forward
        assert block.feed_forward == f"{block.name}.feed_forward"
    watched = train_watched(model, adamw(model), 1)
    assert all(v is not None for v in signal(watched, "feed_forward_ratio"))


def test_single_block_is_recognized() -> None:
    watched = train_watched(model := Decoder(blocks=1), adamw(model), 1)
    assert watched.history.facts.blocks == ("blocks.0",)
    assert len(watched.history.samples[0].signals["stream_rms"]) == 1


def test_list_of_one_shared_block_is_recognized() -> None:
    model = Decoder()
    model.blocks = nn.ModuleList([model.blocks[0]] * 6)
    assert [block.name for block in find_structure(model).blocks] == ["blocks.0"]


def test_containers_that_are_no_stack_have_no_blocks() -> None:
    mlp = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    assert find_structure(mlp).blocks == []
    assert find_structure(nn.Sequential(mlp, nn.Linear(4, 4))).blocks == []
    assert find_structure(nn.ModuleList([nn.Embedding(3, 4)])).blocks == []


def test_wrappers_are_removed() -> None:
    model = Decoder()
    assert unwrap(nn.DataParallel(model)) is model
    assert unwrap(torch.compile(model, backend="eager")) is model
    assert unwrap(torch.compile(nn.DataParallel(model), backend="eager")) is model
    assert unwrap(model) is model


# Norms ----------------------------------------------------------------------------------------------------------------


class NamedGain(nn.Module):
    """RMSNorm whose gain is called g, without an attribute for ε."""

    def __init__(self) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.full((WIDTH,), 3.0))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) * WIDTH**0.5 * self.g


class SomeRMSNorm(NamedGain):
    pass


class SomeLayerNorm(nn.Module):
    """LayerNorm, by its own formula, with an ε that is an integer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(WIDTH + 1)), nn.Parameter(torch.rand(WIDTH + 1))
        self.eps = 1

    def forward(self, x: Tensor) -> Tensor:
        deviation = x - x.mean(-1, keepdim=True)
        return deviation / (deviation.square().mean(-1, keepdim=True) + self.eps).sqrt() * self.weight + self.bias


class CountingNorm(SomeLayerNorm):
    """Which remembers what it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


def test_facts_about_norms_are_read() -> None:
    def facts(module: nn.Module) -> tuple[bool, float, float | None]:
        norm = read_norm("n", module, None)
        return norm.centred, norm.offset, norm.facts.eps

    machine = torch.finfo(torch.float32).eps
    assert facts(nn.LayerNorm(8, eps=1e-3)) == (True, 0.0, 1e-3)
    assert facts(nn.RMSNorm(8)) == (False, 0.0, machine)
    assert facts(nn.RMSNorm(8, dtype=torch.float64)) == (False, 0.0, torch.finfo(torch.float64).eps)
    assert facts(LayerNorm(7)) == (True, 0.0, 1e-5)
    assert facts(RMSNorm(8, eps=0.0, gain_offset=0.25)) == (False, 0.25, 0.0)
    assert facts(DynamicTanh(8)) == (False, 0.0, None)
    assert facts(SomeLayerNorm()) == (True, 0.0, 1.0)
    assert facts(SomeRMSNorm()) == (False, 0.0, None)
    silent = nn.LayerNorm(8)
    nn.init.zeros_(silent.weight)
    assert facts(silent) == (True, 0.0, 1e-5)
    counting = CountingNorm()
    facts(counting)
    assert float(counting.calls) == 0


def is_norm(module: nn.Module) -> bool:
    return Recognizer().form(module) is not None


def test_norms_are_recognized() -> None:
    assert all(
        is_norm(module) for module in (SomeRMSNorm(), SomeLayerNorm(), nn.LayerNorm(3, elementwise_affine=False))
    )
    others = (nn.BatchNorm1d(3), nn.GroupNorm(1, 3), nn.Linear(3, 3), nn.InstanceNorm1d(3, affine=True), nn.Identity())
    assert not any(is_norm(module) for module in others)


def test_norms_over_several_dimensions_are_recognized() -> None:
    """Their gain is a matrix: statistics of the input, no noise scale, and no error in backward."""
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm((3, 4), eps=0.5))
    x = torch.randn(5, 3, 4)
    watched = train_watched(model, None, 1, lambda m, s: m(x).square().sum())
    y = model[0](x).detach().double().flatten(1)
    share = (0.5 / (y.var(-1, correction=0) + 0.5)).mean()
    assert signal(watched, "eps_share") == [pytest.approx(float(share), rel=1e-5)]
    assert signal(watched, "gain_max") == [1.0]


def test_every_parameter_is_in_one_group() -> None:
    model = Decoder()
    model.scale = nn.Parameter(torch.ones(()))
    model.head.weight = model.embedding.weight
    structure = find_structure(model)
    assert list(structure.groups) == ["blocks.0", "blocks.1", "scale", "embedding", "final_norm", "head"]
    members = [id(p) for group in structure.groups.values() for _, p in group]
    assert sorted(members) == sorted(id(p) for p in model.parameters())


def test_many_parts_outside_the_blocks_are_grouped_coarsely() -> None:
    model = nn.Module()
    model.parts = nn.ModuleDict({f"p{at}": nn.Linear(1, 1) for at in range(40)})
    model.last = nn.Linear(1, 1)
    assert list(find_structure(model).groups) == ["parts", "last"]
