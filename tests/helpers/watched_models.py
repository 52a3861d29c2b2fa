"""A small decoder made of plain PyTorch modules, and training loops with and without a watch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omninorm.monitor import Watch, watch

VOCAB, WIDTH, HEADS = 23, 16, 4


class Attention(nn.Module):
    """Causal attention, through scaled_dot_product_attention or an explicit softmax."""

    def __init__(self, kv_heads: int = HEADS, style: str = "sdpa", dropout: float = 0.0) -> None:
        super().__init__()
        self.kv_heads, self.style, self.dropout = kv_heads, style, dropout
        self.q = nn.Linear(WIDTH, WIDTH)
        self.k = nn.Linear(WIDTH, WIDTH // HEADS * kv_heads)
        self.v = nn.Linear(WIDTH, WIDTH // HEADS * kv_heads)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for f in (self.q, self.k, self.v))
        grouped = self.kv_heads != HEADS
        if self.style == "sdpa":
            dropout = self.dropout if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout, mask is None, enable_gqa=grouped)
        else:
            k, v = (z.repeat_interleave(HEADS // self.kv_heads, dim=1) for z in (k, v))
            logits = q @ k.transpose(-1, -2) / math.sqrt(WIDTH // HEADS)
            y = F.softmax(logits + causal_bias(x), dim=-1) @ v
        output: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return output


def causal_bias(x: Tensor) -> Tensor:
    """Return a causal mask as transformers does: the most negative number above the diagonal."""
    length = x.shape[1]
    return torch.full((length, length), torch.finfo(x.dtype).min, dtype=x.dtype).triu(1)


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 3 * WIDTH)
        self.down = nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.up(x).relu())
        return y


class Block(nn.Module):
    """x + attention(N₁(x)), then x + feed_forward(N₂(x))."""

    def __init__(self, norm: Callable[[], nn.Module], dropout: float = 0.0, **attention: Any) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(), norm()
        self.attention, self.feed_forward = Attention(**attention), FeedForward()
        self.dropout = nn.Dropout(dropout)
        self.in_place = False

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        branch = self.dropout(self.attention(self.norm1(x), mask))
        x = x.add_(branch) if self.in_place else x + branch
        branch = self.dropout(self.feed_forward(self.norm2(x)))
        return x.add_(branch) if self.in_place else x + branch


class Decoder(nn.Module):
    def __init__(self, norm: Callable[[], nn.Module] | None = None, blocks: int = 2, **block: Any) -> None:
        super().__init__()
        norm = norm or (lambda: nn.LayerNorm(WIDTH))
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(Block(norm, **block) for _ in range(blocks))
        self.final_norm = norm()
        self.head = nn.Linear(WIDTH, VOCAB)
        self.around: Callable[..., Tensor] = lambda block, x, mask: block(x, mask)  # activation checkpointing

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = self.around(block, x, mask)
        logits: Tensor = self.head(self.final_norm(x))
        return logits


def perturbed(model: nn.Module, scale: float = 0.3) -> nn.Module:
    """Set gains that are not all 1 and biases that are not all 0."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


def some_tokens(step: int, batch: int = 3, length: int = 7, vocab: int = VOCAB) -> Tensor:
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randint(vocab, (batch, length + 1), generator=generator)


def token_loss(model: nn.Module, tokens: Tensor, **inputs: Any) -> Tensor:
    logits = model(tokens[:, :-1], **inputs)
    return F.cross_entropy(logits.flatten(0, -2).float(), tokens[:, 1:].flatten())


def adamw(model: nn.Module, lr: float = 1e-2, **options: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, **options)


Loss = Callable[[nn.Module, int], Tensor]


def tokens_of(model: nn.Module, step: int) -> Tensor:
    return token_loss(model, some_tokens(step))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, loss_of: Loss = tokens_of) -> None:
    """Train without a watch."""
    for step in range(1, steps + 1):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()


def train_watched(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    steps: int,
    loss_of: Loss = tokens_of,
    **options: Any,
) -> Watch:
    """Train with the same loop under a watch without rules."""
    options = {"every": 1, "rules": [], **options}
    with watch(model, optimizer, **options) as watched:
        for step in range(1, steps + 1):
            loss = loss_of(model, step)
            loss.backward()
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()
            watched.step(loss)
    return watched


def signal(watched: Watch, name: str, at: int = -1) -> list[float | None]:
    """Return a signal's values in a sample, by default the latest."""
    assert name in watched.history.samples[at].signals, f"{name} was not seen"
    return list(watched.history.samples[at].signals[name])


def close_to(values: Sequence[float | None], wanted: Sequence[Any], rel: float = 2e-5) -> bool:
    """Return whether numbers are equal up to the rounding of float32, with None in the same places."""
    assert len(values) == len(wanted), f"{len(values)} values, wanted {len(wanted)}"
    for got, want in zip(values, wanted, strict=True):
        if want is None or got is None:
            assert got is None, f"{values} but wanted {wanted}"
            assert want is None, f"{values} but wanted {wanted}"
        else:
            assert math.isclose(got, float(torch.as_tensor(want).detach()), rel_tol=rel, abs_tol=1e-7), (
                f"{values} but wanted {wanted}"
            )
    return True
