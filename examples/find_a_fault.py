"""Find out why a small GPT stops learning: the original run, and the run after the fix.

python examples/find_a_fault.py [FOLDER]        # needs pip install "omninorm[train]" for its text
"""

import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import omninorm
from omninorm.experiments.corpus import load_corpus

BATCH, LENGTH, WIDTH, HEADS, STEPS = 12, 64, 64, 4, 160


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.qkv, self.proj = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.ln_2 = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def attention(self, x: Tensor, window: int = LENGTH) -> Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        visible = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril().triu(1 - window)
        return self.proj(F.scaled_dot_product_attention(q, k, v, visible).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class LocalBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = self.attention(self.ln_1(x), window=8)
        return x + self.mlp(self.ln_2(x))


class FixedLocalBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.ln_1(x), window=8)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, local_block: type[Block]) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(256, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.h = nn.Sequential(Block(), Block(), Block(), local_block(), Block(), Block())
        self.ln_f, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256, bias=False)
        self.head.weight = self.wte.weight
        for weight in self.parameters():
            if weight.dim() > 1:
                nn.init.normal_(weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.ln_f(self.h(self.wte(tokens) + self.wpe.weight[: tokens.shape[1]])))


def main(folder: Path) -> None:
    text = torch.frombuffer(bytearray(load_corpus().train), dtype=torch.uint8)
    pieces = text.unfold(0, LENGTH + 1, 1)
    for name, local_block in (("stalled", LocalBlock), ("fixed", FixedLocalBlock)):
        torch.manual_seed(0)
        model = GPT(local_block)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95))
        with omninorm.watch(model, optimizer, every=10, folder=folder / name) as w:
            for step in range(1, STEPS + 1):
                batch = pieces[torch.randint(len(pieces), (BATCH,))].long()
                loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                w.step(loss)
                if step % 40 == 0:
                    print(f"{name}, step {step}: loss {loss.item():.2f}")
        print(f"report: {w.report(folder / name / 'report.html')}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()))
