"""cancel_norms removes a norm exactly if its output's size does not matter, and keeps it otherwise."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import surgery_models as subjects
from torch import Tensor, nn

from omninorm.surgery import cancel_norms, verify

WIDTH, HEAD = 8, 4


class Normed(nn.Module):
    """Attention whose queries, keys and values are normalized, as in Gemma 4, after a norm of the stream.

    Args:
        eps: of all norms.
        kind: of the inner norms.
        bias: of the values.
        change: what else is done with "norm", the first norm's output, or "value", one of its readers'.
    """

    def __init__(self, eps: float = 0.0, kind: Any = nn.RMSNorm, bias: bool = False, change: str = "") -> None:
        super().__init__()
        self.table, self.norm, self.change = nn.Embedding(9, WIDTH), nn.RMSNorm(WIDTH, eps=eps), change
        self.q, self.k = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))
        self.v, self.out = nn.Linear(WIDTH, WIDTH, bias=bias), nn.Linear(WIDTH, WIDTH)
        self.inner = nn.ModuleList(kind(HEAD, eps=eps) for _ in range(3))
        self.last, self.head = nn.RMSNorm(WIDTH, eps=eps), nn.Linear(WIDTH, 9, bias=False)
        for norm in (self.norm, self.last, *self.inner):
            nn.init.uniform_(norm.weight, -1.0, 2.0)

    def forward(self, tokens: Tensor) -> Any:
        x = self.table(tokens)
        h = self.norm(x)
        q, k, v = (layer(h).unflatten(-1, (2, HEAD)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        q, k, n = (norm(each) for norm, each in zip(self.inner, (q, k, v), strict=True))
        y = F.scaled_dot_product_attention(q, k, n + v if self.change == "value" else n)
        x = x + self.out(y.transpose(1, 2).flatten(-2)) + (h if self.change == "norm" else 0)
        logits = self.head(self.last(x))
        return (logits, v) if self.change == "output" else logits


@pytest.mark.parametrize("kind", [nn.RMSNorm, nn.LayerNorm])
def test_norm_before_normalized_projections_is_removed_and_restored(kind: Any) -> None:
    model = Normed(kind=kind).double()
    before = copy.deepcopy(model)
    report = cancel_norms(model)
    assert report.changed == {"norm": "removed before k, q, v, because inner.1, inner.0, inner.2 normalize again"}
    assert report.refused == {}
    assert str(report).startswith("1 norm canceled, maximum relative difference")
    assert report.error <= 1e-13
    assert isinstance(model.norm, nn.Identity)
    assert torch.equal(model.q.weight, before.q.weight * before.norm.weight)
    assert verify(before, model).relative <= 1e-13
    report.undo()
    assert isinstance(model.norm, nn.RMSNorm)
    assert all(torch.equal(value, before.state_dict()[name]) for name, value in model.state_dict().items())


def test_norm_without_a_gain_is_removed() -> None:
    model = Normed().double()
    model.norm = nn.RMSNorm(WIDTH, eps=0.0, elementwise_affine=False)
    before = copy.deepcopy(model)
    assert list(cancel_norms(model).changed) == ["norm"]
    assert verify(before, model).relative <= 1e-13


@pytest.mark.parametrize("change", ["norm", "value", "output"])
def test_norm_whose_output_size_matters_is_kept(change: str) -> None:
    model = Normed(change=change).double()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = cancel_norms(model)
    assert report.changed == report.refused == {}  # no difference needs to be measured
    assert isinstance(model.norm, nn.RMSNorm)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_reader_with_a_bias_keeps_the_norm() -> None:
    report = cancel_norms(Normed(bias=True).double())
    assert report.changed == report.refused == {}


def test_eps_that_matters_is_refused_with_the_difference_and_accepted_within_a_limit() -> None:
    model = Normed(eps=1e-6).double()
    before = copy.deepcopy(model)
    report = cancel_norms(model)
    assert not report.changed
    why = report.refused["norm"]
    assert "the ε of the norms after it matters" in why
    limit = float(why.partition("limit=")[2].split()[0])
    assert 1e-9 < limit < 1e-3
    report = cancel_norms(model, limit=limit)
    assert list(report.changed) == ["norm"]
    assert limit / 10 <= report.error <= limit
    assert verify(before, model).relative == pytest.approx(report.error)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "olmo2", "gpt2"])
def test_models_whose_norms_are_all_needed_are_unchanged(name: str) -> None:
    """Of Qwen3's, values are not normalized again."""
    model = subjects.build(name)
    report = cancel_norms(model)
    assert report.changed == report.refused == {}
