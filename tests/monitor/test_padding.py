"""Padding does not count: rows that the attention mask hides, and rows of zeros."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.watched_models import VOCAB, WIDTH, Decoder, close_to, perturbed, signal
from torch import Tensor, nn

from omninorm.layers import LayerNorm, RMSNorm
from omninorm.monitor import Watch, watch
from omninorm.monitor.probes.padding import Padding

EPS = 1e-2
LENGTHS = torch.tensor([7, 2, 4])
COUNTS = torch.arange(7) < LENGTHS[:, None]
NORMS: dict[str, Any] = {
    "RMSNorm": lambda: nn.RMSNorm(WIDTH, eps=EPS),
    "LayerNorm": lambda: nn.LayerNorm(WIDTH, eps=EPS),
    "omninorm RMSNorm": lambda: RMSNorm(WIDTH, eps=EPS),
    "omninorm LayerNorm": lambda: LayerNorm(WIDTH, eps=EPS),
}


class Padded(Decoder):
    """A decoder that is given the mask as transformers' models are; padding has a zero embedding."""

    def __init__(self, norm: Any, zero: bool) -> None:
        super().__init__(norm)
        perturbed(self)
        self.embedding = nn.Embedding(VOCAB, WIDTH, padding_idx=0 if zero else None)

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return super().forward(tokens)


def watched_once(model: nn.Module, **inputs: Any) -> tuple[Watch, dict[str, tuple[Tensor, Tensor]]]:
    """Return a watch of one step, and the inputs and outputs of the blocks and norms."""
    torch.manual_seed(4)
    tokens = torch.randint(1, VOCAB, COUNTS.shape) * COUNTS
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for name, module in model.named_modules():
        module.register_forward_hook(
            lambda module, args, y, name=name: seen.update({name: (args[0].detach().clone(), y.detach().clone())})
        )
    with watch(model, every=1, rules=[]) as watched:
        logits = model(tokens, **inputs)
        logits[COUNTS].logsumexp(-1).mean().backward()
        watched.step()
    return watched, seen


def eps_share(x: Tensor, centred: bool) -> Tensor:
    rows = x.double()
    square = rows.var(-1, correction=0) if centred else rows.square().mean(-1)
    return (EPS / (square + EPS)).mean()


@pytest.mark.parametrize("kind", NORMS)
def test_rows_of_zeros_do_not_count(kind: str) -> None:
    watched, seen = watched_once(Padded(NORMS[kind], zero=True))
    x = seen["blocks.0.norm1"][0]
    assert not x[~COUNTS].any()
    close_to(signal(watched, "eps_share")[:1], [eps_share(x[COUNTS], "LayerNorm" in kind)])
    close_to(signal(watched, "norm_rms")[:1], [x[COUNTS].double().square().mean().sqrt()])
    assert watched.history.padding == "zero rows"


@pytest.mark.parametrize("kind", NORMS)
def test_masked_tokens_do_not_count(kind: str) -> None:
    watched, seen = watched_once(Padded(NORMS[kind], zero=False), attention_mask=COUNTS.long())
    names = ["blocks.0.norm1", "blocks.0.norm2", "blocks.1.norm1", "blocks.1.norm2", "final_norm"]
    rows = [seen[name][0][COUNTS] for name in names]
    close_to(signal(watched, "eps_share"), [eps_share(x, "LayerNorm" in kind) for x in rows])
    outputs = [seen[f"blocks.{at}"] for at in (0, 1)]
    close_to(signal(watched, "stream_rms"), [y[COUNTS].square().mean().sqrt() for _, y in outputs])
    close_to(signal(watched, "stream_median"), [y[COUNTS].abs().median() for _, y in outputs])
    ratios = [((y - x)[COUNTS].square().mean() / x[COUNTS].square().mean()).sqrt() for x, y in outputs]
    close_to(signal(watched, "branch_ratio"), ratios)
    attended = [seen[f"blocks.{at}.attention"][1][COUNTS].square().mean() for at in (0, 1)]
    of_input = [x[COUNTS].square().mean() for x, _ in outputs]
    close_to(signal(watched, "attention_ratio"), [(a / b).sqrt() for a, b in zip(attended, of_input, strict=True)])
    assert watched.history.padding == "attention mask"
    (event,) = [event for event in watched.record if event["kind"] == "seen"]
    assert event["padding"] == "attention mask"


def test_all_rows_count_without_padding() -> None:
    watched, seen = watched_once(Padded(NORMS["RMSNorm"], zero=False))
    close_to(signal(watched, "eps_share")[:1], [eps_share(seen["blocks.0.norm1"][0], False)])
    assert watched.history.padding is None


