"""Monitor a plain PyTorch loop; the three added lines are marked with "watch".

python examples/watch_loop.py [FOLDER]        # needs pip install "omninorm[train]" for its text
"""

import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import omninorm
from omninorm.experiments.corpus import load_corpus

BATCH, LENGTH, WIDTH, STEPS = 8, 64, 64, 100


class Model(nn.Module):
    """A transformer that predicts the next byte; any torch.nn.Module works."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, WIDTH), nn.Embedding(LENGTH, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 4, norm=nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        h = self.bytes(x) + self.places(torch.arange(x.shape[1]))
        return self.head(self.blocks(h, mask=mask, is_causal=True))


def main(folder: Path) -> None:
    torch.manual_seed(0)
    text = torch.frombuffer(bytearray(load_corpus().train), dtype=torch.uint8).long()
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    with omninorm.watch(model, optimizer, every=10, folder=folder) as w:  # watch
        for step in range(1, STEPS + 1):
            starts = torch.randint(len(text) - LENGTH - 1, (BATCH,))
            batch = torch.stack([text[start : start + LENGTH + 1] for start in starts])
            loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            w.step(loss)  # watch
            if step % 25 == 0:
                print(f"step {step}: loss {loss.item():.2f}")

    print(f"failures: {sum(alarm.severity == 'fail' for alarm in w.alarms)}")
    print(f"report: {w.report(folder / 'report.html')}")  # watch


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()))
