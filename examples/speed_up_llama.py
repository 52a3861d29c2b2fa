"""A Llama of transformers on a CPU: its norms swapped for omninorm's, the same logits, and the time of both by turns.

python examples/speed_up_llama.py        # needs pip install transformers
"""

import statistics
import time
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from omninorm.surgery import swapped

LAYERS, ROUNDS = 4, 9


def build(dtype: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    config = LlamaConfig(vocab_size=4096, num_hidden_layers=LAYERS, **shape)
    return LlamaForCausalLM(config).to(dtype).eval()


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    tokens = torch.randint(0, 4096, (1, 256))
    exact = build(torch.float64)
    with torch.no_grad():
        stock = exact(input_ids=tokens).logits
        with swapped(exact) as report:
            ours = exact(input_ids=tokens).logits
    print(f"{len(report.changed)} norms swapped, {len(report.refused)} refused")
    print(f"float64: logits differ by {float((ours - stock).abs().max() / stock.abs().max()):.0e} of the largest")

    model = build(torch.bfloat16)
    jobs = {
        "one token": torch.no_grad()(lambda: model(input_ids=tokens[:, :1])),
        "256 tokens": torch.no_grad()(lambda: model(input_ids=tokens)),
        "a training step": lambda: model(input_ids=tokens, labels=tokens).loss.backward(),
    }
    for name, work in jobs.items():
        pairs = []
        for _ in range(ROUNDS):
            before = seconds(work)
            with swapped(model):
                pairs.append((before, seconds(work)))
        ratio = statistics.median(after / before for before, after in pairs[2:])  # the first ones warm up
        print(f"{name:16} {1000 * statistics.median(pair[0] for pair in pairs):6.1f} ms, swapped {ratio:.2f} of it")


if __name__ == "__main__":
    main()
