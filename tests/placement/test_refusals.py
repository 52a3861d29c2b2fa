"""Errors for invalid blocks: what must hold, what was received, and what to do."""

from __future__ import annotations

from collections.abc import Callable

import numpy
import pytest
import torch
from torch import nn

from omninorm import Block, NormConfig, ThinkerConfig
from omninorm.errors import OmninormError
from omninorm.placement import Position

PRE = NormConfig()


class Pair(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x, x


def block(config: object = PRE, attention: object = None, width: object = 4) -> Block:
    return Block(config, width, attention or nn.Linear(4, 4), nn.Linear(4, 4), block=1, blocks=2)  # type: ignore[arg-type]


# Call, and what the error must contain: in what must hold, what was received, and what to do.
REFUSALS: dict[str, tuple[Callable[[], object], str, str, str]] = {
    "a dictionary": (
        lambda: block({"norm_placement": "pre"}),
        "NormConfig", "{'norm_placement': 'pre'}", 'NormConfig(norm_placement="pre")',
    ),
    "no module": (
        lambda: block(attention=torch.sin),
        "attention must be a torch.nn.Module", "a builtin_function_or_method", "wrap it",
    ),
    "no inner norms": (
        lambda: block(NormConfig(norm_placement="reordered")),
        "'reordered' with qk_norm=None needs the norms k, q inside attention", "a Linear without k, q", "inner_norms",
    ),
    "another shape": (
        lambda: block(attention=nn.Linear(4, 3))(torch.ones(2, 4)),
        "attention must return a tensor of its input's shape (2, 4)", "shape (2, 3)", "wrap the sublayer",
    ),
    "a tuple": (
        lambda: block(attention=Pair())(torch.ones(2, 4)),
        "attention must return a tensor of its input's shape (2, 4)", "a tuple", "wrap the sublayer",
    ),
    "two streams": (
        lambda: block()((torch.ones(2, 4), torch.ones(2, 4))),
        "stream must be a tensor", "a tuple", "(..., width)",
    ),
    "one stream": (
        lambda: block(NormConfig(norm_placement="residual"))(torch.ones(2, 4)),
        "'residual' must be a pair of tensors", "a Tensor", "omninorm.placement.enter(config, x)",
    ),
    "one stream where x0 needs the embeddings too": (
        lambda: block(NormConfig(norm_placement="x0"))(torch.ones(2, 4)),
        "'x0' must be a pair of tensors", "a Tensor", "omninorm.placement.enter(config, x)",
    ),
    "streams of the wrong number": (
        lambda: block(NormConfig(norm_placement="mhc"))(torch.ones(2, 3, 4)),
        "'mhc' must be a tensor of shape (..., 4, 4)", "shape (2, 3, 4)", "omninorm.placement.enter(config, x)",
    ),
    "streams of another width": (
        lambda: block(NormConfig(norm_placement="hyper", streams=2))(torch.ones(7, 2, 5)),
        "'hyper' must be a tensor of shape (..., 2, 4)", "shape (7, 2, 5)", "omninorm.placement.enter(config, x)",
    ),
    "no streams": (
        lambda: block(NormConfig(norm_placement="hyper"))(None),
        "'hyper' must be a tensor of shape (..., 4, 4)", "a NoneType", "omninorm.placement.enter(config, x)",
    ),
    "too many groups": (
        lambda: block(NormConfig(norm_placement="attention_residual"))((torch.ones(2, 4), torch.ones(2, 4))),
        "'attention_residual' must be a tuple of 1 tensor here", "2 tensors", "omninorm.placement.enter(config, x)",
    ),
    "no group": (
        lambda: block(NormConfig(norm_placement="attention_residual"))(torch.ones(2, 4)),
        "'attention_residual' must be a tuple of 1 tensor here", "a Tensor", "omninorm.placement.enter(config, x)",
    ),
    "a single stream": (
        lambda: NormConfig(norm_placement="mhc", streams=1), "streams must be an integer ≥ 2", "1", "2 or more",
    ),
    "streams without a placement that has them": (
        lambda: NormConfig(streams=2),
        "streams can only be set for placements 'mhc' and 'hyper'", "streams=2 with norm_placement='pre'", "leave it out",
    ),
    "a gate rank of zero": (
        lambda: NormConfig(norm_placement="hyper", gate_rank=0), "gate_rank must be an integer ≥ 1", "0", "1 or more",
    ),
    "groups without a placement that has them": (
        lambda: NormConfig(residual_groups=2),
        "residual_groups can only be set for placement 'attention_residual'",
        "residual_groups=2 with norm_placement='pre'", "leave it out",
    ),
    "another norm for ngpt": (
        lambda: NormConfig("layernorm", "ngpt"),
        "'ngpt' gives the stream, queries, keys and matrices unit length by itself", "normalization='layernorm'",
        "leave normalization out",
    ),
    "qk-norm for ngpt": (
        lambda: NormConfig(norm_placement="ngpt", qk_norm=False),
        "'ngpt' gives the stream, queries, keys and matrices unit length by itself", "qk_norm=False", "leave qk_norm out",
    ),
    "scaled initialization for ngpt": (
        lambda: ThinkerConfig(norm=NormConfig(norm_placement="ngpt"), scaled_init=True),
        "'ngpt' gives every matrix unit length and excludes scaled_init", "scaled_init=True", "scaled_init=False",
    ),
    "a block too many": (
        lambda: Position(3, 2, "attention"),
        "block must be between 1 and the number of blocks, 2", "block 3", "counted from 1",
    ),
    "a width of zero": (lambda: block(width=0), "width must be an integer ≥ 1", "0", "an integer"),
    "a width that is a float": (lambda: block(width=4.0), "width must be an integer ≥ 1", "4.0", "an integer"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_bad_blocks_are_refused_with_name_value_and_remedy(name: str) -> None:
    call, invariant, received, remedy = REFUSALS[name]
    with pytest.raises(OmninormError) as caught:
        call()
    assert invariant in caught.value.invariant
    assert str(caught.value.received) == received
    assert remedy in caught.value.remedy


def test_numpy_integers_and_0d_tensors_are_accepted() -> None:
    made = Block(PRE, numpy.int64(4), nn.Linear(4, 4), nn.Linear(4, 4), block=torch.tensor(1), blocks=numpy.int32(2))  # type: ignore[arg-type]
    assert made(torch.ones(2, 4)).shape == (2, 4)
    position = Position(numpy.int64(1), torch.tensor(2), "attention")  # type: ignore[arg-type]
    assert (type(position.block), type(position.blocks)) == (int, int)


def test_extra_arguments_are_passed_to_the_attention() -> None:
    class Scaled(nn.Module):
        def forward(self, x: torch.Tensor, factor: float, *, shift: float) -> torch.Tensor:
            return factor * x + shift

    config = NormConfig(normalization="none", norm_placement="none")
    made = Block(config, 2, Scaled(), nn.Identity(), block=1, blocks=1)
    assert torch.equal(made(torch.ones(1, 2), 3.0, shift=0.5), torch.full((1, 2), 9.0))
