"""The switches of NormConfig that add norms: on values and on embeddings; and the squared ReLU."""

import pytest
import torch

from omninorm import NormConfig, Thinker, ThinkerConfig
from omninorm.errors import ConfigError

SHAPE = {"vocab_size": 40, "d_model": 16, "n_layers": 1, "n_heads": 2, "max_seq_len": 24}


def build(norm, **settings):
    torch.manual_seed(0)
    model = Thinker(ThinkerConfig(norm=norm, **SHAPE, **settings)).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def rms_norm(x, gain):
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-6) * gain


def test_embedding_norm_normalizes_the_embeddings_before_the_first_block(tokens):
    model = build(NormConfig(embedding_norm=True))
    entered = []
    model.blocks[0].register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    model(tokens)
    expected = rms_norm(model.embedding.weight[tokens], model.embedding_norm.weight)
    torch.testing.assert_close(entered[0], expected, rtol=1e-12, atol=1e-12)


def test_the_x0_of_placement_x0_is_the_normalized_embedding(tokens):
    model = build(NormConfig(norm_placement="x0", embedding_norm=True))
    entered = []
    model.blocks[0].register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    model(tokens)
    expected = rms_norm(model.embedding.weight[tokens], model.embedding_norm.weight)
    for part in entered[0]:
        torch.testing.assert_close(part, expected, rtol=1e-12, atol=1e-12)


def test_v_norm_normalizes_each_head_of_the_values(tokens):
    model = build(NormConfig(v_norm=True))
    attention = model.blocks[0].attention
    seen = {}
    attention.v_norm.register_forward_hook(lambda module, args, output: seen.update(x=args[0], y=output))
    attention.out.register_forward_pre_hook(lambda module, args: seen.update(mixed=args[0]))
    model(tokens[:, :1])
    assert seen["x"].shape == (3, 1, 2, 8)
    expected = rms_norm(seen["x"], attention.v_norm.weight)
    torch.testing.assert_close(seen["y"], expected, rtol=1e-12, atol=1e-12)
    # The first token attends only to itself, so that its head outputs are its normalized values.
    torch.testing.assert_close(seen["mixed"], expected.flatten(2), rtol=1e-12, atol=1e-12)


def test_relu2_squares_the_positive_part(tokens):
    model = build(NormConfig(), feed_forward="relu2")
    layer, x = model.blocks[0].feed_forward, torch.randn(5, 16, dtype=torch.float64)
    assert layer.up.weight.shape == (64, 16)
    hidden = x @ layer.up.weight.T
    expected = torch.where(hidden > 0, hidden * hidden, 0) @ layer.down.weight.T
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


def test_switches_are_saved_and_loaded():
    norm = NormConfig(v_norm=True, embedding_norm=True)
    assert norm.to_dict() == {
        "normalization": "rmsnorm", "norm_placement": "pre", "norm_eps": 1e-6, "v_norm": True, "embedding_norm": True,
    }  # fmt: skip
    assert NormConfig.from_dict(norm.to_dict()) == norm


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"v_norm": 1}, "v_norm must be True, False or None, got 1"),
        ({"embedding_norm": None}, "embedding_norm must be True or False, got None"),
        ({"v_norm": True, "normalization": "none"}, "v_norm=True needs a normalization"),
        ({"embedding_norm": True, "normalization": "none"}, "embedding_norm=True needs a normalization"),
        ({"v_norm": False, "norm_placement": "hybrid"}, "'hybrid' normalizes queries, keys and values, got v_norm=F"),
    ],
)
def test_bad_switches_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        NormConfig(**values)
