"""Block and Thinker against the models of transformers that use the same residual rule, from their weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import nGPT_pytorch
import pytest
import torch
from torch import Tensor, nn
from transformers import DeepseekV4Config, DeepseekV4Model, NanoChatConfig, NanoChatForCausalLM
from transformers.models.glm5_next.modeling_glm5_next import Glm5NextTextConfig, Glm5NextTextModel
from transformers.models.qwen4_exp.modeling_qwen4_exp import Qwen4ExpTextConfig, Qwen4ExpTextModel

from omninorm import Block, NormConfig, Thinker, ThinkerConfig
from omninorm.placement import FinalNorm, enter

SHAPE = {
    "vocab_size": 40, "d_model": 32, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 24, "tied_head": False,
}  # fmt: skip
TOKENS = torch.randint(0, 40, (2, 12), generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def swap_halves(weight: Tensor, heads: int) -> Tensor:
    """Swap the halves of each head's rows. NanoChat's RoPE rotates the other way, which this undoes."""
    low, high = weight.unflatten(0, (heads, 2, -1)).unbind(1)
    return torch.stack([high, low], 1).flatten(0, 2)


def nanochat_weights(theirs: NanoChatForCausalLM) -> dict[str, Tensor]:
    """NanoChat's weights by Thinker's names."""
    found = {"embedding.weight": theirs.model.embed_tokens.weight, "head.weight": theirs.lm_head.weight}
    for number, layer in enumerate(theirs.model.layers):
        attention, mlp, at = layer.self_attn, layer.mlp, f"blocks.{number}"
        found |= {
            f"{at}.attention.q.weight": swap_halves(attention.q_proj.weight, 4),
            f"{at}.attention.k.weight": swap_halves(attention.k_proj.weight, 2),
            f"{at}.attention.v.weight": attention.v_proj.weight,
            f"{at}.attention.out.weight": attention.o_proj.weight,
            f"{at}.feed_forward.up.weight": mlp.fc1.weight,
            f"{at}.feed_forward.down.weight": mlp.fc2.weight,
        }
    return found


def test_thinker_gives_the_logits_of_nanochat_from_its_weights() -> None:
    config = NanoChatConfig(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=24, initializer_range=0.3,
    )  # fmt: skip
    theirs = NanoChatForCausalLM(config).eval()
    norm = NormConfig(norm_placement="x0", qk_norm=True, embedding_norm=True)
    ours = Thinker(ThinkerConfig.from_dict({**SHAPE, "norm": norm, "d_ff": 64, "feed_forward": "relu2"}))
    left = ours.load_state_dict(nanochat_weights(theirs), strict=False)
    assert not left.unexpected_keys
    assert all("norm" in name or "lambdas" in name for name in left.missing_keys), "only gains, λ and μ are new"
    with torch.no_grad():
        logits, expected = ours(TOKENS), theirs(input_ids=TOKENS).logits
    cap = config.final_logit_softcapping
    assert expected.std() > 0.5
    torch.testing.assert_close(cap * torch.tanh(logits / cap), expected, rtol=1e-5, atol=1e-5)


class Adapter(nn.Module):
    """A sublayer of transformers with the arguments of its call, which returns only its first output."""

    def __init__(self, module: nn.Module, **arguments: Any) -> None:
        super().__init__()
        self.module, self.arguments = module, arguments

    def forward(self, x: Tensor) -> Tensor:
        y = self.module(x, **self.arguments)
        return y[0] if isinstance(y, tuple) else y


def shake(model: nn.Module) -> None:
    """Change every parameter, so that no gate or gain has a value that hides a mistake."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)


