"""attention-not-causal: a language model whose attention sees the tokens that it should predict."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers.histories import facts, numbers_in
from torch import Tensor, nn

from omninorm.monitor import Alarm, History, Sample, watch
from omninorm.monitor.rules.attention_not_causal import AttentionNotCausal

pytestmark = pytest.mark.usefixtures("words")
WIDTH, LENGTH, WORDS = 16, 12, 11
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def unmasked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def by_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v


def by_masked_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    hidden = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).triu(1)
    return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(hidden, float("-inf")).softmax(-1) @ v


def by_zeros_after_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    seen = torch.ones(q.shape[-2], k.shape[-2]).tril()
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) * seen
    return weights / weights.sum(-1, keepdim=True) @ v


def by_filled_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    hidden = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).triu(1)
    return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1).masked_fill(hidden, 0.0) @ v


def with_dropout(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout((q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1), 0.2) @ v


def by_large_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    hidden = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).triu(1)
    return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(hidden, -1e4).softmax(-1) @ v


def by_additive_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.full((LENGTH, LENGTH), -1e4).triu(1))


def with_cross_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention over as many other items as tokens follows the causal one."""
    return causal(q, k, v) + unmasked(q, torch.ones_like(k), torch.ones_like(v))


def with_features(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Linear attention takes the softmax over features, here as many as tokens."""
    features = F.linear(q, torch.ones(LENGTH, q.shape[-1])).softmax(-1)
    return causal(q, k, v) + 0.0 * features.sum()


def by_prefix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The first four tokens see each other, and the others see what came before."""
    seen = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    seen[:4, :4] = True
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)


class Block(nn.Module):
    def __init__(self, attend: Attend | None) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True) if attend is None else None
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))
        self.attend = attend

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        if self.attention is not None:
            return x + self.attention(y, y, y, need_weights=False)[0]
        assert self.attend is not None
        q, k, v = self.qkv(y).unflatten(-1, (3, 2, WIDTH // 2)).permute(2, 0, 3, 1, 4)
        x = x + self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Decoder(nn.Module):
    def __init__(self, *attends: Attend | None) -> None:
        super().__init__()
        self.wte, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS)
        self.h = nn.ModuleList([Block(attend) for attend in attends])

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens)
        for block in self.h:
            x = block(x)
        y: Tensor = self.head(x)
        return y


def next_tokens(logits: Tensor, ids: Tensor) -> Tensor:
    """As nanoGPT: the model reads all but the last token."""
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def shifted(logits: Tensor, ids: Tensor) -> Tensor:
    """The last of as many labels as tokens is ignored, and so are those of a prompt."""
    labels = F.pad(ids[:, 1:], (0, 1), value=-100)
    labels[:, :3] = -100
    return F.cross_entropy(logits.transpose(1, 2), labels)


def one_fewer(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def same_tokens(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), ids.flatten())


def train(loss: Callable[[Tensor, Tensor], Tensor], *attends: Attend | None) -> list[Alarm]:
    torch.manual_seed(0)
    model = Decoder(*attends)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    with watch(model, optimizer, every=2) as watched:
        for _ in range(4):
            ids = torch.randint(0, WORDS, (3, LENGTH + (loss is next_tokens)))
            value = loss(model(ids[:, :LENGTH]), ids)
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
            watched.step(value.detach())
    return [alarm for alarm in watched.alarms if alarm.rule == "attention-not-causal"]


@pytest.mark.parametrize("loss", [next_tokens, shifted, one_fewer])
@pytest.mark.parametrize("attend", [unmasked, by_softmax, with_dropout, None])
def test_block_without_a_causal_mask_is_named(attend: Attend | None, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    (alarm,) = train(loss, causal, attend, by_masked_softmax)
    assert (alarm.severity, alarm.step) == ("warn", 2)
    assert alarm.layer is not None
    assert alarm.layer.startswith("h.1")
    assert numbers_in(alarm.evidence.partition(alarm.layer)[2]) == [100]


@pytest.mark.parametrize(
    "attend",
    [
        causal,
        by_masked_softmax,
        by_prefix,
        by_large_mask,
        by_additive_mask,
        with_cross_attention,
        with_features,
        by_zeros_after_softmax,
        by_filled_softmax,
    ],
)
def test_masked_attention_is_silent(attend: Attend) -> None:
    assert train(shifted, attend, attend) == []


def test_labels_that_are_not_the_next_tokens_may_be_seen() -> None:
    assert train(same_tokens, by_softmax, unmasked) == []


def test_labels_of_another_watched_model_do_not_count() -> None:
    """A text encoder that reads the same tokens as a language model sees all of them."""
    torch.manual_seed(0)
    decoder, encoder = Decoder(causal, causal), Decoder(unmasked, unmasked)
    with watch(decoder, every=1) as first, watch(encoder, every=1) as second:
        for _ in range(3):
            ids = torch.randint(0, WORDS, (3, LENGTH))
            logits, features = decoder(ids), encoder(ids)
            value = one_fewer(logits, ids) + features.square().mean()
            value.backward()
            first.step(value.detach())
            second.step(value.detach())
    assert not [alarm for alarm in (*first.alarms, *second.alarms) if alarm.rule == "attention-not-causal"]
    assert first.history.samples[-1].next_tokens == 1.0
    assert second.history.samples[-1].next_tokens is None


@pytest.mark.parametrize(
    ("share", "visible", "chains", "severities"),
    [
        (0.99, 0.5, (), ["warn"]), (0.98, 0.5, (), []), (None, 1.0, (), []), (1.0, 0.49, (), []),
        (1.0, None, (), []), (1.0, 1.0, ((0, 1), (2, 3)), []),
    ],
)  # fmt: skip
def test_next_tokens_that_half_of_the_pairs_see_are_reported_in_a_single_stack(
    share: float | None, visible: float | None, chains: tuple[tuple[int, ...], ...], severities: list[str]
) -> None:
    rule, history = AttentionNotCausal(), History(facts=facts(4, chains=chains))
    for step in (1, 10):
        history.samples.append(Sample(step, {}, next_tokens=share, visible_future=[0.0, None, visible, 0.0]))
        found = list(rule.on_sample(history, history.samples[-1]))
        assert [alarm.severity for alarm in found] == (severities if step == 10 else [])
