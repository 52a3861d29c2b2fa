"""Initialization rules of the newer placements: what the model computes before the first step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from omninorm import NormConfig, Thinker, ThinkerConfig
from omninorm.errors import ConfigError
from omninorm.experiments.optim import build_optimizer
from omninorm.experiments.settings import TrainConfig
from omninorm.placement import Block, normalize_weights
from omninorm.placement.hyper import sinkhorn
from omninorm.placement.ngpt import UnitEmbedding, UnitLinear

TOKENS = torch.randint(0, 30, (2, 9), generator=torch.Generator().manual_seed(0))


def build(placement: str, **norm: object) -> Thinker:
    torch.manual_seed(0)
    settings = NormConfig(norm_placement=placement, **norm)  # type: ignore[arg-type]
    return Thinker(ThinkerConfig(vocab_size=30, d_model=16, n_layers=3, n_heads=2, max_seq_len=9, norm=settings))


def test_x0_starts_as_pre_norm() -> None:
    assert torch.equal(build("x0")(TOKENS), build("pre")(TOKENS))


def test_mhc_with_gate_matrices_of_zero_starts_as_pre_norm() -> None:
    """Then all streams are equal, n/2 times as large at the norm, whose ε no longer matters for embeddings of RMS 1."""
    model, pre = build("mhc").double(), build("pre").double()
    with torch.no_grad():
        for each in (model, pre):
            each.embedding.weight.mul_(4)
        for name, parameter in model.named_parameters():
            if name.endswith("phi"):
                assert 0.01 < parameter.std() < 0.03
                parameter.zero_()
    torch.testing.assert_close(model(TOKENS), pre(TOKENS), rtol=1e-4, atol=1e-4)


def test_sinkhorn_gives_doubly_stochastic_matrices() -> None:
    mix = sinkhorn(torch.randn(50, 4, 4, dtype=torch.float64))
    assert bool((mix > 0).all())
    for dim in (-1, -2):
        torch.testing.assert_close(mix.sum(dim), torch.ones(50, 4, dtype=torch.float64), rtol=1e-5, atol=0)


def test_attention_residual_starts_with_the_mean_of_its_sources() -> None:
    """The queries are 0: the feed-forward of block 1 reads the mean of the embeddings and the attention's output."""
    block = build("attention_residual").blocks[0]
    x = torch.randn(2, 5, 16)
    (branch, _) = block.around_attention((x,), torch.sin)
    read: list[Tensor] = []
    block.around_feed_forward.norm.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    block.around_feed_forward((branch, x), torch.sin)
    torch.testing.assert_close(read[0], (branch + x) / 2)


@pytest.mark.parametrize(("groups", "parts"), [(8, [2, 3, 4, 5, 6, 7]), (3, [2, 2, 3, 3, 4, 4]), (1, [2] * 6)])
def test_residual_groups_bounds_the_tensors_of_the_stream(groups: int, parts: list[int]) -> None:
    counts: list[int] = []
    model = build("attention_residual", residual_groups=groups)
    for block in model.blocks:
        for around in (block.around_attention, block.around_feed_forward):
            around.register_forward_hook(lambda module, args, output: counts.append(len(output)))
    model(TOKENS)
    assert counts == parts


def lengths(model: nn.Module) -> list[Tensor]:
    """The lengths that nGPT keeps at 1, of every matrix."""
    found = [
        module.weight.detach().norm(dim=module.dim if isinstance(module, UnitLinear) else -1)
        for module in model.modules()
        if isinstance(module, (UnitLinear, UnitEmbedding))
    ]
    assert len(found) == 1 + 3 * 7
    return found


def test_ngpt_starts_and_stays_at_unit_length() -> None:
    model = build("ngpt")
    optimizer = build_optimizer(model, TrainConfig(lr=0.1))
    for _ in range(3):
        for length in lengths(model):
            torch.testing.assert_close(length, torch.ones_like(length), rtol=0, atol=1e-5)
        model(TOKENS).square().mean().backward()
        before = model.blocks[0].attention.q.weight.clone()
        optimizer.step()
        assert (model.blocks[0].attention.q.weight - before).abs().max() > 0.05


def test_the_stream_of_ngpt_has_unit_length_and_alpha_starts_at_a_twentieth() -> None:
    model = build("ngpt")
    streams: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, output: streams.append(output))
        torch.testing.assert_close(block.around_attention.alpha(), torch.full((16,), 0.05))
    model(TOKENS)
    assert len(streams) == 3
    for stream in streams:
        torch.testing.assert_close(stream.norm(dim=-1), torch.ones(2, 9), rtol=0, atol=1e-5)


def test_normalize_weights_changes_lengths_but_not_logits() -> None:
    model = build("ngpt")
    logits = model(TOKENS)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (UnitLinear, UnitEmbedding)):
                module.weight.mul_(3.0)
    torch.testing.assert_close(model(TOKENS), logits, rtol=1e-4, atol=1e-5)
    normalize_weights(model)
    for length in lengths(model):
        torch.testing.assert_close(length, torch.ones_like(length), rtol=0, atol=1e-5)


def test_blocks_of_ngpt_need_sublayers_with_matrices_of_unit_length() -> None:
    plain = nn.Linear(4, 4)
    with pytest.raises(ConfigError, match=r"'ngpt' .* needs the norms unit inside attention, got a Linear without"):
        Block(NormConfig(norm_placement="ngpt"), 4, plain, plain, block=1, blocks=1)