def record(model: nn.Module) -> tuple[Tensor, list[tuple[Tensor, dict[str, Any], Tensor]]]:
    """Return the last hidden state, and each decoder layer's stream, further arguments and output."""
    calls: list[tuple[Tensor, dict[str, Any], Tensor]] = []

    def keep(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        calls.append((args[0], kwargs, output[0] if isinstance(output, tuple) else output))

    hooks = [layer.register_forward_hook(keep, with_kwargs=True) for layer in model.layers]
    with torch.no_grad():
        last = model(input_ids=TOKENS, use_cache=False).last_hidden_state
    for hook in hooks:
        hook.remove()
    return last, calls


def put(values: dict[nn.Parameter, Tensor]) -> None:
    with torch.no_grad():
        for ours, theirs in values.items():
            ours.copy_(theirs)


def copy_gates(ours: nn.Module, phi: Tensor, bias: Tensor, alpha: Tensor) -> None:
    put({ours.phi: phi, ours.bias: bias, ours.alpha: alpha})


def mhc_block(config: NormConfig, layer: nn.Module, attention: nn.Module, mlp: nn.Module, number: int) -> Block:
    block = Block(config, 32, attention, mlp, block=number, blocks=2)
    for around, gates, norm in (
        (block.around_attention, layer.attn_hc, layer.input_layernorm),
        (block.around_feed_forward, layer.ffn_hc, layer.post_attention_layernorm),
    ):
        copy_gates(around.gates, gates.fn, gates.base, gates.scale)
        put({around.norm.weight: norm.weight})
    return block


def test_block_gives_the_layers_and_the_end_of_deepseek_v4_from_their_weights() -> None:
    config = DeepseekV4Config(
        vocab_size=40, hidden_size=32, moe_intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        head_dim=16, q_lora_rank=16, num_experts_per_tok=2, n_routed_experts=4, o_groups=2, o_lora_rank=8,
        layer_types=["sliding_attention"] * 2, mlp_layer_types=["moe"] * 2, sliding_window=8,
        max_position_embeddings=64, attn_implementation="eager",
    )  # fmt: skip
    model = DeepseekV4Model(config).eval()
    shake(model)
    last, calls = record(model)
    norm = NormConfig(norm_placement="mhc")
    with torch.no_grad():
        stream = enter(norm, model.embed_tokens(TOKENS))
        for number, (layer, (x, arguments, y)) in enumerate(zip(model.layers, calls, strict=True), 1):
            tokens = arguments.pop("input_ids")
            block = mhc_block(
                norm, layer, Adapter(layer.self_attn, **arguments), Adapter(layer.mlp, input_ids=tokens), number
            )
            assert (x[..., 0, :] - x[..., 1, :]).std() > 0.1 or number == 1, "the streams must differ"
            torch.testing.assert_close(block(x), y, rtol=1e-5, atol=1e-5)
            stream = block(stream)
        final, head = FinalNorm(norm, 32), model.hc_head
        copy_gates(final.exit.gates, head.hc_fn, head.hc_base, head.hc_scale)
        put({final.norm.weight: model.norm.weight})
        torch.testing.assert_close(final(stream), last, rtol=1e-5, atol=1e-5)


def test_block_gives_the_layers_of_glm_5_from_their_weights() -> None:
    config = Glm5NextTextConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, linear_head_dim=16, linear_num_heads=2, layer_types=["linear_attention"] * 2,
        mlp_layer_types=["dense"] * 2, pad_token_id=0, max_position_embeddings=64,
    )  # fmt: skip
    model = Glm5NextTextModel(config).eval()
    shake(model)
    _, calls = record(model)
    norm = NormConfig(norm_placement="mhc", norm_eps=config.rms_norm_eps)
    with torch.no_grad():
        for number, (layer, (x, arguments, y)) in enumerate(zip(model.layers, calls, strict=True), 1):
            attention = Adapter(layer.self_attn, cache_params=None, attention_mask=arguments["attention_mask"])
            block = mhc_block(norm, layer, attention, Adapter(layer.mlp), number)
            torch.testing.assert_close(block(x), y, rtol=1e-5, atol=1e-5)


def copy_reader(ours: nn.Module, theirs: nn.Module) -> None:
    put({ours.down: theirs.input_mix_weight_down.weight, ours.up: theirs.input_mix_weight_up.weight})
    for norm, gain in zip(ours.norms, theirs.hc_norm.weight.chunk(4), strict=True):
        put({norm.weight: gain})


