"""What the placements refuse, in full: invariant, what was received, and what to do."""

from __future__ import annotations

from collections.abc import Callable

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


REFUSALS: dict[str, tuple[Callable[[], object], str]] = {
    "a dictionary": (
        lambda: block({"norm_placement": "pre"}),
        "a block's norms are described by a NormConfig, got {'norm_placement': 'pre'}; "
        'pass e.g. NormConfig(norm_placement="pre") or NormConfig.from_dict({…})',
    ),
    "no module": (
        lambda: block(attention=torch.sin),
        "attention must be a torch.nn.Module, got a builtin_function_or_method. Wrap it in one, so that its weights train",
    ),
    "no inner norms": (
        lambda: block(NormConfig(norm_placement="reordered")),
        "placement 'reordered' with qk_norm=None needs the norms k, q inside attention, got a Linear without k, q; "
        "build them in and name them in attention.inner_norms",
    ),
    "another shape": (
        lambda: block(attention=nn.Linear(4, 3))(torch.ones(2, 4)),
        "attention must return a tensor of its input's shape (2, 4), got shape (2, 3); "
        "wrap the sublayer so that it returns just that tensor",
    ),
    "a tuple": (
        lambda: block(attention=Pair())(torch.ones(2, 4)),
        "attention must return a tensor of its input's shape (2, 4), got a tuple. Wrap the sublayer so that it returns just that tensor",
    ),
    "two streams": (
        lambda: block()((torch.ones(2, 4), torch.ones(2, 4))),
        "the stream must be a tensor, got a tuple. Pass (..., width) features",
    ),
    "one stream": (
        lambda: block(NormConfig(norm_placement="residual"))(torch.ones(2, 4)),
        "placement 'residual' carries two streams, a pair of tensors, got a Tensor; "
        "begin with omninorm.placement.enter(config, x) and end with FinalNorm(config, width)",
    ),
    "a block too many": (
        lambda: Position(3, 2, "attention"),
        "blocks are counted from 1 to their number, got block 3 of 2. Correct the block's number",
    ),
    "a width of zero": (lambda: block(width=0), "width must be an integer ≥ 1, got 0"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str) -> None:
    call, message = REFUSALS[name]
    with pytest.raises(OmninormError) as caught:
        call()
    assert str(caught.value).startswith(message)


def test_what_is_passed_on_to_the_attention() -> None:
    class Scaled(nn.Module):
        def forward(self, x: torch.Tensor, factor: float, *, shift: float) -> torch.Tensor:
            return factor * x + shift

    config = NormConfig(normalization="none", norm_placement="none")
    made = Block(config, 2, Scaled(), nn.Identity(), block=1, blocks=1)
    assert torch.equal(made(torch.ones(1, 2), 3.0, shift=0.5), torch.full((1, 2), 9.0))
