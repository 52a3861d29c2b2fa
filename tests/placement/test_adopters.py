"""Block and Thinker against the models of transformers that use the same residual rule, from their weights."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from transformers import NanoChatConfig, NanoChatForCausalLM

from omninorm import NormConfig, Thinker, ThinkerConfig

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
