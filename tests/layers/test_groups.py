"""Parameter groups: which parameters weight decay applies to."""

from __future__ import annotations

from collections.abc import Callable

import numpy
import pytest
import torch
import transformers as hf
from torch import nn

import omninorm
from omninorm.config import NORMALIZATIONS, PLACEMENTS, NormConfig
from omninorm.errors import ConfigError
from omninorm.layers import LayerNorm, param_groups
from omninorm.layers.groups import decayed_names
from omninorm.thinker import Thinker, ThinkerConfig


def _named(model: nn.Module, group: dict) -> set[str]:
    chosen = {id(parameter) for parameter in group["params"]}
    return {name for name, parameter in model.named_parameters() if id(parameter) in chosen}


def _thinker(**settings) -> Thinker:
    return Thinker(ThinkerConfig(d_model=16, n_layers=1, n_heads=2, max_seq_len=8, **settings))


@pytest.mark.parametrize("kind", NORMALIZATIONS)
@pytest.mark.parametrize("placement", [name for name in PLACEMENTS if name != "ngpt"])
def test_only_the_matrices_of_linear_layers_are_decayed(kind, placement):
    model = _thinker(norm=NormConfig(kind, placement), tied_head=False)
    decayed, excluded = param_groups(model, 0.1)
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert len(linear) == 4 + 3 + 1
    assert _named(model, decayed) == linear
    assert _named(model, decayed) | _named(model, excluded) == {name for name, _ in model.named_parameters()}
    assert (decayed["weight_decay"], excluded["weight_decay"]) == (0.1, 0.0)
    assert "embedding.weight" in _named(model, excluded)


def test_no_weight_of_ngpt_is_decayed_because_its_length_has_no_effect():
    (excluded,) = param_groups(_thinker(norm=NormConfig(norm_placement="ngpt"), tied_head=False), 0.1)
    assert excluded["weight_decay"] == 0.0


def test_a_tied_head_is_excluded_as_an_embedding():
    model = _thinker(tied_head=True)
    assert "embedding.weight" in _named(model, param_groups(model, 0.1)[1])


def test_the_module_type_decides_not_the_shape_or_the_name():
    model = nn.ModuleDict({"norm": nn.Linear(3, 4), "linear": nn.LayerNorm((3, 4)), "conv": nn.Conv1d(2, 2, 3)})
    decayed, excluded = param_groups(model, 0.1)
    assert _named(model, decayed) == {"norm.weight", "conv.weight"}
    assert _named(model, excluded) == {"norm.bias", "linear.weight", "linear.bias", "conv.bias"}


def test_frozen_parameters_are_left_out():
    model = _thinker()
    model.embedding.weight.requires_grad_(False)
    grouped = [parameter for group in param_groups(model, 0.1) for parameter in group["params"]]
    assert all(parameter is not model.embedding.weight for parameter in grouped)


@pytest.mark.parametrize("name", ["GPT2", "Qwen3", "Gemma2"])
def test_norms_of_transformers_are_excluded(name: str) -> None:
    """Lists of names miss GPT-2's ln_f and Qwen3's q_norm."""
    settings = {
        "vocab_size": 11,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
    }
    model = getattr(hf, f"{name}Model")(getattr(hf, f"{name}Config")(**settings))
    decayed, excluded = param_groups(model, 0.1)
    norms = {
        id(p) for module in model.modules() if "Norm" in type(module).__name__ for p in module.parameters(recurse=False)
    }
    assert norms
    assert norms <= {id(parameter) for parameter in excluded["params"]}
    assert all(parameter.ndim == 2 for parameter in decayed["params"])


def test_a_group_without_parameters_is_left_out():
    assert [group["weight_decay"] for group in param_groups(nn.LayerNorm(3), 0.1)] == [0.0]
    assert param_groups(nn.Identity(), 0.1) == []


@pytest.mark.parametrize("decay", [-0.1, float("nan"), "0.1", None])
def test_a_decay_that_is_not_a_number_of_at_least_0_is_refused(decay):
    with pytest.raises(ConfigError, match="weight_decay must be a finite number ≥ 0"):
        param_groups(nn.Linear(2, 2), decay)


def test_the_parameters_of_a_parametrized_gain_are_excluded():
    norm = LayerNorm((2, 4))
    nn.utils.parametrize.register_parametrization(norm, "weight", nn.Softplus())
    assert decayed_names(nn.Sequential(nn.Linear(8, 8), norm)) == {"0.weight"}


SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
TEXT = {**SIZES, "vocab_size": 11, "pad_token_id": 0}
IMAGE = {**SIZES, "image_size": 8, "patch_size": 4}
MAMBA = {"vocab_size": 11, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}


