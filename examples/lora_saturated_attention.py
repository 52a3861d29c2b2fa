"""Train LoRA on models with qk-norm whose attention logits are ordinary, as large as Gemma 4's, and twice as large.

python examples/lora_saturated_attention.py [FOLDER]        # needs pip install "omninorm[train]" for its text
"""

import sys
import tempfile
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import omninorm
from omninorm.experiments.corpus import load_corpus

BATCH, LENGTH, WIDTH, RANK, STEPS, LEARNING_RATE = 8, 64, 64, 8, 120, 0.003


class Block(nn.Module):
    """Queries and keys have RMS 1, so random logits have a standard deviation of scale × √(width of a head)."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.norm_1, self.norm_2, self.q_norm, self.k_norm = (nn.RMSNorm(WIDTH) for _ in range(4))
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.scale, self.mlp = scale, nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm_1(x)
        q, k, v = (part(h).unflatten(-1, (1, WIDTH)).transpose(1, 2) for part in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, is_causal=True, scale=self.scale)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm_2(x))


class LoRA(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.a = base, nn.Linear(base.in_features, RANK, bias=False)
        self.b = nn.Linear(RANK, base.out_features, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2 * self.b(self.a(x))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, text: Tensor, steps: int, after_step=lambda loss: None):
    pieces = text.unfold(0, LENGTH + 1, 1)
    for _ in range(steps):
        batch = pieces[torch.randint(len(pieces), (BATCH,))].long()
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        after_step(loss)


def main(folder: Path) -> None:
    text = torch.frombuffer(bytearray(load_corpus().train), dtype=torch.uint8)
    for deviation in (1, 16, 32):
        torch.manual_seed(0)
        blocks = [Block(deviation / WIDTH**0.5) for _ in range(4)]
        model = nn.Sequential(nn.Embedding(256, WIDTH), *blocks, nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 256))
        train(model, torch.optim.AdamW(model.parameters(), lr=3e-3), text, 200)
        model.requires_grad_(False)
        for block in blocks:
            block.q, block.k, block.v, block.o = LoRA(block.q), LoRA(block.k), LoRA(block.v), LoRA(block.o)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
        with omninorm.watch(model, optimizer, every=5, folder=folder / f"logits-{deviation}") as w:
            train(model, optimizer, text.flip(0), STEPS, w.step)
        losses, norms = zip(*((step.loss, step.grad_norm) for step in w.history.steps), strict=True)
        alarms = ", ".join(f"{alarm.rule} at step {alarm.step}" for alarm in w.alarms) or "no alarm"
        gradients = f"gradient norm at most {max(norms):.2f}, median {median(norms):.2f}"
        print(f"logits {deviation}: loss {sum(losses[-10:]) / 10:.2f}, {gradients}, {alarms}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()))
