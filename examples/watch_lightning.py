"""Monitor Lightning's Trainer.

python examples/watch_lightning.py [FOLDER]        # needs pip install "omninorm[train]" pytorch-lightning
"""

import logging
import sys
import tempfile
from pathlib import Path

import pytorch_lightning as lightning
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from omninorm import Thinker, ThinkerConfig
from omninorm.experiments.corpus import load_corpus
from omninorm.monitor.callbacks.lightning import WatchCallback

LENGTH, PIECES = 64, 480


class Model(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.thinker = Thinker(ThinkerConfig(d_model=64, n_layers=4, n_heads=4, max_seq_len=LENGTH))

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        (tokens,) = batch
        return F.cross_entropy(self.thinker(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main(folder: Path) -> None:
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    lightning.seed_everything(0, verbose=False)
    pieces = torch.tensor(list(load_corpus().train[: PIECES * LENGTH])).view(PIECES, LENGTH)
    callback = WatchCallback(every=10, folder=folder)
    trainer = lightning.Trainer(
        max_epochs=1, callbacks=[callback], gradient_clip_val=1.0, accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Model(), DataLoader(TensorDataset(pieces), batch_size=8, shuffle=True))

    steps = callback.watch.history.steps
    print(f"steps watched: {len(steps)}, loss {steps[0].loss:.2f} → {steps[-1].loss:.2f}")
    print(f"failures: {sum(alarm.severity == 'fail' for alarm in callback.alarms)}")
    print(f"report: {folder / 'report.html'}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()))
