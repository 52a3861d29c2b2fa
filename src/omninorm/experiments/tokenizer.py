"""Tokenizers: bytes (the default), or byte-level BPE trained on the run's own text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from omninorm.config import check_choice, check_count
from omninorm.errors import ConfigError, DataError, MissingExtraError, OmninormError, RunError

TOKENIZERS = ("byte", "bpe")
TOKENIZER_FILE = "tokenizer.json"
_REMEDY = "restore the file from the original run, or train again"
DEFAULT_VOCABULARY = 1024
_LARGEST_VOCABULARY = 1 << 20
_PIECE = 1 << 20  # characters per call of the BPE encoder, which keeps its offset tables small


class Tokenizer(Protocol):
    """The interface that training and generation use. Encoding is lossless: decode(encode(text)) == text."""

    name: str
    vocab_size: int

    def encode(self, text: bytes) -> Tensor:
        """Return the tokens of UTF-8 text: a 1-D integer tensor of the smallest dtype that holds the vocabulary."""

    def decode(self, tokens: Iterable[int]) -> bytes:
        """Return the bytes of the tokens, which may end in the middle of a character."""

    def byte_lengths(self) -> Tensor:
        """Return the number of bytes of each token, int64 (vocab_size,)."""

    def to_json(self) -> str | None:
        """Return the content of tokenizer.json for `load_tokenizer`, or None if there is nothing to save."""


class ByteTokenizer:
    """A tokenizer with one token per byte, 256 in all; there is nothing to train or save."""

    name = "byte"
    vocab_size = 256

    def encode(self, text: bytes) -> Tensor:
        if not text:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(bytearray(text), dtype=torch.uint8)

    def decode(self, tokens: Iterable[int]) -> bytes:
        return bytes(tokens)

    def byte_lengths(self) -> Tensor:
        return torch.ones(256, dtype=torch.int64)

    def to_json(self) -> str | None:
        return None


class BpeTokenizer:
    """Byte-level byte-pair encoding: merges start from the 256 bytes, so any text can be encoded.

    Args:
        serialized: the content of a tokenizer.json written by this class.

    Raises:
        MissingExtraError: the package `tokenizers` is not installed.
        RunError: the file is damaged, or is another kind of tokenizer.
    """

    name = "bpe"

    def __init__(self, serialized: str) -> None:
        library = tokenizers_library()
        with library_errors(f"{TOKENIZER_FILE} must be a byte-level BPE tokenizer", _REMEDY):
            self._tokenizer = library.Tokenizer.from_str(serialized)
            vocabulary: dict[str, int] = self._tokenizer.get_vocab()
            pieces = {index: bytes(BYTE_OF[character] for character in word) for word, index in vocabulary.items()}
            self._pieces = [pieces[index] for index in range(len(vocabulary))]
        self.vocab_size = len(self._pieces)
        self._serialized = serialized

    @classmethod
    def train(cls, text: bytes, vocab_size: int) -> BpeTokenizer:
        """Learn merges from UTF-8 text until there are `vocab_size` tokens, or nothing is left to merge.

        Raises:
            ConfigError: vocab_size below 257 (the bytes and one merge) or above 2²⁰.
        """
        check_count("vocab_size of a BPE tokenizer", vocab_size, at_least=257)
        if vocab_size > _LARGEST_VOCABULARY:
            invariant = f"vocab_size of a BPE tokenizer must be at most {_LARGEST_VOCABULARY}"
            raise ConfigError(invariant, str(vocab_size), "use a smaller vocabulary")
        library = tokenizers_library()
        tokenizer = library.Tokenizer(library.models.BPE())
        tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = library.decoders.ByteLevel()
        alphabet = library.pre_tokenizers.ByteLevel.alphabet()
        trainer = library.trainers.BpeTrainer(
            vocab_size=vocab_size, initial_alphabet=sorted(alphabet), show_progress=False
        )
        tokenizer.train_from_iterator(_pieces(text.decode()), trainer)
        return cls(tokenizer.to_str())

    def encode(self, text: bytes) -> Tensor:
        try:
            pieces = list(_pieces(text.decode()))
        except UnicodeDecodeError as error:
            raise DataError(
                "The text must be UTF-8", f"an invalid byte at {error.start}", "convert the text"
            ) from error
        with library_errors(f"{TOKENIZER_FILE} must be able to encode any text", _REMEDY):
            encodings = self._tokenizer.encode_batch_fast(pieces, add_special_tokens=False)
        tokens = [torch.tensor(encoding.ids, dtype=torch.int32) for encoding in encodings]
        return torch.cat([torch.empty(0, dtype=torch.int32), *tokens])

    def decode(self, tokens: Iterable[int]) -> bytes:
        return b"".join(self._pieces[token] for token in tokens)

    def byte_lengths(self) -> Tensor:
        return torch.tensor([len(piece) for piece in self._pieces], dtype=torch.int64)

    def to_json(self) -> str | None:
        return self._serialized


def build_tokenizer(name: str, vocab_size: int | None, train_text: bytes) -> Tokenizer:
    """Return the tokenizer called `name`; "bpe" is trained on `train_text` (vocab_size None means 1024).

    Raises:
        ConfigError: an unknown name, or a vocabulary size that this tokenizer cannot have.
    """
    check_choice("tokenizer", name, TOKENIZERS)
    if name == "bpe":
        return BpeTokenizer.train(train_text, DEFAULT_VOCABULARY if vocab_size is None else vocab_size)
    if vocab_size not in (None, 256):
        remedy = "use tokenizer='bpe', or leave vocab_size out"
        raise ConfigError("The byte tokenizer has 256 tokens", f"vocab_size={vocab_size}", remedy)
    return ByteTokenizer()


def load_tokenizer(name: str, folder: Path, sha256: str | None = None) -> Tokenizer:
    """Return the tokenizer of a run; "bpe" reads tokenizer.json in the run's folder.

    Args:
        name: "byte" or "bpe".
        folder: the run's folder.
        sha256: digest of tokenizer.json, in hexadecimal; None if it is unknown.

    Raises:
        ConfigError: an unknown name.
        RunError: tokenizer.json is missing, damaged, or not the one with this digest.
    """
    check_choice("tokenizer", name, TOKENIZERS)
    if name == "byte":
        return ByteTokenizer()
    path = folder / TOKENIZER_FILE
    try:
        content = path.read_bytes()
        if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
            raise RunError(f"{path} has changed since the run was started", "", _REMEDY)
        return BpeTokenizer(content.decode())
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise RunError(f"This run has a BPE tokenizer and needs {path}", f"{reason!s:.200}", _REMEDY) from error


def _pieces(text: str) -> Iterator[str]:
    """Cut a text after newlines into pieces of about a million characters."""
    start = 0
    while start < len(text):
        cut = text.find("\n", start + _PIECE)
        stop = len(text) if cut < 0 else cut + 1
        yield text[start:stop]
        start = stop


def tokenizers_library() -> Any:
    """Return the package `tokenizers`, or raise MissingExtraError."""
    try:
        import tokenizers
    except ImportError as error:
        remedy = 'install it with pip install "omninorm[train]", or use the byte tokenizer'
        raise MissingExtraError("BPE needs the package tokenizers", "", remedy) from error
    return tokenizers


@contextmanager
def library_errors(invariant: str, remedy: str) -> Iterator[None]:
    """Turn errors of the package `tokenizers`, also those about the content of its file, into RunError.

    The package is written in Rust: it raises plain Exception, and its panics are not even derived from Exception.
    """
    try:
        yield
    except OmninormError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        received = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise RunError(invariant, f"{received:.200}", remedy) from error


def _printable_bytes() -> dict[str, int]:
    """Return GPT-2's map from visible characters to bytes; byte-level BPE writes its vocabulary in these characters."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + index): byte for index, byte in enumerate(hidden)}


BYTE_OF = _printable_bytes()
