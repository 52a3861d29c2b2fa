"""Models from their folders or files, whatever wrote them: transformers, llama.cpp or a run."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from omninorm.errors import DataError, OmninormError, RunError
from omninorm.experiments.pretrained import FolderTokenizer, GgufTokenizer, is_pretrained
from omninorm.experiments.runs import load_run
from omninorm.experiments.tokenizer import TOKENIZER_FILE, Tokenizer
from omninorm.surgery.folder import load_transformers
from omninorm.thinker import Thinker, gguf

_MODELS = "pass a Hugging Face folder, the folder of a run, or a .gguf file"
_CHARACTERS_PER_TOKEN = 64  # more than any tokenizer averages, so that a long file is not encoded as a whole


def load_model(path: Path) -> tuple[nn.Module, Tokenizer | None]:
    """Return the model at a path, and its tokenizer if it has one that omninorm reads.

    Args:
        path: a Hugging Face folder, which is loaded by transformers; the folder of a run, of which the newest
            checkpoint is loaded; or a .gguf file of a Llama or Qwen3 model.

    Raises:
        ConfigError, RunError, MissingExtraError: as `load_transformers`, `load_run` or `Thinker.from_pretrained`.
    """
    if not os.path.lexists(path):
        raise RunError(f"No such file or folder: {path}", "", _MODELS)
    if path.is_file():
        if path.suffix != ".gguf":
            raise RunError(f"{path} is a file, but not a .gguf file", "", _MODELS)
        return Thinker.from_pretrained(path).eval(), _tokenizer(
            lambda: GgufTokenizer(gguf.read_settings(gguf.open_gguf(path)))
        )
    if not is_pretrained(path):
        return load_run(path)[:2]
    return load_transformers(path), _tokenizer(lambda: FolderTokenizer(path / TOKENIZER_FILE))


def _tokenizer(read: Callable[[], Tokenizer]) -> Tokenizer | None:
    """Return a tokenizer, or None if it is missing or not supported: the model can run on other tokens."""
    try:
        return read()
    except OmninormError:
        return None


def tokens_of(text: Path, tokenizers: tuple[Tokenizer | None, Tokenizer | None], most: int) -> Tensor:
    """Return the first tokens of a text file, int64 (1, at most `most`), by the first tokenizer that there is.

    Raises:
        DataError: the file cannot be read, or is empty or not UTF-8.
        RunError: neither model has a tokenizer.
    """
    tokenizer = next((each for each in tokenizers if each is not None), None)
    if tokenizer is None:
        remedy = f"add {TOKENIZER_FILE} to one of the folders, or leave the text out"
        raise RunError("Neither model has a tokenizer that can encode a text", "", remedy)
    try:
        with text.open(encoding="utf-8") as file:
            content = file.read(most * _CHARACTERS_PER_TOKEN)
    except OSError as error:
        raise DataError(f"Cannot read {text} ({error.strerror})", "", "check the path") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{text} must be UTF-8", f"an invalid byte at {error.start}", "convert it") from error
    tokens = tokenizer.encode(content.encode())[:most]
    if not len(tokens):
        raise DataError(f"{text} must hold some text", f"{len(content)} characters", "pass another file")
    return tokens.long().unsqueeze(0)


def check_vocabulary(model: nn.Module, tokens: Tensor) -> None:
    """Raise DataError if a token is not in the model's vocabulary, the size of its first embedding."""
    table = next((module for module in model.modules() if isinstance(module, nn.Embedding)), None)
    largest = int(tokens.max())
    if table is not None and largest >= table.num_embeddings:
        received = f"token {largest} for {table.num_embeddings} embeddings in {type(model).__name__}"
        raise DataError(
            "Both models must know the tokens of the text", received, "compare models of the same tokenizer"
        )
