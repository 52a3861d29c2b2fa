"""The folder of a run: config.json, record.jsonl, checkpoints/step-N/, and a lock against a second writer."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omninorm.errors import RunError
from omninorm.experiments.checkpoint import is_whole, list_checkpoints, load_checkpoint, save_checkpoint
from omninorm.monitor.writer import record_name
from omninorm.record import RECORD_FILE, Record, final_status
from omninorm.record.files import TEMPORARY, remove_temporaries, write_file, writing

CONFIG_FILE = "config.json"
CHECKPOINTS = "checkpoints"
FORMAT = 1
_LOCK = ".lock"
_OWN = (CONFIG_FILE, RECORD_FILE, _LOCK)

__all__ = ["RunFolder", "fresh_folder", "list_checkpoints", "load_checkpoint", "save_checkpoint"]


class FolderTakenError(RunError):
    """The folder holds another run, or another process is creating one there."""


class RunFolder:
    """The folder of a run that this process writes. Only one process can open it at a time; `close` releases it.

    The lock is flock's: the kernel releases it when the process ends, for any reason.
    """

    _created: tuple[tuple[str, ...], bool] | None = None

    def __init__(self, path: Path) -> None:
        """Open a folder that has a config.json: lock it and clean up after a killed process.

        Raises:
            RunError: the folder has no run, or another process is writing it.
        """
        self.path = path
        read_config(path)
        with contextlib.ExitStack() as stack:
            stack.enter_context(locked(path))
            self._open(stack)
            self._resources = stack.pop_all()

    @classmethod
    def follow(cls, path: Path, rank: int) -> RunFolder:
        """Return the folder of a run that another process writes; this process only writes a separate record.

        Args:
            path: the folder.
            rank: the number of this process, which is part of the record's name.
        """
        run = cls.__new__(cls)
        run.path = path
        run.record = Record(path / record_name(rank))
        run._resources = contextlib.ExitStack()
        run._resources.callback(run.record.close)
        return run

    @classmethod
    def create(cls, path: Path, config: Mapping[str, Any], files: Mapping[str, bytes]) -> RunFolder:
        """Create a folder with config.json and `files`.

        Raises:
            RunError: the folder can't be written, or the disk is full. Everything created is removed again.
            FolderTakenError: the folder is not empty, or another process is creating a run there.
        """
        run = cls.__new__(cls)
        run.path = path
        _check_empty(path)
        made = _make_folder(path)
        with contextlib.ExitStack() as stack:
            stack.enter_context(locked(path))
            _check_empty(path)  # again, because another process may have written to it before the lock was held
            try:
                run._open(stack)
                run._write(config, files)
            except BaseException:
                _undo(path, (*files, *_OWN), made)
                raise
            run._created = (*files, *_OWN), made
            run._resources = stack.pop_all()
        return run

    def _write(self, config: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
        with writing(self.path):
            for name, content in files.items():
                write_file(self.path / name, content)
        # Written last, because this file makes the folder a run.
        self.rewrite_config(config)

    def rewrite_config(self, config: Mapping[str, Any]) -> None:
        """Replace config.json. If the process is killed, there is either the old file or the new one.

        Raises:
            RunError: the folder can't be written, or the disk is full.
        """
        # ASCII, because a file name may contain invalid bytes; Python reads them as surrogates, which JSON can escape.
        text = json.dumps({"format": FORMAT, **config}, indent=2)
        with writing(self.path):
            write_file(self.path / CONFIG_FILE, text.encode())

    def _open(self, stack: contextlib.ExitStack) -> None:
        with writing(self.path):
            remove_temporaries(self.path)
            remove_temporaries(self.checkpoints)
        self.record = Record(self.path / RECORD_FILE)
        stack.callback(self.record.close)

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    def newest(self) -> int | None:
        """Return the step of the newest checkpoint, or None."""
        steps = list_checkpoints(self.checkpoints)
        return steps[-1] if steps else None

    def discard(self) -> None:
        """Remove what `create` and the run's other processes wrote, if the run has no checkpoint yet.

        A run that was opened, not created, is left alone.
        """
        if self._created is not None and self.newest() is None:
            names, made = self._created
            records = (path.name for path in self.path.glob("record-rank*.jsonl"))
            _undo(self.path, (*names, *records), made)

    def close(self) -> None:
        """Close the record and release the lock."""
        self._resources.close()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_config(path: Path) -> dict[str, Any]:
    """Return a run's config.json.

    Raises:
        RunError: the folder has no run, or the file is damaged or has another format.
    """
    file = path / CONFIG_FILE
    try:
        config = json.loads(file.read_bytes())
    except OSError as error:
        remedy = "pass a folder that omninorm train wrote"
        if isinstance(error, FileNotFoundError) and not os.path.lexists(path):
            raise RunError(f"No such file or folder: {path}", "", remedy) from error
        reason = "" if isinstance(error, FileNotFoundError) else f" ({error.strerror})"
        raise RunError(
            f"{path} is not the folder of a run: it has no readable {CONFIG_FILE}{reason}", "", remedy
        ) from error
    except (ValueError, RecursionError) as error:
        reason = str(error) or type(error).__name__
        raise RunError(f"{file} must be JSON", f"{reason:.200}", "restore the file") from error
    if isinstance(config, dict) and "model_type" in config and "format" not in config:
        remedy = "pass a folder that omninorm train wrote, or load the model with omninorm.Thinker.from_pretrained"
        raise RunError(f"{path} holds a Hugging Face model, not a run", "", remedy)
    if not isinstance(config, dict) or type(config.get("format")) is not int or config["format"] != FORMAT:
        received = f"format {config.get('format')!r:.60}" if isinstance(config, dict) else type(config).__name__
        remedy = "use the version of omninorm that wrote it"
        raise RunError(f"{file} must have format {FORMAT}", received, remedy)
    return config


def fresh_folder(name: str, parent: Path = Path("runs")) -> Path:
    """Return the first of runs/name-1, runs/name-2, … that does not exist."""
    number = 1
    while os.path.lexists(parent / f"{name}-{number}"):
        number += 1
    return parent / f"{name}-{number}"


def is_finished(path: Path) -> bool:
    """Return whether the run in `path` has done all its steps and has a complete checkpoint of the last one.

    Raises:
        RunError: the folder has no run, or its record is damaged.
    """
    train = read_config(path).get("train")
    last = train.get("steps") if isinstance(train, dict) else None
    if final_status(path / RECORD_FILE) != "finished":
        return False
    folder = path / CHECKPOINTS
    steps = list_checkpoints(folder)
    return bool(steps) and steps[-1] == last and is_whole(folder, steps[-1])


def is_run(folder: str | os.PathLike[str]) -> bool:
    """Return whether a folder looks like a run, complete or incomplete, without reading files."""
    config, *others = (os.path.join(folder, name) for name in (CONFIG_FILE, RECORD_FILE, CHECKPOINTS))
    return os.path.lexists(config) and any(map(os.path.lexists, others))


def _check_empty(path: Path) -> None:
    if entries := _entries(path):
        remedy = "choose another folder, or resume the run in it with --resume"
        raise FolderTakenError(f"A new run needs a new or an empty folder: {path} has {entries[0]!r} in it", "", remedy)


def _entries(path: Path) -> list[str]:
    """Return the names in a folder, except those of files that a process killed at its start may have left."""
    try:
        names = sorted(os.listdir(path)) if os.path.lexists(path) else []
    except OSError as error:
        invariant = f"Cannot use {path} as the folder of a run ({error.strerror})"
        raise RunError(invariant, "", "choose another folder") from error
    return [name for name in names if name != _LOCK and not name.startswith(TEMPORARY)]


def _make_folder(path: Path) -> bool:
    """Create a folder and its parents; return False if it exists, also if another process has just created it."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            path.mkdir()
        except FileExistsError:
            return False
    return True


def _undo(path: Path, names: Sequence[str], made: bool) -> None:
    """Remove what a failed creation wrote. Only for the holder of the lock, and only if the folder was empty before."""
    for name in names:
        (path / name).unlink(missing_ok=True)
    if made:
        with contextlib.suppress(OSError):  # not empty: another process has written something
            path.rmdir()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Lock a folder against other processes inside the block.

    Raises:
        FolderTakenError: another process holds the lock.
    """
    with writing(path):
        descriptor = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if not _lock(descriptor, path / _LOCK):
            remedy = "wait for it, stop it, or choose another folder"
            raise FolderTakenError(f"Another process is writing the run in {path}", "", remedy)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, path: Path) -> bool:
    """Lock an open file; return False if another process has locked it, or has removed it since it was opened."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except (BlockingIOError, FileNotFoundError):
        return False
