"""Models with weights of others, and their tokenizers, for generation and evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omninorm.errors import ConfigError, DataError, RunError
from omninorm.experiments.tokenizer import BYTE_OF, tokenizers_library
from omninorm.thinker import Thinker, gguf

# How text is cut before pieces of it are merged, by the names that llama.cpp gives: whether every digit stands alone.
_SINGLE_DIGITS = {"gpt-2": False, "default": False, "smollm": True}
_CONTROL = 3  # a token's type in GGUF: <|endoftext|> and the like


class GgufTokenizer:
    """The byte-level BPE tokenizer in a GGUF file.

    Args:
        settings: the file's metadata.

    Raises:
        ConfigError: another kind of tokenizer.
        RunError: the metadata is incomplete.
    """

    name = "gguf"

    def __init__(self, settings: Mapping[str, Any]) -> None:
        kind, cut = settings.get("tokenizer.ggml.model"), settings.get("tokenizer.ggml.pre", "default")
        if kind != "gpt2" or cut not in _SINGLE_DIGITS:
            known = f"gpt2 with {', '.join(_SINGLE_DIGITS)}"
            raise ConfigError(f"a GGUF file's tokenizer is {known}", f"{kind!r} with {cut!r}", "use another file")
        words, merges = settings.get("tokenizer.ggml.tokens"), settings.get("tokenizer.ggml.merges")
        if not isinstance(words, list) or not isinstance(merges, list):
            raise RunError("a GGUF file must hold its tokenizer", "no tokens or merges", "use another file")
        types = settings.get("tokenizer.ggml.token_type") or [1] * len(words)
        self._special = {word for word, kind in zip(words, types, strict=False) if kind == _CONTROL}
        self._tokenizer = _build(words, merges, sorted(self._special), _SINGLE_DIGITS[cut])
        self._pieces = [self._bytes_of(word) for word in words]
        self.vocab_size = len(words)
        self.end: int | None = settings.get("tokenizer.ggml.eos_token_id")

    def encode(self, text: bytes) -> Tensor:
        """Tokens, int32, without any added."""
        try:
            ids = self._tokenizer.encode(text.decode(), add_special_tokens=False).ids
        except UnicodeDecodeError as error:
            raise DataError("text must be UTF-8", f"an invalid byte at {error.start}", "convert the text") from error
        return torch.tensor(ids, dtype=torch.int32)

    def decode(self, tokens: Iterable[int]) -> bytes:
        return b"".join(self._pieces[token] for token in tokens)

    def byte_lengths(self) -> Tensor:
        return torch.tensor([len(piece) for piece in self._pieces], dtype=torch.int64)

    def to_json(self) -> str | None:
        return None

    def _bytes_of(self, word: str) -> bytes:
        if word in self._special:
            return word.encode()
        try:
            return bytes(BYTE_OF[character] for character in word)
        except KeyError as error:
            raise RunError(
                "a byte-level token is made of GPT-2's characters", repr(word), "use another file"
            ) from error


def load_gguf(path: Path, dtype: torch.dtype = torch.float32) -> tuple[Thinker, GgufTokenizer]:
    """The model and the tokenizer of a GGUF file.

    Raises:
        ConfigError, RunError, MissingExtraError: as `omninorm.thinker.gguf.load`, and for the tokenizer.
    """
    tokenizer = GgufTokenizer(gguf.read_settings(gguf.open_gguf(path)))
    return gguf.load(path, dtype=dtype).eval(), tokenizer


def _build(words: list[str], merges: list[str], special: list[str], single_digits: bool) -> Any:
    library = tokenizers_library()
    vocabulary = {word: index for index, word in enumerate(words)}
    try:
        pairs = [tuple(merge.split(" ")) for merge in merges]
        tokenizer = library.Tokenizer(library.models.BPE(vocabulary, pairs))
    except Exception as error:  # the Rust library raises plain Exception
        raise RunError("a GGUF file's merges must be of its tokens", str(error)[:200], "use another file") from error
    cuts = [library.pre_tokenizers.ByteLevel(add_prefix_space=False)]
    digits = [library.pre_tokenizers.Digits(individual_digits=True)] if single_digits else []
    tokenizer.pre_tokenizer = library.pre_tokenizers.Sequence([*digits, *cuts])
    tokenizer.add_special_tokens(special)
    return tokenizer
