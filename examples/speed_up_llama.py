"""Swap the norms of a transformers Llama for omninorm's on a CPU: check the logits and compare the speed.

python examples/speed_up_llama.py [ROUNDS]        # needs pip install transformers
"""

import statistics
import sys
import time
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from omninorm.surgery import swapped

LAYERS = 4


def build(dtype: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    config = LlamaConfig(vocab_size=4096, num_hidden_layers=LAYERS, **shape)
    return LlamaForCausalLM(config).to(dtype).eval()


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main(rounds: int) -> None:
    tokens = torch.randint(0, 4096, (1, 256))
    exact = build(torch.float64)
    with torch.no_grad():
        stock = exact(input_ids=tokens).logits
        with swapped(exact) as report:
            ours = exact(input_ids=tokens).logits
    print(report)
    print(f"maximum relative difference in float64: {float((ours - stock).abs().max() / stock.abs().max()):.0e}")

    model = build(torch.bfloat16)
    jobs = {
        "one token": torch.no_grad()(lambda: model(input_ids=tokens[:, :1])),
        "256 tokens": torch.no_grad()(lambda: model(input_ids=tokens)),
        "a training step": lambda: model(input_ids=tokens, labels=tokens).loss.backward(),
    }
    for name, work in jobs.items():
        pairs = []
        for _ in range(rounds):
            before = seconds(work)
            with swapped(model):
                pairs.append((before, seconds(work)))
        ratio = statistics.median(after / before for before, after in pairs[2:] or pairs)  # two are warm-up
        stock_ms = 1000 * statistics.median(before for before, _ in pairs)
        print(f"{name:16} {stock_ms:6.1f} ms, with omninorm {ratio:.2f} × that")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 9)
