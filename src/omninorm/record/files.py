"""Writing files so that a crash, a kill or a full disk never leaves half of one under its real name."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from omninorm.errors import RunError

TEMPORARY = ".tmp-"
_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an OSError within into a RunError that names the path and the remedy."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        invariant, remedy = "a run's folder must be writable", "choose another folder"
        if error.errno in _FULL:
            invariant, remedy = "a run needs space on its disk", "free some and resume; what was complete is intact"
        elif error.errno == errno.EFBIG:
            invariant, remedy = "a run's files must be allowed to grow", "raise the limit (ulimit -f) and resume"
        raise RunError(invariant, f"{reason!r} while writing {path}", remedy) from error


def write_file(path: Path, content: bytes) -> None:
    """Writes a file under a temporary name beside it, makes it durable, and renames it.

    A pipe or a character device, such as /dev/null, is written to: a rename would put a file in its place.

    Raises:
        OSError: the disk is full or the folder can't be written; then neither name is left behind.
    """
    if path.exists() and (path.is_fifo() or path.is_char_device()):
        path.write_bytes(content)
        return
    partial = path.with_name(f"{TEMPORARY}{path.name}")
    try:
        write_durably(partial, content)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_folder(path: Path, files: Mapping[str, bytes]) -> None:
    """Writes a folder of files under a temporary name, makes all of it durable, and renames it.

    Raises:
        OSError: as `write_file`, and where `path` already exists with something in it.
    """
    partial = path.with_name(f"{TEMPORARY}{path.name}")
    try:
        partial.mkdir()
        for name, content in files.items():
            write_durably(partial / name, content)
        rename_folder(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def rename_folder(partial: Path, path: Path) -> None:
    """Gives a folder that is complete its real name, durably."""
    sync_folder(partial)
    os.rename(partial, path)
    sync_folder(path.parent)


def remove_folder(path: Path) -> None:
    """Deletes a folder; a kill in between leaves a temporary name, not half a folder under its real name."""
    leaving = path.with_name(f"{TEMPORARY}old-{path.name}")
    os.rename(path, leaving)
    shutil.rmtree(leaving)


def remove_temporaries(folder: Path) -> None:
    """Deletes what killed processes left in a folder. Only the holder of the run's lock may call this."""
    for path in folder.glob(f"{TEMPORARY}*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def write_durably(path: Path, content: bytes) -> None:
    """Writes and fsyncs one file."""
    with open(path, "wb", buffering=0) as file:
        write_all(file.fileno(), content)
        os.fsync(file.fileno())


def write_all(descriptor: int, content: bytes | memoryview) -> None:
    """Writes every byte: the system may take only a part of what it is given, for example on a nearly full disk."""
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def sync_folder(path: Path) -> None:
    """Makes the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