def test_input_of_zeros_alone_counts() -> None:
    """Otherwise a stream that has vanished would look healthy."""
    model = Padded(NORMS["RMSNorm"], zero=False)
    nn.init.zeros_(model.embedding.weight)
    watched, _ = watched_once(model)
    close_to(signal(watched, "eps_share")[:1], [1.0])


def test_mask_fits_several_layouts() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> None: ...

    padding = Padding(Model())
    padding.read((torch.zeros(3, 7), COUNTS), {})
    flat = COUNTS.reshape(-1)
    assert torch.equal(padding.rows((3, 7)), flat)
    assert torch.equal(padding.rows((3, 7, 2)), flat.repeat_interleave(2))
    assert torch.equal(padding.rows((3, 2, 7)), COUNTS.unsqueeze(1).expand(3, 2, 7).reshape(-1))
    assert torch.equal(padding.rows((21,)), flat)
    assert torch.equal(padding.rows((7, 3), batch_dim=1), COUNTS.T.reshape(-1))
    assert padding.rows((3, 8)) is None
    padding.read((), {"attention_mask": torch.zeros(3, 1, 7, 7)})
    assert padding.rows((3, 7)) is None
    padding.read((), {"src_key_padding_mask": ~COUNTS})
    assert torch.equal(padding.rows((3, 7)), flat)
    padding.clear()
    assert padding.rows((3, 7)) is None


class Masked(nn.Module):
    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> None: ...


def counted(x: Tensor, mask: Tensor, **inputs: Tensor) -> Tensor | None:
    """Return which rows (batch, length) count by a mask."""
    padding = Padding(Masked())
    padding.read((x,), {"attention_mask": mask, **inputs})
    rows = padding.rows(x.shape[:2])
    return None if rows is None else rows.reshape(x.shape[:2])


def test_mask_that_is_added_to_the_logits_hides_negative_tokens() -> None:
    x = torch.zeros(3, 7)
    for low in (-torch.inf, torch.finfo(torch.float32).min, -1e4):
        assert torch.equal(counted(x, torch.zeros(3, 7).masked_fill(~COUNTS, low)), COUNTS)
    assert torch.equal(counted(x, COUNTS.float()), COUNTS)  # it is multiplied
    assert bool(counted(x, torch.zeros(3, 7)).all())


def test_mask_of_another_shape_than_the_input_is_no_padding() -> None:
    causal = torch.ones(7, 7).tril()
    assert counted(torch.zeros(3, 7), causal) is None
    padding = Padding(Masked())
    padding.read((torch.zeros(3, 7),), {"attention_mask": causal})
    assert padding.rows((7, 7)) is None  # a tensor inside the model
    ids = torch.ones(3, 7, dtype=torch.long)
    assert torch.equal(counted(torch.zeros(3, 7, 2), COUNTS, input_ids=ids), COUNTS)


def test_causal_mask_of_a_square_batch_is_no_padding() -> None:
    x, causal = torch.zeros(7, 7), torch.ones(7, 7, dtype=torch.bool).tril()
    for mask in (causal, causal.float(), torch.zeros(7, 7).masked_fill(~causal, -torch.inf)):
        assert bool(counted(x, mask).all())
    padded = torch.arange(7) < torch.tensor([7, 2, 4, 7, 5, 6, 1])[:, None]
    assert torch.equal(counted(x, padded), padded)


class Refusing(Tensor):
    """A mask that raises an error in each operator."""

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{function} was called")


def test_mask_is_read_only_when_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    padding = Padding(Masked())
    padding.read((torch.zeros(3, 7), torch.Tensor._make_subclass(Refusing, torch.ones(3, 7))), {})
    with pytest.raises(AssertionError, match="aten"):
        padding.rows((3, 7))
    steps, read = [], Padding.read
    monkeypatch.setattr(Padding, "read", lambda self, *given: steps.append(1) or read(self, *given))
    model = Padded(NORMS["RMSNorm"], zero=False)
    with watch(model, every=4, rules=[]) as watched:
        for step in range(1, 6):
            with torch.no_grad():
                model(COUNTS.long(), COUNTS)
            loss = model(COUNTS.long(), COUNTS).mean()
            assert watched._hooks.padding._given == {}, step
            loss.backward()
            watched.step(loss)
    assert len(steps) == len(watched.history.samples)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_and_sparse_masks_are_no_padding() -> None:
    nested = torch.nested.nested_tensor([torch.ones(length) for length in LENGTHS.tolist()])
    assert counted(torch.zeros(3, 7), nested) is None
    assert counted(torch.zeros(3, 7), torch.ones(3, 7).to_sparse()) is None
    model = Padded(NORMS["RMSNorm"], zero=False)
    with watch(model, every=1, rules=[]), torch.no_grad():
        model(COUNTS.long(), nested)  # an evaluation
