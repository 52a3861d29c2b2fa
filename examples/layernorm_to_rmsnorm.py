"""Convert a trained LayerNorm model to RMSNorm, approximately and exactly.

python examples/layernorm_to_rmsnorm.py        # needs pip install "omninorm[train]" for its text
"""

import copy

import torch
import torch.nn.functional as F

import omninorm
from omninorm.experiments.corpus import load_corpus
from omninorm.surgery import center

BATCH, LENGTH, STEPS = 8, 64, 150


def train() -> tuple[omninorm.Thinker, list[dict], torch.Tensor]:
    """Return the model, its record, and held-out text (8, LENGTH + 1)."""
    torch.manual_seed(0)
    corpus = load_corpus()
    text = torch.frombuffer(bytearray(corpus.train), dtype=torch.uint8).long()
    norm = omninorm.NormConfig("layernorm", "pre")
    model = omninorm.Thinker(omninorm.ThinkerConfig(d_model=64, n_layers=4, n_heads=4, max_seq_len=LENGTH, norm=norm))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    with omninorm.watch(model, optimizer, every=10) as w:
        for _ in range(STEPS):
            starts = torch.randint(len(text) - LENGTH - 1, (BATCH,))
            batch = torch.stack([text[start : start + LENGTH + 1] for start in starts])
            loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            w.step(loss)
    return model, w.record, torch.tensor(list(corpus.held_out[: 8 * (LENGTH + 1)])).view(8, -1)


@torch.no_grad()
def loss_of(model: torch.nn.Module, batch: torch.Tensor) -> float:
    return float(F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()))


def drop_the_mean(model: torch.nn.Module) -> None:
    """Replace LayerNorms by RMSNorms with the same γ and ε; the mean is no longer removed, and β is lost."""
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.LayerNorm):
            model.set_submodule(name, omninorm.RMSNorm(module.normalized_shape, module.eps))
            model.get_submodule(name).weight = module.weight


if __name__ == "__main__":
    model, record, held_out = train()
    sample = [event for event in record if event["kind"] == "sample"][-1]
    print("mean share by norm:", ", ".join(f"{share:.3f}" for share in sample["signals"]["mean_share"]))
    approximate, exact = copy.deepcopy(model), copy.deepcopy(model)
    drop_the_mean(approximate)
    print(center(exact, [held_out[:, :-1]]))
    for name, each in {"LayerNorm": model, "RMSNorm": approximate, "RMSNorm after centering": exact}.items():
        print(f"held-out loss: {loss_of(each, held_out):.4f} with {name}")
