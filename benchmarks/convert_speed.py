"""Compares `omninorm convert` with copying: `python benchmarks/convert_speed.py [--gigabytes 2] [--rounds 3]`.

The script writes a sharded Llama checkpoint with random bfloat16 weights (hidden size 2048, shards of 500 MB). In each
round it copies the checkpoint, folds it without keeping the original weights, and folds it with them, in random order,
each in a separate process and including fsync. It prints medians over the rounds, and the largest resident set of each
process (pages of mapped files included) next to the bound: twice the largest tensor plus 500 MB.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

HIDDEN, INNER, HEADS, VOCABULARY = 2048, 5504, 16, 32000
SHARD = 500_000_000
COPY = """
import os, shutil, sys
source, target = sys.argv[1:]
shutil.copytree(source, target)
for name in os.listdir(target):
    descriptor = os.open(os.path.join(target, name), os.O_RDONLY)
    os.fsync(descriptor)
"""


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors of a Llama, by name."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        found |= {f"{prefix}self_attn.{each}_proj.weight": (HIDDEN, HIDDEN) for each in "qkvo"}
        found |= {f"{prefix}mlp.{each}_proj.weight": (INNER, HIDDEN) for each in ("gate", "up")}
        found[f"{prefix}mlp.down_proj.weight"] = (HIDDEN, INNER)
        found |= {f"{prefix}{each}_layernorm.weight": (HIDDEN,) for each in ("input", "post_attention")}
    return found | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def write_checkpoint(folder: Path, gigabytes: float) -> int:
    """Write the checkpoint; return the number of bytes of its largest tensor."""
    from transformers import LlamaConfig

    layer = 2 * (4 * HIDDEN**2 + 3 * HIDDEN * INNER)
    layers = max(1, round((gigabytes * 1e9 - 4 * VOCABULARY * HIDDEN) / layer))
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    torch.manual_seed(0)
    shard: dict[str, torch.Tensor] = {}
    weight_map, number, largest = {}, 1, 0
    everything = shapes(layers)
    for name, shape in everything.items():
        value = torch.randn(shape) * 0.02 if len(shape) == 2 else 1 + 0.3 * torch.randn(shape)
        shard[name] = value.bfloat16()
        largest = max(largest, 2 * value.numel())
        weight_map[name] = f"model-{number:05}.safetensors"
        if sum(2 * each.numel() for each in shard.values()) > SHARD or name == next(reversed(everything)):
            save_file(shard, folder / weight_map[name], metadata={"format": "pt"})
            shard, number = {}, number + 1
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return largest


def run(command: list[str]) -> tuple[float, float]:
    """Run a command; return the seconds, and its largest resident set in megabytes.

    The resident set is read while it runs, because the value from wait4 includes that of the parent process.
    """
    start, peak = time.perf_counter(), 0.0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii", errors="replace")
            lines = (line.split() for line in status.splitlines() if line.startswith("VmHWM"))
            peak = max([peak, *(int(words[1]) * 1024 / 1e6 for words in lines)])
            time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{command} ended with {process.returncode}")
    return time.perf_counter() - start, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="working folder; the default is the temporary folder")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        largest = write_checkpoint(folder / "in", options.gigabytes)
        total = sum(path.stat().st_size for path in (folder / "in").iterdir())
        target = folder / "out"
        convert = [sys.executable, "-m", "omninorm", "convert", str(folder / "in"), str(target), "--fold"]
        variants = {
            "copy": [sys.executable, "-c", COPY, str(folder / "in"), str(target)],
            "fold, no delta": [*convert, "--no-delta"],
            "fold": convert,
        }
        seconds: dict[str, list[float]] = {each: [] for each in variants}
        memory = dict.fromkeys(variants, 0.0)
        for _ in range(options.rounds):
            for each in random.sample(sorted(variants), len(variants)):
                os.sync()
                took, peak = run(variants[each])
                seconds[each].append(took)
                memory[each] = max(memory[each], peak)
                shutil.rmtree(target)
    bound = (2 * largest + 500e6) / 1e6
    result = {
        "gigabytes": total / 1e9,
        "seconds": {each: statistics.median(values) for each, values in seconds.items()},
        "speed": {
            each: statistics.median(a / b for a, b in zip(seconds["copy"], seconds[each], strict=True))
            for each in variants
        },
        "peak_mb": memory,
        "bound_mb": bound,
    }
    for each in variants:
        print(
            f"{each:15} {result['seconds'][each]:6.1f} s  {result['speed'][each]:.2f} of copying's speed  "
            f"{memory[each]:5.0f} MB (bound {bound:.0f})"
        )
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
