"""Thinker: its formula, causality, gradients, dtypes, state dict, and every refusal."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from omninorm.config import NORMALIZATIONS, PLACEMENTS
from omninorm.errors import InputError
from omninorm.thinker import Thinker

# Every placement with RMSNorm and every norm with pre-norm; the other pairs only in the exhaustive run.
PAIRS = [
    (placement, norm)
    if norm == "rmsnorm" or placement == "pre"
    else pytest.param(placement, norm, marks=pytest.mark.exhaustive)
    for placement in PLACEMENTS
    for norm in NORMALIZATIONS
    if placement != "ngpt" or norm == "rmsnorm"
]


@pytest.mark.parametrize("feed_forward", ["swiglu", "gelu", "relu2"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_placement_computes_and_trains_every_parameter(make, tokens, placement, feed_forward):
    model = make(placement, feed_forward=feed_forward)
    logits = model(tokens)
    assert logits.shape == (3, 20, 40)
    assert logits.dtype == torch.float32
    assert bool(logits.isfinite().all())
    F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not bool(p.grad.abs().sum() > 0)]
    assert silent == []


@pytest.mark.parametrize(("placement", "normalization"), PAIRS)
def test_later_tokens_do_not_change_earlier_logits(make, tokens, placement, normalization):
    model = make(placement, normalization)
    changed = tokens.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % 40
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :12], after[:, :12])
    assert (before[:, 12:] - after[:, 12:]).abs().amax(-1).min() > 1e-5


def test_rows_do_not_see_each_other_but_earlier_tokens_are_seen(make, tokens):
    model = make()
    changed = tokens.clone()
    changed[0, 0] = (changed[0, 0] + 1) % 40
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert torch.equal(before[1:], after[1:])
    assert (before[0] - after[0]).abs().amax(-1).min() > 1e-4


def test_the_model_is_embedding_blocks_norm_and_head(make, tokens):
    """The pre-norm forward, spelled out."""
    for tied in (True, False):
        model = make(tied_head=tied)
        rotation = model.rotary(0, 20)
        x = model.embedding.weight[tokens]
        for block in model.blocks:
            x = x + block.attention(block.around_attention.norm(x), rotation)
            x = x + block.feed_forward(block.around_feed_forward.norm(x))
        head = model.embedding.weight if tied else model.head.weight
        torch.testing.assert_close(model(tokens), model.final_norm.norm(x) @ head.T, rtol=1e-5, atol=1e-5)


def test_the_state_dict_is_readable_and_loads(make, tokens):
    model = make(n_layers=1)
    assert list(model.state_dict()) == [
        "embedding.weight",
        "blocks.0.attention.q.weight",
        "blocks.0.attention.k.weight",
        "blocks.0.attention.v.weight",
        "blocks.0.attention.out.weight",
        "blocks.0.feed_forward.up.weight",
        "blocks.0.feed_forward.down.weight",
        "blocks.0.feed_forward.gate.weight",
        "blocks.0.around_attention.norm.weight",
        "blocks.0.around_feed_forward.norm.weight",
        "final_norm.norm.weight",
        "head.weight",
    ]
    other = Thinker(model.config)
    assert not torch.equal(other(tokens), model(tokens))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(tokens), model(tokens))
    assert torch.equal(copy.deepcopy(model)(tokens), model(tokens))


def test_a_tied_head_has_no_parameter_of_its_own(make):
    assert "head.weight" not in make(tied_head=True).state_dict()


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_bfloat16_by_autocast_and_by_weights(make, tokens, placement):
    model = make(placement)
    exact = model(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens)
    assert logits.dtype == torch.bfloat16
    logits.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    low = copy.deepcopy(model).to(torch.bfloat16)(tokens)
    assert low.dtype == torch.bfloat16
    # bfloat16 has 8 bits: tens of roundings of 2^-9 each, relative to the logits' spread.
    for rounded in (logits, low):
        assert (rounded.float() - exact).square().mean().sqrt() < 0.05 * exact.std()


@pytest.mark.slow
def test_compiled_as_one_graph_the_logits_are_the_same(make, tokens):
    # Without norms: what they need to be compiled is tested with them.
    model = make("none", "none")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(tokens), model(tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_empty_tokens_give_empty_logits(make, shape):
    assert make()(torch.zeros(shape, dtype=torch.int64)).shape == (*shape, 40)


def test_int32_tokens_are_accepted(make, tokens):
    model = make()
    assert torch.equal(model(tokens.int()), model(tokens))


BAD = [
    (torch.zeros(1, 4), "torch.float32"),
    (torch.zeros(1, 4, dtype=torch.uint8), "torch.uint8"),
    (torch.zeros(1, 4, dtype=torch.bool), "torch.bool"),
    (torch.zeros(4).long(), "(4,)"),
    (torch.zeros(1, 2, 3).long(), "(1, 2, 3)"),
    (torch.zeros(1, 25).long(), "25"),
    (torch.tensor([[0, 40]]), "values from 0 to 40"),
    (torch.tensor([[-1, 3]]), "values from -1 to 3"),
    ([[1]], "list"),
]


@pytest.mark.parametrize(("tokens", "received"), BAD)
def test_bad_tokens_are_refused(make, tokens, received):
    with pytest.raises(InputError) as caught:
        make()(tokens)
    assert str(caught.value.received) == received


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_checkpointed_blocks_give_the_same_logits_and_gradients(make, tokens, placement):
    model, checkpointed = make(placement), make(placement)
    for block in checkpointed.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    logits = [each(tokens) for each in (model, checkpointed)]
    assert torch.equal(*logits)
    for each in logits:
        F.cross_entropy(each.flatten(0, 1), tokens.flatten()).backward()
    expected = dict(model.named_parameters())
    for name, parameter in checkpointed.named_parameters():
        assert torch.equal(parameter.grad, expected[name].grad), name
