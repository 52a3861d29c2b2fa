"""Hugging Face folders: the same logits as transformers, and one clear error for every unusable folder."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from omninorm.config import NormConfig
from omninorm.errors import ConfigError, InputError, MissingExtraError, RunError
from omninorm.thinker import Thinker, ThinkerConfig
from omninorm.thinker.sizes import parameter_shapes

FAMILIES = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}
SHAPES = {
    "a key head per query head": {"num_key_value_heads": 4, "head_dim": 8},
    "grouped, wide heads": {"num_key_value_heads": 2, "head_dim": 14},
    "one key head, narrow": {"num_key_value_heads": 1, "head_dim": 6, "tie_word_embeddings": True},
    "eps and theta": {"num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 0.3, "rope_parameters": {"rope_type": "default", "rope_theta": 30.0}},
}  # fmt: skip


def foreign_model(family, **settings):
    """A transformers model with random weights: logits of spread about 1, gains that are not all one."""
    config_class, model_class = FAMILIES[family]
    shape = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 14, "max_position_embeddings": 48}
    tokens = {"bos_token_id": None, "eos_token_id": None, "initializer_range": 0.15}
    torch.manual_seed(4)
    model = model_class(config_class(**{**shape, **heads, **tokens, **settings})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.normal_(1.0, 0.4)
    return model


def rewrite(folder, **changes):
    """Changes keys of config.json; None removes the key."""
    path = folder / "config.json"
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


@pytest.fixture
def folder(tmp_path):
    foreign_model("llama").save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def ids():
    return torch.randint(0, 50, (2, 40))


def close(got, want):
    assert want.std() > 0.3
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers_with_and_without_cache(tmp_path, ids, family, shape):
    theirs = foreign_model(family, **shape)
    theirs.save_pretrained(tmp_path)
    ours = Thinker.from_pretrained(tmp_path)
    with torch.no_grad():
        want = theirs(ids).logits
        close(ours(ids), want)
        cache = ours.new_cache(2)
        parts = [ours(part, cache=cache) for part in ids.split([9, *[1] * 20, 11], dim=1)]
        close(torch.cat(parts, dim=1), want)


@pytest.mark.parametrize("family", FAMILIES)
def test_ragged_rows_equal_transformers_with_its_own_padding(tmp_path, ids, family):
    theirs = foreign_model(family)
    theirs.save_pretrained(tmp_path)
    ours = Thinker.from_pretrained(tmp_path)
    with torch.no_grad():
        got = ours(ids, cache=ours.new_cache(2, padding=[0, 15]))
        mask = torch.ones_like(ids)
        mask[1, :15] = 0
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        want = theirs(ids, attention_mask=mask, position_ids=positions).logits
    close(got[0], want[0])
    close(got[1, 15:], want[1, 15:])


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_generation_equals_transformers(tmp_path, ids, family):
    theirs = foreign_model(family)
    theirs.save_pretrained(tmp_path)
    prompts = ids[:, :8]
    # With the mask, because transformers would take every token 0 of the prompts for padding.
    settings = {"attention_mask": torch.ones_like(prompts), "do_sample": False, "pad_token_id": 0}
    want = theirs.generate(prompts, max_new_tokens=30, **settings)[:, 8:].tolist()
    assert Thinker.from_pretrained(tmp_path).generate(prompts, 30, temperature=0) == want
    assert len({token for row in want for token in row}) > 4


def test_shards_are_read(tmp_path, ids):
    theirs = foreign_model("qwen3")
    theirs.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    assert not (tmp_path / "model.safetensors").exists()
    with torch.no_grad():
        close(Thinker.from_pretrained(tmp_path)(ids), theirs(ids).logits)


def test_rope_theta_at_the_top_of_the_config_is_read(folder, ids):
    theirs = foreign_model("llama", rope_parameters={"rope_type": "default", "rope_theta": 77.0})
    theirs.save_pretrained(folder)
    rewrite(folder, rope_parameters=None, rope_theta=77.0, architectures=None)
    with torch.no_grad():
        close(Thinker.from_pretrained(folder)(ids), theirs(ids).logits)
        rewrite(folder, rope_theta=None)
        different = Thinker.from_pretrained(folder)(ids) - theirs(ids).logits
    assert different.abs().max() > 0.01


def test_optional_keys_of_llama_take_its_defaults(tmp_path, ids):
    theirs = foreign_model("llama", num_key_value_heads=4, head_dim=8)
    theirs.save_pretrained(tmp_path)
    rewrite(tmp_path, num_key_value_heads=None, head_dim=None, rms_norm_eps=None, hidden_act=None)
    with torch.no_grad():
        close(Thinker.from_pretrained(tmp_path)(ids), theirs(ids).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_error_of_bfloat16_is_no_larger_than_transformers(tmp_path, ids, family):
    theirs = foreign_model(family)
    theirs.save_pretrained(tmp_path)
    ours = Thinker.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        low = theirs.to(torch.bfloat16)
        got, rival = ours(ids), low(ids).logits
        assert got.dtype == torch.bfloat16
        exact = low.double()(ids).logits  # the same rounded weights
    error, rivals_error = ((x.double() - exact).square().mean().sqrt() for x in (got, rival))
    assert error < 1.3 * rivals_error


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bfloat16_norm_rounds_where_transformers_does(tmp_path, family):
    theirs = foreign_model(family)
    theirs.save_pretrained(tmp_path)
    ours = Thinker.from_pretrained(tmp_path, dtype=torch.bfloat16).blocks[0].around_attention.norm
    x = torch.randn(500, 32).bfloat16()
    with torch.no_grad():
        assert torch.equal(ours(x), theirs.to(torch.bfloat16).model.layers[0].input_layernorm(x))


def test_loading_keeps_the_random_state_and_gives_trainable_weights(folder, ids):
    state = torch.get_rng_state()
    model = Thinker.from_pretrained(folder)
    assert torch.equal(torch.get_rng_state(), state)
    model(ids).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_derived_tensors_are_ignored_and_a_repeated_tied_head_must_be_equal(tmp_path, ids):
    theirs = foreign_model("llama", tie_word_embeddings=True)
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(7)
    save_file(tensors, tmp_path / "model.safetensors")
    with torch.no_grad():
        close(Thinker.from_pretrained(tmp_path)(ids), theirs(ids).logits)
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(RunError, match=r"lm_head.weight in .* differs from the embedding"):
        Thinker.from_pretrained(tmp_path)


UNSUPPORTED = [
    ({"architectures": ["MistralForCausalLM"]}, "MistralForCausalLM"),
    ({"architectures": ["LlamaModel"]}, "LlamaModel"),
    ({"architectures": None, "model_type": "gpt2"}, "gpt2"),
    ({"attention_bias": True}, "attention_bias=True"),
    ({"mlp_bias": True}, "mlp_bias=True"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ({"use_sliding_window": True}, "use_sliding_window=True"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types=['full_attention', 'sliding_attention']"),
    ({"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4}"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling of type 'linear'"),
    ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1.0}}, "rope_parameters of type 'llama3'"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
]


@pytest.mark.parametrize(("changes", "received"), UNSUPPORTED)
def test_an_unsupported_setting_is_refused(folder, changes, received):
    rewrite(folder, **changes)
    with pytest.raises(ConfigError) as caught:
        Thinker.from_pretrained(folder)
    assert "LlamaForCausalLM and Qwen3ForCausalLM" in caught.value.invariant
    assert received in caught.value.received


def test_heads_that_do_not_divide_are_refused(folder):
    rewrite(folder, num_key_value_heads=3)
    with pytest.raises(ConfigError, match="num_attention_heads must be a multiple of num_key_value_heads"):
        Thinker.from_pretrained(folder)


def fails(folder, invariant, received=""):
    with pytest.raises(RunError) as caught:
        Thinker.from_pretrained(folder)
    assert invariant in caught.value.invariant
    assert received in str(caught.value.received)


def test_a_missing_folder_and_missing_files_are_named(folder, tmp_path):
    fails(tmp_path / "nowhere", f"No config.json in {tmp_path / 'nowhere'}")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    fails(folder, f"{folder} has no model.safetensors")
    (folder / "config.json").unlink()
    fails(folder, f"No config.json in {folder}")


@pytest.mark.parametrize("text", ["{", "", "\x00\x01", "[1, 2]"])
def test_a_config_that_is_not_a_json_object_is_refused(folder, text):
    (folder / "config.json").write_text(text)
    fails(folder, f"{folder / 'config.json'} must be", "list" if "[" in text else "")


def test_a_missing_key_of_the_config_is_named(folder):
    rewrite(folder, hidden_size=None)
    fails(folder, str(folder / "config.json"), "no hidden_size")


@pytest.mark.parametrize("left", [0, 5, 1000, -1])
def test_a_truncated_file_is_refused(folder, left):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:left])
    fails(folder, str(path))


def test_a_missing_shard_is_named(tmp_path):
    foreign_model("llama").save_pretrained(tmp_path, max_shard_size="10KB")
    lost = sorted(tmp_path.glob("model-*.safetensors"))[1]
    lost.unlink()
    fails(tmp_path, f"{tmp_path} has no {lost.name}")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_link_to_itself_is_refused(folder, name):
    (folder / name).unlink()
    (folder / name).symlink_to(name)
    fails(folder, name)


@pytest.mark.parametrize(
    "weight_map",
    [None, {}, {"a": "../elsewhere.safetensors"}, {"a": 3}, {"a": ["b"]}, {"a": "x" * 300}, {"a": "\0"}, ["a"]],
)
def test_an_index_without_names_of_files_next_to_it_is_refused(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    fails(folder, "model.safetensors.index.json must have a weight_map", repr(weight_map)[:60])


def edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_missing_tensors_are_named(folder):
    def drop(tensors):
        for name in ("up", "gate", "down"):
            del tensors[f"model.layers.1.mlp.{name}_proj.weight"]
        del tensors["model.norm.weight"]

    edit(folder, drop)
    names = ", ".join(f"model.layers.1.mlp.{name}_proj.weight" for name in ("down", "gate", "up"))
    fails(folder, f"{folder} lacks tensors of its model: {names} and 1 more")


def test_an_untied_model_without_its_head_is_refused(folder):
    edit(folder, lambda tensors: tensors.pop("lm_head.weight"))
    fails(folder, f"{folder} lacks tensors of its model: lm_head.weight")


def test_unexpected_tensors_are_named(folder):
    edit(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(56)}))
    fails(folder, "model.layers.0.self_attn.q_proj.bias")


def test_the_missing_prefix_of_a_base_model_is_named(folder):
    def strip(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    edit(folder, strip)
    fails(folder, "prefix 'model.'", "embed_tokens.weight")


@pytest.mark.parametrize(
    ("key", "value"),
    [("tie_word_embeddings", 1), ("rms_norm_eps", "x"), ("num_key_value_heads", 0), ("hidden_size", 0)],
)
def test_a_bad_value_is_reported_by_the_key_of_the_file(folder, key, value):
    rewrite(folder, **{key: value})
    with pytest.raises(ConfigError) as caught:
        Thinker.from_pretrained(folder)
    assert f"config.json: {key} must" in caught.value.invariant
    assert repr(value) in caught.value.received
    assert "tied_head" not in str(caught.value)


def test_tie_word_embeddings_of_null_is_reported_by_its_key(folder):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": None}))
    with pytest.raises(ConfigError, match="tie_word_embeddings must be true or false, got None"):
        Thinker.from_pretrained(folder)


@pytest.mark.parametrize("layers", [2, 4])
def test_a_config_with_another_number_of_layers_is_refused(folder, layers):
    rewrite(folder, num_hidden_layers=layers)
    fails(folder, f"config.json says {layers} layers, but the weights have 3")


@pytest.mark.parametrize(
    ("tensor", "received"),
    [(torch.zeros(33), "the shape (33,)"), (torch.zeros(32, dtype=torch.int8), "I8")],
)
def test_a_tensor_of_another_shape_or_dtype_is_refused(folder, tensor, received):
    edit(folder, lambda tensors: tensors.update({"model.norm.weight": tensor}))
    fails(folder, "model.norm.weight", received)


@pytest.mark.parametrize("dtype", [torch.int8, "float32"])
def test_a_dtype_that_is_not_floating_point_is_refused(folder, dtype):
    with pytest.raises(InputError) as caught:
        Thinker.from_pretrained(folder, dtype=dtype)
    assert caught.value.received == str(dtype)


def test_without_safetensors_the_extra_to_install_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(MissingExtraError, match=r"\[(interop|train)\]"):
        Thinker.from_pretrained(folder)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied_head", [True, False])
def test_the_expected_shapes_are_those_of_the_model(family, tied_head):
    shape = {"vocab_size": 20, "d_model": 12, "n_layers": 2, "n_heads": 3, "n_kv_heads": 1, "head_dim": 6, "d_ff": 10}
    norm = NormConfig(qk_norm=family == "qwen3")
    config = ThinkerConfig(**shape, norm=norm, tied_head=tied_head)
    model = {name: tuple(parameter.shape) for name, parameter in Thinker(config).named_parameters()}
    assert parameter_shapes(config) == model
