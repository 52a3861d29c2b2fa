"""Pretrained models with their tokenizers, for generation and evaluation: GGUF files and Hugging Face folders."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from omninorm.errors import ConfigError, DataError, RunError
from omninorm.experiments.run_folder import CONFIG_FILE
from omninorm.experiments.tokenizer import BYTE_OF, TOKENIZER_FILE, library_errors, tokenizers_library
from omninorm.thinker import Thinker, gguf, pretrained

# The supported ways to split text before it is tokenized, by llama.cpp's names, and whether they separate all digits.
_SINGLE_DIGITS = {"gpt-2": False, "default": False, "smollm": True}
_CONTROL = 3  # the type of control tokens such as <|endoftext|> in GGUF
_GENERATION_FILE = "generation_config.json"
_SPACE = "▁"  # SentencePiece's character for a space
_REMEDY = "download it again, or use another file"


class _Pieces:
    """A tokenizer whose tokens are fixed byte sequences, so that decoding can stop after any token."""

    vocab_size: int
    end_tokens: frozenset[int] = frozenset()  # tokens that end a text
    special_tokens: frozenset[int] = frozenset()  # tokens that are not text
    _pieces: list[bytes]

    def decode(self, tokens: Iterable[int]) -> bytes:
        """Return the bytes of the tokens. A model may have more logits than there are tokens; the others are empty."""
        return b"".join(self._pieces[token] for token in tokens if token < len(self._pieces))

    def byte_lengths(self) -> Tensor:
        """Return the number of bytes of each token, int64 (vocab_size,)."""
        return torch.tensor([len(piece) for piece in self._pieces], dtype=torch.int64)

    def to_json(self) -> str | None:
        """Return None, because the tokenizer is not saved: it stays in the file from which it was read."""
        return None


class GgufTokenizer(_Pieces):
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
        if kind != "gpt2" or not isinstance(cut, str) or cut not in _SINGLE_DIGITS:
            invariant = f"Only GGUF tokenizers of the kind gpt2 with {', '.join(_SINGLE_DIGITS)} are supported"
            raise ConfigError(invariant, f"{kind!r:.60} with {cut!r:.60}", "use another file")
        words, merges = settings.get("tokenizer.ggml.tokens"), settings.get("tokenizer.ggml.merges")
        if not _are_texts(words) or not _are_texts(merges):
            raise RunError("This GGUF file has no tokens or no merges for its tokenizer", "", _REMEDY)
        types = settings.get("tokenizer.ggml.token_type") or [1] * len(words)
        if not isinstance(types, list):
            raise RunError("tokenizer.ggml.token_type in a GGUF file must be a list", type(types).__name__, _REMEDY)
        self._special = {word for word, kind in zip(words, types, strict=False) if kind == _CONTROL}
        self._tokenizer = _build(words, merges, sorted(self._special), _SINGLE_DIGITS[cut])
        self._pieces = [self._bytes_of(word) for word in words]
        self.vocab_size = len(words)
        key = "tokenizer.ggml.eos_token_id"
        self.end: int | None = settings.get(key)
        self.end_tokens = _token_set(key, self.end)
        self.special_tokens = frozenset(index for index, word in enumerate(words) if word in self._special)

    def encode(self, text: bytes) -> Tensor:
        """Return the tokens, int32; no special tokens are added."""
        with library_errors("The tokenizer of a GGUF file must be able to encode any text", _REMEDY):
            ids = self._tokenizer.encode(_decoded(text), add_special_tokens=False).ids
        return torch.tensor(ids, dtype=torch.int32)

    def _bytes_of(self, word: str) -> bytes:
        return _text_bytes(word) if word in self._special else _byte_level(word)


class FolderTokenizer(_Pieces):
    """The tokenizer of a Hugging Face folder, in its tokenizer.json.

    The end-of-text tokens come from generation_config.json next to it, or else from config.json.

    Args:
        path: the file.

    Raises:
        ConfigError: its tokens are not fixed byte sequences, as those of byte-level and byte-fallback BPE are.
        RunError: the file is missing or damaged.
        MissingExtraError: the package tokenizers is not installed.
    """

    name = "hugging face"

    def __init__(self, path: Path) -> None:
        library = tokenizers_library()
        try:
            serialized = path.read_bytes()
        except OSError as error:
            received = "" if isinstance(error, FileNotFoundError) else str(error.strerror)
            remedy = "add the model's tokenizer.json, or use Thinker.from_pretrained from Python"
            raise RunError(f"Generating text needs {path.name} in {path.parent}", received, remedy) from error
        with library_errors(f"{path} must be a tokenizer of the package tokenizers", _REMEDY):
            content = serialized.decode()
            kinds = _decoders(json.loads(content).get("decoder"))
            self._tokenizer = library.Tokenizer.from_str(content)
            added = self._tokenizer.get_added_tokens_decoder()
            vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        if "ByteLevel" in kinds:
            convert = _byte_level
        elif kinds & {"ByteFallback", "Metaspace"}:
            convert = _byte_fallback
        else:
            invariant = f"The tokenizer in {path} must decode by ByteLevel, ByteFallback or Metaspace"
            raise ConfigError(invariant, ", ".join(sorted(kinds)) or "no decoder", "use another model")
        self.vocab_size = 1 + max(vocabulary.values(), default=-1)
        if self.vocab_size > 2 * len(vocabulary) + 1024:
            received = f"token {self.vocab_size - 1} among {len(vocabulary)} tokens"
            raise RunError(f"The tokens in {path} must be numbered without large gaps", received, _REMEDY)
        self.special_tokens = frozenset(index for index, token in added.items() if token.special)
        self.end_tokens = _read_end_tokens(path.parent)
        self._pieces = [b""] * self.vocab_size
        for word, index in vocabulary.items():
            self._pieces[index] = _text_bytes(word) if index in added else convert(word)

    def encode(self, text: bytes) -> Tensor:
        """Return the tokens, int32, including the special tokens that the model expects, such as <s> at the start."""
        with library_errors(f"{TOKENIZER_FILE} must be able to encode any text", _REMEDY):
            ids = self._tokenizer.encode(_decoded(text)).ids
        return torch.tensor(ids, dtype=torch.int32)


def is_pretrained(path: Path) -> bool:
    """Return whether a folder has the config.json of a Hugging Face model, not that of a run."""
    try:
        config = json.loads((path / CONFIG_FILE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and "format" not in config and bool({"model_type", "architectures"} & config.keys())


def load_folder(path: Path, dtype: torch.dtype = torch.float32) -> tuple[Thinker, FolderTokenizer]:
    """Return the model and the tokenizer of a Hugging Face folder.

    Raises:
        ConfigError, RunError, MissingExtraError: as `omninorm.thinker.pretrained.load` and `FolderTokenizer`.
    """
    pretrained.read_config(path)  # first, because an unsupported model needs no tokenizer
    tokenizer = FolderTokenizer(path / TOKENIZER_FILE)
    return pretrained.load(path, dtype=dtype).eval(), tokenizer


def load_gguf(path: Path, dtype: torch.dtype = torch.float32) -> tuple[Thinker, GgufTokenizer]:
    """Return the model and the tokenizer of a GGUF file.

    Raises:
        ConfigError, RunError, MissingExtraError: as `omninorm.thinker.gguf.load` and `GgufTokenizer`.
    """
    tokenizer = GgufTokenizer(gguf.read_settings(gguf.open_gguf(path)))
    return gguf.load(path, dtype=dtype).eval(), tokenizer


def _build(words: list[str], merges: list[str], special: list[str], single_digits: bool) -> Any:
    library = tokenizers_library()
    vocabulary = {word: index for index, word in enumerate(words)}
    with library_errors("The merges in a GGUF file must be pairs of its tokens", _REMEDY):
        pairs = [tuple(merge.split(" ")) for merge in merges]
        tokenizer = library.Tokenizer(library.models.BPE(vocabulary, pairs))
    cuts = [library.pre_tokenizers.ByteLevel(add_prefix_space=False)]
    digits = [library.pre_tokenizers.Digits(individual_digits=True)] if single_digits else []
    tokenizer.pre_tokenizer = library.pre_tokenizers.Sequence([*digits, *cuts])
    tokenizer.add_special_tokens(special)
    return tokenizer


def _read_end_tokens(folder: Path) -> frozenset[int]:
    """Return the end-of-text tokens of a Hugging Face folder; empty if neither of its files names one."""
    for name in (_GENERATION_FILE, CONFIG_FILE):
        path = folder / name
        try:
            values = json.loads(path.read_bytes())
        except FileNotFoundError:
            continue
        except (OSError, ValueError, RecursionError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise RunError(f"{path} must be a readable JSON file", f"{reason!s:.200}", _REMEDY) from error
        if not isinstance(values, Mapping):
            raise RunError(f"{path} must be a JSON object", type(values).__name__, _REMEDY)
        if values.get("eos_token_id") is not None:
            return _token_set(f"eos_token_id in {path}", values["eos_token_id"])
    return frozenset()


def _token_set(name: str, value: object) -> frozenset[int]:
    """Return the tokens in a setting, whose value is a number, a list of numbers, or None."""
    tokens = value if isinstance(value, list) else [] if value is None else [value]
    for token in tokens:
        if isinstance(token, bool) or not isinstance(token, int):
            raise RunError(f"{name} must be a token or a list of tokens", f"{value!r:.80}", _REMEDY)
    return frozenset(tokens)


def _decoders(decoder: Any) -> set[str]:
    """Return the kinds of a decoder in tokenizer.json, and of its parts if it is a sequence."""
    parts = decoder.get("decoders", []) if isinstance(decoder, Mapping) else []
    each = [decoder, *parts] if isinstance(parts, Sequence) else [decoder]
    return {str(part.get("type")) for part in each if isinstance(part, Mapping)} - {"Sequence"}


def _decoded(text: bytes) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise DataError("The text must be UTF-8", f"an invalid byte at {error.start}", "convert the text") from error


def _byte_level(word: str) -> bytes:
    try:
        return bytes(BYTE_OF[character] for character in word)
    except KeyError as error:
        invariant = "The tokens of a byte-level tokenizer must be made of GPT-2's characters"
        raise RunError(invariant, f"{word!r:.60}", _REMEDY) from error


def _byte_fallback(word: str) -> bytes:
    """Return the bytes of a SentencePiece token: <0x0A> is a byte, everything else is text."""
    if len(word) == 6 and word.startswith("<0x") and word.endswith(">"):
        try:
            return bytes.fromhex(word[3:5])
        except ValueError:
            pass
    return _text_bytes(word.replace(_SPACE, " "))


def _text_bytes(word: str) -> bytes:
    return word.encode("utf-8", errors="replace")


def _are_texts(values: object) -> TypeGuard[list[str]]:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)
