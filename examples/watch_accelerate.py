"""Monitor a loop with Accelerate that accumulates gradients over two batches.

python examples/watch_accelerate.py [FOLDER]        # needs pip install "omninorm[train]" accelerate
"""

import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

from omninorm import Thinker, ThinkerConfig
from omninorm.experiments.corpus import load_corpus
from omninorm.monitor.callbacks.accelerate import watch

LENGTH, PIECES = 64, 960


def main(folder: Path) -> None:
    torch.manual_seed(0)
    pieces = torch.tensor(list(load_corpus().train[: PIECES * LENGTH])).view(PIECES, LENGTH)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = Thinker(ThinkerConfig(d_model=64, n_layers=4, n_heads=4, max_seq_len=LENGTH))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loader = DataLoader(TensorDataset(pieces), batch_size=8, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    with watch(accelerator, model, optimizer, every=10, folder=folder) as w:
        for (batch,) in loader:
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                w.step(loss)  # once per batch; a step ends with the optimizer's step

    steps = w.history.steps
    print(f"batches: {len(loader)}, steps watched: {len(steps)}, loss {steps[0].loss:.2f} → {steps[-1].loss:.2f}")
    print(f"failures: {sum(alarm.severity == 'fail' for alarm in w.alarms)}")
    if accelerator.is_main_process:
        print(f"report: {w.report(folder / 'report.html')}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()))
