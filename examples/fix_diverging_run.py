"""Run a faulty training, print the monitor's diagnosis, and run it again after applying the remedy.

python examples/fix_diverging_run.py [FOLDER]        # needs pip install "omninorm[train]"
"""

import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

import omninorm
from omninorm.experiments.corpus import load_corpus
from omninorm.monitor import Watch

BATCH, LENGTH, STEPS = 8, 32, 60


def train(folder: Path, placement: str, learning_rate: float) -> tuple[Watch, float]:
    """Train 24 blocks; return the watch and the mean loss of the last ten steps, in nats per byte."""
    torch.manual_seed(0)
    text = torch.frombuffer(bytearray(load_corpus().train), dtype=torch.uint8).long()
    norm = omninorm.NormConfig(norm_placement=placement)
    config = omninorm.ThinkerConfig(d_model=32, n_layers=24, n_heads=4, max_seq_len=LENGTH, norm=norm)
    model = omninorm.Thinker(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95))
    losses = []
    with omninorm.watch(model, optimizer, every=5, folder=folder) as w:
        for _ in range(STEPS):
            starts = torch.randint(len(text) - LENGTH - 1, (BATCH,))
            batch = torch.stack([text[start : start + LENGTH + 1] for start in starts])
            loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            w.step(loss)
            losses.append(loss.item())
    return w, sum(losses[-10:]) / 10


def main(folder: Path) -> None:
    for name, placement, learning_rate in (("faulty", "post", 3e-3), ("fixed", "pre", 3e-3)):
        w, loss = train(folder / name, placement, learning_rate)
        fails = [alarm for alarm in w.alarms if alarm.severity == "fail"]
        print(f"{name}: {placement}-norm, learning rate {learning_rate:g}, loss {loss:.2f}, failures {len(fails)}")
        for alarm in fails[:1]:
            print(f"  step {alarm.step}, {alarm.rule}: {alarm.evidence}\n  {alarm.remedy}")
        print(f"  report: {w.report(folder / name / 'report.html')}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()))
