"""Names of many families: block, kind and branch."""

from __future__ import annotations

import pytest

from omninorm.inspection.names import place

NAMES = [
    ("model.layers.7.self_attn.o_proj.weight", 2, "matrix", "model.layers.7", "attention"),
    ("model.layers.7.mlp.down_proj.weight", 2, "matrix", "model.layers.7", "feed-forward"),
    ("model.layers.7.mlp.experts.3.down_proj.weight", 2, "matrix", "model.layers.7", "feed-forward"),
    ("model.layers.7.self_attn.q_norm.weight", 1, "gain", "model.layers.7", None),
    ("model.layers.7.self_attn.q_proj.bias", 1, "vector", "model.layers.7", None),
    ("transformer.h.12.ln_1.weight", 1, "gain", "transformer.h.12", None),
    ("transformer.h.12.ln_1.bias", 1, "norm bias", "transformer.h.12", None),
    ("transformer.h.12.attn.c_proj.weight", 2, "matrix", "transformer.h.12", "attention"),
    ("transformer.h.12.mlp.c_proj.weight", 2, "matrix", "transformer.h.12", "feed-forward"),
    ("h.0.attn.bias", 4, "buffer", "h.0", None),
    ("blocks.3.attn.bias", 1, "vector", "blocks.3", None),
    ("transformer.ln_f.weight", 1, "gain", None, None),
    ("transformer.wte.weight", 2, "embedding", None, None),
    ("bert.encoder.layer.7.attention.output.dense.weight", 2, "matrix", "bert.encoder.layer.7", "attention"),
    ("bert.encoder.layer.7.output.dense.weight", 2, "matrix", "bert.encoder.layer.7", "feed-forward"),
    ("bert.encoder.layer.7.output.LayerNorm.gamma", 1, "gain", "bert.encoder.layer.7", None),
    ("bert.encoder.layer.7.output.LayerNorm.beta", 1, "norm bias", "bert.encoder.layer.7", None),
    ("bert.embeddings.word_embeddings.weight", 2, "embedding", None, None),
    ("blk.7.attn_norm.weight", 1, "gain", "blk.7", None),
    ("blk.7.attn_output.weight", 2, "matrix", "blk.7", "attention"),
    ("blk.7.ffn_down.weight", 2, "matrix", "blk.7", "feed-forward"),
    ("token_embd.weight", 2, "embedding", None, None),
    ("output.weight", 2, "head", None, None),
    ("output_norm.weight", 1, "gain", None, None),
    ("blocks.1.attention.out.weight", 2, "matrix", "blocks.1", "attention"),
    ("blocks.1.feed_forward.down.weight", 2, "matrix", "blocks.1", "feed-forward"),
    ("blocks.1.around_attention.norm.weight", 1, "gain", "blocks.1", None),
    ("blocks.1.around_attention.norm.alpha", 1, "vector", "blocks.1", None),
    ("vision_model.pre_layrnorm.weight", 1, "gain", None, None),
    ("model.rotary_emb.inv_freq", 1, "buffer", None, None),
    ("lm_head.weight", 2, "head", None, None),
    ("backbone.layers.1.mixer.A_log", 2, "vector", "backbone.layers.1", None),
    ("encoder.block.1.layer.1.DenseReluDense.wo.weight", 2, "matrix", "encoder.block.1", "feed-forward"),
    ("encoder.block.1.layer.0.SelfAttention.o.weight", 2, "matrix", "encoder.block.1", "attention"),
    ("layers.1.attention.wo.weight", 2, "matrix", "layers.1", "attention"),
    ("layers.1.feed_forward.w2.weight", 2, "matrix", "layers.1", "feed-forward"),
    ("features.0.weight", 4, "matrix", None, None),
    ("layers.99999999999.w", 2, "matrix", None, None),
]


@pytest.mark.parametrize(("name", "dimensions", "kind", "layer", "branch"), NAMES, ids=[row[0] for row in NAMES])
def test_place(name, dimensions, kind, layer, branch):
    found = place(name, (8,) * dimensions)
    assert (found.kind, found.layer, found.branch) == (kind, layer, branch)


def test_roles_are_shared_by_blocks_and_experts():
    names = [f"model.layers.{block}.mlp.experts.{expert}.w1.weight" for block in (0, 11) for expert in (0, 2)]
    assert {place(name, (4, 4)).role for name in names} == {"model.layers.*.mlp.experts.*.w1.weight"}