def test_block_gives_the_layers_and_the_end_of_qwen4_from_their_weights() -> None:
    config = Qwen4ExpTextConfig(
        vocab_size=40, hidden_size=32, hc_lowrank=5, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
        moe_intermediate_size=16, shared_expert_intermediate_size=16, num_experts=4, num_experts_per_tok=2,
        layer_types=["linear_attention", "indexed_attention"], indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=16,
        indexer_budget=8, indexer_compress_ratio=4, max_position_embeddings=64,
    )  # fmt: skip
    model = Qwen4ExpTextModel(config).eval()
    shake(model)
    last, calls = record(model)
    norm = NormConfig(norm_placement="hyper", norm_eps=config.rms_norm_eps, gain_offset=1.0, gate_rank=5)
    with torch.no_grad():
        stream = enter(norm, model.embed_tokens(TOKENS))
        for number, (layer, (x, arguments, y)) in enumerate(zip(model.layers, calls, strict=True), 1):
            if layer.layer_type == "linear_attention":
                attention = Adapter(layer.linear_attn, cache_params=None, attention_mask=arguments["conv_mask"])
            else:
                names = ("position_embeddings", "attention_mask", "past_key_values")
                attention = Adapter(layer.self_attn, **{name: arguments[name] for name in names})
            block = Block(norm, 32, attention, Adapter(layer.mlp), block=number, blocks=2)
            for around, theirs in (
                (block.around_attention, layer.attn_hyper_connection),
                (block.around_feed_forward, layer.mlp_hyper_connection),
            ):
                copy_reader(around.reader, theirs)
                put({around.inject: theirs.block_inject_weight.weight})
            torch.testing.assert_close(block(x.unflatten(-1, (4, 32))).flatten(-2), y, rtol=1e-5, atol=1e-5)
            stream = block(stream)
        final = FinalNorm(norm, 32)
        copy_reader(final.exit, model.hyper_connection_mixer)
        torch.testing.assert_close(final(stream), last, rtol=1e-5, atol=1e-5)


def pairs_as_halves(rows: Tensor) -> Tensor:
    """Reorder each head's rows: RoPE's pairs are neighbours in nGPT_pytorch, and a half apart in ours."""
    return rows.unflatten(0, (4, 4, 2)).transpose(1, 2).flatten(0, 2)


def ngpt_weights(theirs: nn.Module) -> dict[str, Tensor]:
    """nGPT_pytorch's weights by Thinker's names. It scales only q, by what we apply to q and k as a root."""
    found = {
        "embedding.weight": theirs.token_embed.weight,
        "head.weight": theirs.to_logits.weight,
        "logit_scale.value": theirs.logit_scale.scale,
    }
    for number, (attention, mlp) in enumerate(theirs.layers):
        at = f"blocks.{number}"
        root = pairs_as_halves(attention.fn.qk_scale().sqrt())
        found |= {
            f"{at}.attention.q.weight": pairs_as_halves(attention.fn.to_q.weight),
            f"{at}.attention.k.weight": pairs_as_halves(attention.fn.to_k.weight),
            f"{at}.attention.v.weight": attention.fn.to_v.weight,
            f"{at}.attention.out.weight": attention.fn.to_out.weight,
            f"{at}.attention.qk_scale.value": root * 32**-0.5,
            f"{at}.feed_forward.up.weight": mlp.fn.to_hidden.weight,
            f"{at}.feed_forward.up.scale.value": mlp.fn.hidden_scale.scale,
            f"{at}.feed_forward.gate.weight": mlp.fn.to_gate.weight,
            f"{at}.feed_forward.gate.scale.value": mlp.fn.gate_scale.scale,
            f"{at}.feed_forward.down.weight": mlp.fn.to_out.weight,
            f"{at}.around_attention.alpha.value": attention.branch_scale.scale,
            f"{at}.around_feed_forward.alpha.value": mlp.branch_scale.scale,
        }
    return found


def test_thinker_gives_the_logits_of_the_package_ngpt_pytorch_from_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    # These classes define __eq__ without __hash__, which torch needs to walk through modules.
    for name in ("nGPT", "Attention", "FeedForward", "NormLinear", "Scale"):
        monkeypatch.setattr(getattr(nGPT_pytorch, name), "__hash__", nn.Module.__hash__)
    shape = {"num_tokens": 40, "dim": 32, "depth": 3, "dim_head": 8, "heads": 4}
    theirs = nGPT_pytorch.nGPT(**shape, alpha_init=0.05, add_value_residual=False)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name != "rotary_embed.freqs":  # positive factors, because the root of q's scales is taken
                parameter.mul_(1 + 0.5 * torch.rand_like(parameter))
    norm = NormConfig(norm_placement="ngpt", norm_eps=1e-12)
    ours = Thinker(ThinkerConfig.from_dict({**SHAPE, "n_kv_heads": 4, "d_ff": 85, "norm": norm}))
    ours.load_state_dict(ngpt_weights(theirs))
    with torch.no_grad():
        logits, expected = ours(TOKENS), theirs(TOKENS)
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