@pytest.mark.parametrize(
    ("name", "settings", "excluded"),
    [
        ("Cohere", {**TEXT, "use_qk_norm": True}, {"layers.0.self_attn.q_norm.weight", "layers.0.self_attn.k_norm.weight"}),
        ("Cohere2", {**TEXT, "num_key_value_heads": 2}, {"layers.0.input_layernorm.weight"}),
        ("Mamba", MAMBA, {"layers.0.mixer.A_log", "layers.0.mixer.D"}),
        ("Mamba2", {**MAMBA, "num_heads": 4, "head_dim": 8, "n_groups": 1}, {"layers.0.mixer.A_log", "layers.0.mixer.D"}),
        ("ViT", IMAGE, {"embeddings.cls_token", "embeddings.position_embeddings"}),
        ("Dinov2", IMAGE, {"embeddings.cls_token", "embeddings.mask_token", "embeddings.position_embeddings"}),
        ("Swin", {"embed_dim": 8, "depths": [1], "num_heads": [2], "image_size": 16, "patch_size": 4, "window_size": 2},
         {"encoder.layers.0.blocks.0.attention.relative_position_bias.relative_position_bias_table"}),
        ("Mixtral", {**TEXT, "num_key_value_heads": 2, "num_local_experts": 2}, {"embed_tokens.weight"}),
    ],
)  # fmt: skip
def test_only_matrices_of_transformers_models_are_decayed(name: str, settings: dict, excluded: set[str]) -> None:
    """Decayed are weights of linear layers, convolutions, routers and experts, and nothing else."""
    model = getattr(hf, f"{name}Model")(getattr(hf, f"{name}Config")(**settings))
    names = {name for name, _ in model.named_parameters()}
    decayed = decayed_names(model)
    assert excluded <= names - decayed
    matrices = {
        f"{prefix}.{own}"
        for prefix, module in model.named_modules()
        for own, parameter in module.named_parameters(recurse=False)
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d))
        or type(module).__name__.endswith(("Experts", "Router"))
        if parameter.ndim > 1
    }
    assert decayed == matrices


class Tables(nn.Module):
    """Parameters of no layer of torch.nn."""

    def __init__(self) -> None:
        super().__init__()
        for name, shape in {
            "pos_embed": (5, 8), "rel_pos_h": (5, 8), "positional_encoding": (5, 8), "register_tokens": (4, 8),
            "query_embed": (4, 8), "relative_position_bias_table": (9, 2), "mask": (1, 1, 8), "A_log": (8, 4),
            "weight": (1, 8), "projection": (8, 8), "experts": (2, 8, 8), "position": (3, 3), "composition": (3, 3),
            "tokenizer_map": (3, 3),
        }.items():  # fmt: skip
            setattr(self, name, nn.Parameter(torch.randn(shape)))


def test_tables_and_tokens_are_excluded_by_shape_or_name() -> None:
    assert decayed_names(Tables()) == {"weight", "projection", "experts", "composition", "tokenizer_map"}


class MyRMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 4))
        self.bias = nn.Parameter(torch.ones(2, 4))


class TokenEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 4))


class NormalizedLinear(nn.Linear):
    pass


def test_class_names_decide_except_for_linear_layers() -> None:
    model = nn.ModuleList([MyRMSNorm(), TokenEmbedding(), NormalizedLinear(2, 2), nn.Linear(4, 1)])
    assert decayed_names(model) == {"2.weight", "3.weight"}


def test_parameters_that_their_author_excluded_are_not_decayed() -> None:
    class Timm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)
            self.other = nn.Linear(4, 4)
            self.marked = nn.Linear(4, 4)
            self.marked.weight._no_weight_decay = True

        def no_weight_decay(self) -> set[str]:
            return {"inner.weight", "unknown"}

    assert decayed_names(nn.Sequential(Timm())) == {"0.other.weight"}


@pytest.mark.parametrize("make", [lambda: omninorm.RMSNorm(8, gain_offset=1.0), lambda: omninorm.LayerNorm(8), lambda: omninorm.ScaleNorm(8), lambda: omninorm.DynamicErf(8), MyRMSNorm], ids=["RMSNorm", "LayerNorm", "ScaleNorm", "DynamicErf", "MyRMSNorm"])  # fmt: skip
def test_with_decay_norms_gains_are_decayed_but_nothing_else_of_a_norm(make: Callable[[], nn.Module]) -> None:
    norm = make()
    model = nn.Sequential(nn.Linear(8, 8), norm)
    gain = "1.scale" if isinstance(norm, omninorm.ScaleNorm) else "1.weight"
    assert decayed_names(model) == {"0.weight"}
    assert decayed_names(model, decay_norms=True) == {"0.weight", gain}
    decayed, excluded = param_groups(model, 0.1, decay_norms=True)
    assert _named(model, decayed) == {"0.weight", gain}
    assert _named(model, excluded) == {name for name, _ in model.named_parameters()} - {"0.weight", gain}


def test_decay_norms_must_be_a_bool() -> None:
    with pytest.raises(ConfigError, match="decay_norms must be True or False"):
        param_groups(nn.Linear(2, 2), 0.1, decay_norms=0.1)  # type: ignore[arg-type]


