"""Train with a learning rate that is too high for attention, without qk-norm and with it.

python examples/high_learning_rate.py [FOLDER [SEEDS]]        # needs pip install "omninorm[train]" for its text
"""

import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

import omninorm
from omninorm.experiments.corpus import load_corpus
from omninorm.monitor import Watch

BATCH, LENGTH, STEPS, CLEAR = 8, 64, 200, 0.1
SCHEDULES = {"0.03 after 20 steps": (0.03, 20), "0.05 after 150 steps": (0.05, 150)}


def train(folder: Path, qk_norm: bool, learning_rate: float, warm_up: int, seed: int) -> Watch:
    torch.manual_seed(seed)
    text = torch.frombuffer(bytearray(load_corpus().train), dtype=torch.uint8)
    pieces = text.unfold(0, LENGTH + 1, 1)
    norm = omninorm.NormConfig(qk_norm=qk_norm)
    model = omninorm.Thinker(omninorm.ThinkerConfig(d_model=64, n_layers=4, n_heads=2, max_seq_len=LENGTH, norm=norm))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95))
    with omninorm.watch(model, optimizer, every=5, folder=folder) as w:
        for step in range(1, STEPS + 1):
            optimizer.param_groups[0]["lr"] = learning_rate * min(1.0, step / warm_up)
            batch = pieces[torch.randint(len(pieces), (BATCH,))].long()
            loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            w.step(loss)
    return w


def means(w: Watch) -> list[float]:
    """Return the mean loss of the last ten steps, from step 10 on."""
    losses = [step.loss for step in w.history.steps]
    return [sum(losses[end - 10 : end]) / 10 for end in range(10, len(losses) + 1)]


def main(folder: Path, seeds: int) -> None:
    for schedule, (learning_rate, warm_up) in SCHEDULES.items():
        for seed in range(seeds):
            place = folder / f"{warm_up}-{seed}"
            without, with_norm = (train(place / str(qk), qk, learning_rate, warm_up, seed) for qk in (False, True))
            pairs = list(zip(means(without), means(with_norm), strict=True))
            apart = next(step for step, (a, b) in enumerate(pairs, 10) if a > b + CLEAR)
            first = next(alarm for alarm in without.alarms if "attention" in alarm.rule)
            print(f"{schedule}, seed {seed}: loss {pairs[-1][0]:.2f}, with qk-norm {pairs[-1][1]:.2f}", end="; ")
            print(f"{first.rule} in {first.layer} at step {first.step}, losses {CLEAR} apart at step {apart};", end=" ")
            print(f"alarms with qk-norm: {len(with_norm.alarms)}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()), int(sys.argv[2] if len(sys.argv) > 2 else 2))
