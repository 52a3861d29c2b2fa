"""Random models with branches, shared norms, several outputs, unused parts and tied weights: exact on all paths, or refused."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from omninorm.surgery import center, fold_gains

WIDTH, TOKENS = 6, 9
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
        self.inner = nn.ModuleList(nn.Linear(WIDTH, 5, bias=self.draw.random() < 0.5) for _ in range(count))
        self.gates = nn.ModuleList(nn.Linear(WIDTH, 5) for _ in range(count))
        self.outer = nn.ModuleList(nn.Linear(5, WIDTH) for _ in range(count))
        self.head, self.other = nn.Linear(WIDTH, TOKENS, bias=False), nn.Linear(WIDTH, 2)
        if self.draw.random() < 0.3:
            self.head.weight = self.table.weight
        self.blocks = [self.draw.choice(("plain", "gated", "leaky", "training", "flagged")) for _ in range(count)]
        self.end = self.draw.choice(("one", "two", "features", "flag", "training", "long", "text", "unused"))
        for norm in self.norms:
            for parameter in norm.parameters():
                nn.init.uniform_(parameter, 0.5, 2.0)

    def block(self, number: int, x: Tensor, flag: bool) -> Tensor:
        h, what = self.norms[number](x), self.blocks[number]
        y = self.inner[number](h).tanh()
        if what == "gated" or (what == "training" and self.training) or (what == "flagged" and flag):
            y = y * self.gates[number](h).sigmoid()
        y = self.outer[number](y)
        return x + y + (0.1 * h if what == "leaky" else 0)

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


def check(seed: int) -> tuple[int, int]:
    """Return how many operations changed something, and how many were refused as a whole."""
    changed = refused = 0
    for operation in (fold_gains, center):
        model = Drawn(seed).double().eval()
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
        range(20),
        pytest.param(range(20, 320, 4), marks=pytest.mark.slow),
        pytest.param(range(20, 320), marks=pytest.mark.exhaustive),
    ],
    ids=str,
)
def test_random_models_are_exact_on_all_paths_or_refused(seeds: range) -> None:
    counts = [check(seed) for seed in seeds]
    changed, refused = (sum(each) for each in zip(*counts, strict=True))
    assert changed >= len(counts) // 4
    assert refused >= len(counts) // 8