def test_the_decay_may_be_a_numpy_number() -> None:
    (group,) = param_groups(nn.Linear(2, 2, bias=False), numpy.float32(0.25))
    assert type(group["weight_decay"]) is float
    assert group["weight_decay"] == 0.25


def loose(name: str, **shapes: tuple[int, ...]) -> nn.Module:
    """Return a module whose class has this name, with parameters of these shapes."""
    made: nn.Module = type(name, (nn.Module,), {})()
    for parameter, shape in shapes.items():
        setattr(made, parameter, nn.Parameter(torch.ones(shape)))
    return made


# A module, the parameters that are decayed, and those that `decay_norms` adds.
NAMED_CLASSES: list[tuple[nn.Module, set[str], set[str]]] = [
    (loose("LayerNormLinear", layer_norm_weight=(8,), weight=(16, 8), bias=(16,)), {"weight"}, {"layer_norm_weight"}),
    (loose("LayerNormMLP", fc1_weight=(16, 8), fc2_weight=(8, 16), layer_norm_bias=(8,)), {"fc1_weight", "fc2_weight"}, set()),
    (loose("WeightNormLinear", weight=(8, 8), gain=(8,)), {"weight"}, set()),
    (loose("WeightNorm", weight=(8, 8)), {"weight"}, set()),
    (loose("BatchNormConv", kernel=(8, 8, 3)), {"kernel"}, set()),
    (loose("AdaptiveLayerNorm", weight=(8,), proj=(16, 8)), {"proj"}, {"weight"}),
    (loose("CohereLayerNorm", weight=(2, 4)), set(), {"weight"}),
    (loose("LayerNorm2d", weight=(1, 8, 1, 1), bias=(1, 8, 1, 1)), set(), {"weight"}),
    (loose("MambaRMSNormGated", weight=(8,)), set(), {"weight"}),
    (loose("BertEmbeddings", proj=(8, 8), position_embeddings=(5, 8), weight=(9, 8)), {"proj"}, set()),
    (loose("PatchEmbedding", weight=(8, 8), cls_token=(1, 1, 8)), {"weight"}, set()),
    (loose("TokenEmbed", W_E=(9, 8)), set(), set()),
    (loose("EmbeddingMixer", weight=(8, 8)), {"weight"}, set()),
]  # fmt: skip


@pytest.mark.parametrize(("module", "decayed", "gains"), NAMED_CLASSES, ids=lambda case: type(case).__name__)
def test_a_class_name_excludes_no_matrix_of_a_linear_map(module: nn.Module, decayed: set, gains: set) -> None:
    assert decayed_names(module) == decayed
    assert decayed_names(module, decay_norms=True) == decayed | gains


def test_a_projection_that_a_norm_owns_is_decayed() -> None:
    layer = nn.LayerNorm((2, 4))
    layer.proj = nn.Parameter(torch.ones(8, 4))
    assert decayed_names(layer) == {"proj"}
    assert decayed_names(layer, decay_norms=True) == {"proj", "weight"}


def test_a_first_dimension_of_1_excludes_no_matrix() -> None:
    matrices = {
        "gate_up_proj": (1, 8, 16), "down_proj": (1, 16, 8), "w1": (1, 8, 16), "w": (1, 8, 8), "expert_up": (1, 8, 16),
        "lora_A": (1, 64), "router": (1, 8), "fc1": (1, 8, 8), "in_proj_weight": (1, 8, 8), "pos_proj": (8, 8),
        "token_projection": (8, 8), "query_proj": (1, 8),
    }  # fmt: skip
    shared = {
        "mask": (1, 8),
        "cls": (1, 8),
        "latents": (1, 4, 8),
        "probe": (1, 1, 8),
        "sep_token": (1, 8),
        "bias_k": (1, 1, 8),
    }
    assert decayed_names(loose("Anything", **matrices, **shared)) == set(matrices)


def test_a_method_no_weight_decay_with_arguments_is_not_called() -> None:
    class Required(nn.Linear):
        def no_weight_decay(self, names: list[str]) -> list[str]:
            raise AssertionError(names)

    class Optional(nn.Linear):
        def no_weight_decay(self, prefix: str = "") -> list[str]:
            return [f"{prefix}weight"]

    child = nn.Linear(2, 2)
    child.no_weight_decay = nn.Linear(2, 2)
    model = nn.ModuleList([Required(2, 2), Optional(2, 2), child])
    assert decayed_names(model) == {"0.weight", "2.weight", "2.no_weight_decay.weight"}


def test_a_gain_that_its_author_excluded_is_not_decayed_with_decay_norms() -> None:
    model = nn.Sequential(nn.LayerNorm(4), nn.LayerNorm(4))
    model[0].weight._no_weight_decay = True
    assert decayed_names(model, decay_norms=True) == {"1.weight"}
