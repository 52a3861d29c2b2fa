"""Atomic file writes: a crash, a kill or a full disk never leaves an incomplete file under its final name."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from omninorm.errors import RunError

try:
    import fcntl
except ImportError:  # Windows has no fcntl; files are written without locks there.
    fcntl = None  # type: ignore[assignment]

TEMPORARY = ".tmp-"
_FULL = (errno.ENOSPC, errno.EDQUOT)
# The temporary names are predictable, so another user may have created a symbolic link with such a name.
_NO_LINKS = getattr(os, "O_NOFOLLOW", 0)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError raised inside the block into a RunError with the path and a remedy."""
    try:
        yield
    except OSError as error:
        remedy = "choose another folder"
        if error.errno in _FULL:
            remedy = "free some disk space and resume; files that were complete are intact"
        elif error.errno == errno.EFBIG:
            remedy = "raise the limit on file sizes (ulimit -f) and resume"
        raise RunError(f"Cannot write {path}: {error.strerror or error}", "", remedy) from error


def write_file(path: Path, content: bytes) -> None:
    """Write a file under a temporary name next to it, sync it to disk, and rename it.

    If another process is writing the same file, this function waits. A temporary file that a killed process left is
    overwritten. A pipe or a character device, such as /dev/null, is written to directly, because a rename would replace
    it.

    Raises:
        OSError: the disk is full, the folder cannot be written, or the temporary name is a symbolic link. The old
            file is unchanged.
    """
    if path.exists() and (path.is_fifo() or path.is_char_device()):
        path.write_bytes(content)
        return
    partial = path.with_name(f"{TEMPORARY}{path.name}")
    with _claimed(partial) as descriptor:
        try:
            os.ftruncate(descriptor, 0)
            write_all(descriptor, content)
            os.fsync(descriptor)
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    sync_folder(path.parent)


@contextlib.contextmanager
def _claimed(path: Path) -> Iterator[int]:
    """Open or create a temporary file and lock it, so that no other process writes or removes it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | _NO_LINKS, 0o666)
        try:
            if fcntl is not None:
                with contextlib.suppress(OSError):  # some file systems have no locks
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
            # If another process held the lock before, it has renamed or removed the file since.
            if _is_open(path, descriptor):
                yield descriptor
                return
        finally:
            os.close(descriptor)


def _is_open(path: Path, descriptor: int) -> bool:
    """Return whether the path still leads to the open file."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def write_folder(path: Path, files: Mapping[str, bytes]) -> None:
    """Write a folder of files under a temporary name, sync it to disk, and rename it.

    A temporary folder that a killed process left is removed, so only one process may write a folder at a time.

    Raises:
        OSError: as for `write_file`, and if `path` already exists and is not empty.
    """
    partial = path.with_name(f"{TEMPORARY}{path.name}")
    if partial.is_dir():
        shutil.rmtree(partial)
    try:
        partial.mkdir()
        for name, content in files.items():
            write_durably(partial / name, content)
        rename_folder(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def rename_folder(partial: Path, path: Path) -> None:
    """Rename a complete folder to its final name and sync the rename to disk."""
    sync_folder(partial)
    os.rename(partial, path)
    sync_folder(path.parent)


def remove_folder(path: Path) -> None:
    """Delete a folder. It gets a temporary name first, so a kill leaves no incomplete folder under the final name."""
    leaving = path.with_name(f"{TEMPORARY}old-{path.name}")
    if leaving.is_dir():
        shutil.rmtree(leaving)
    os.rename(path, leaving)
    shutil.rmtree(leaving)


def remove_temporaries(folder: Path) -> None:
    """Delete temporary files that killed processes left in a folder. Only the holder of the lock may call this."""
    for path in folder.glob(f"{TEMPORARY}*"):
        if path.is_dir():
            shutil.rmtree(path)
    remove_abandoned_files(folder)


def remove_abandoned_files(folder: Path, names: str = "*") -> None:
    """Delete temporary files for these names that killed processes left; files that are being written are kept.

    Without locks, as on Windows, any file may be in use, so all are kept.
    """
    if fcntl is None:
        return
    for path in folder.glob(f"{TEMPORARY}{names}"):
        with contextlib.suppress(OSError):
            if path.is_symlink() or not path.is_file():
                continue
            descriptor = os.open(path, os.O_RDWR | _NO_LINKS)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            finally:
                os.close(descriptor)


def write_durably(path: Path, content: bytes) -> None:
    """Write and fsync one file."""
    with open(path, "wb", buffering=0) as file:
        write_all(file.fileno(), content)
        os.fsync(file.fileno())


def write_all(descriptor: int, content: bytes | memoryview) -> None:
    """Write every byte: a single system call may write only a part, for example on a nearly full disk."""
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def sync_folder(path: Path) -> None:
    """Sync the names in a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
