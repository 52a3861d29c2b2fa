"""Errors for invalid blocks: what must hold, what was received, and what to do."""

from __future__ import annotations

from collections.abc import Callable

import numpy
import pytest
import torch
from torch import nn

from omninorm import Block, NormConfig
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
