"""Random models with branches, heads, shared norms, several outputs, unused parts and tied weights: exact on all paths,
or refused."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omninorm.surgery import Surgery, cancel_norms, center, fold_gains, rotate

WIDTH, TOKENS = 6, 9
ENDS = ("one", "one", "two", "features", "flag", "training", "long", "text", "unused")
BLOCKS = (
    "plain",
    "gated",
    "leaky",
    "training",
    "flagged",
    "heads",
    "fused",
    "scaled",
    "sliced",
    "buffered",
    "sorted",
    "again",
)
IDS = torch.arange(8).view(2, 4) % TOKENS


class Drawn(nn.Module):
    """A stream to which blocks add; each block and the end do something drawn from `seed`."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.draw = random.Random(seed)
        kind = self.draw.choice((nn.LayerNorm, nn.RMSNorm))
        self.table = nn.Embedding(TOKENS, WIDTH)
        shared = kind(WIDTH) if self.draw.random() < 0.2 else None
        count = self.draw.randint(1, 3)
        self.norms = nn.ModuleList(shared or kind(WIDTH) for _ in range(count + 1))
        self.blocks = [self.draw.choice(BLOCKS) for _ in range(count)]
        self.end = self.draw.choice(ENDS)
        self.inner, self.gates, self.values, self.outer, self.again = (nn.ModuleDict() for _ in range(5))
        self.scales = nn.ParameterDict()
        for number, what in enumerate(self.blocks):
            self.add_block(str(number), what)
        self.register_buffer("shift", torch.randn(WIDTH))
        self.head = nn.Linear(WIDTH, TOKENS, bias=False)
        self.other = None if self.end in ("one", "features") else nn.Linear(WIDTH, 2)
        if self.draw.random() < 0.3:
            self.head.weight = self.table.weight
        for norm in self.norms:
            for parameter in norm.parameters():
                nn.init.uniform_(parameter, 0.5, 2.0)

    def add_block(self, name: str, what: str) -> None:
        biased = self.draw.random() < 0.5
        if what in ("heads", "fused"):
            self.values[name] = nn.Linear(WIDTH, 6 if what == "fused" else 4, bias=biased)
            self.outer[name] = nn.Linear(4, WIDTH)
            return
        self.inner[name], self.outer[name] = nn.Linear(WIDTH, 5, bias=biased), nn.Linear(5, WIDTH)
        if what in ("gated", "training", "flagged"):
            self.gates[name] = nn.Linear(WIDTH, 5)
        if what == "again":
            self.again[name] = nn.RMSNorm(5, eps=0.0)
        if what == "scaled":
            self.scales[name] = nn.Parameter(torch.rand(WIDTH))

    def block(self, number: int, x: Tensor, flag: bool) -> Tensor:
        h, what, name = self.norms[number](x), self.blocks[number], str(number)
        if what in ("heads", "fused"):
            return x + self.outer[name](mixed(self.values[name](h), fused=what == "fused"))
        if what == "sliced":
            h = torch.cat([h[..., 3:], h[..., :3].tanh()], -1)
        if what == "sorted":
            h = h.flip(-1)
        y = (self.again[name](self.inner[name](h)) if what == "again" else self.inner[name](h)).tanh()
        if what == "gated" or (what == "training" and self.training) or (what == "flagged" and flag):
            y = y * self.gates[name](h).sigmoid()
        y = self.outer[name](y)
        if what == "scaled":
            y = y * self.scales[name]
        return x + y + (0.1 * h if what == "leaky" else self.shift if what == "buffered" else 0)

    def forward(self, ids: Tensor, flag: bool = False, text: str = "") -> Any:
        x = self.table(ids)
        for number in range(len(self.blocks)):
            x = self.block(number, x, flag)
        h = self.norms[-1](x)
        takes_other = {"flag": flag, "training": self.training, "long": ids.shape[1] > 30, "text": text == "other"}
        if self.end == "two":
            return self.head(h), {"pooled": self.other(h.mean(1))}
        if self.end == "features":
            return self.head(h), h
        return self.other(h) if takes_other.get(self.end) else self.head(h)


def mixed(v: Tensor, fused: bool) -> Tensor:
    """Attention with values of two heads; if fused, with queries and keys from the same matrix."""
    q, v = (v[..., :2], v[..., 2:]) if fused else (v.new_ones(*v.shape[:-1], 2), v)
    v = v.unflatten(-1, (2, 2)).transpose(1, 2)
    q = q[:, None].expand_as(v)
    return F.scaled_dot_product_attention(q, q, v, is_causal=True).transpose(1, 2).flatten(-2)


def paths(model: Drawn) -> list[Tensor]:
    """The outputs on every path."""
    found: list[Tensor] = []
    for training in (False, True):
        model.train(training)
        for ids in (IDS, IDS.repeat(1, 10)):
            for flag in (False, True):
                for text in ("", "other"):
                    with torch.no_grad():
                        y = model(ids, flag, text)
                    found += [y[0], y[1]["pooled"] if isinstance(y[1], dict) else y[1]] if isinstance(y, tuple) else [y]
    model.eval()
    return found


def turn(model: Drawn) -> Surgery:
    """Rotate; a Hadamard matrix has no width of 6."""
    return rotate(model, kind="random")


def turn_centered(model: Drawn) -> Surgery:
    """Rotate a model that `center` has changed first."""
    return turn(model)


def check(seed: int) -> tuple[int, int]:
    """Return how many operations changed something, and how many were refused as a whole."""
    changed = refused = 0
    for operation in (fold_gains, center, turn, turn_centered, cancel_norms):
        model = Drawn(seed).double().eval()
        if operation is turn_centered:
            center(model)
        before = copy.deepcopy(model)
        report = operation(model)
        for a, b in zip(paths(before), paths(model), strict=True):
            assert float((a - b).abs().max()) <= 1e-10 * max(1.0, float(a.abs().max())), (
                seed,
                operation,
                report.changed,
            )
        changed, refused = changed + bool(report.changed), refused + (not report.changed)
        report.undo()
        assert all(torch.equal(a, b) for a, b in zip(paths(before), paths(model), strict=True)), seed
    return changed, refused


@pytest.mark.parametrize(
    "seeds",
    [
        range(5),
        pytest.param(range(20, 320, 6), marks=pytest.mark.slow),
        pytest.param(range(20, 320), marks=pytest.mark.exhaustive),
    ],
    ids=str,
)
def test_random_models_are_exact_on_all_paths_or_refused(seeds: range) -> None:
    counts = [check(seed) for seed in seeds]
    changed, refused = (sum(each) for each in zip(*counts, strict=True))
    assert changed >= len(counts)
    assert refused >= len(counts) // 2
