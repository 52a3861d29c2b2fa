"""A run's folder: config.json, record.jsonl, checkpoints/step-N/, and the lock that keeps a second writer out."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omninorm.errors import RunError
from omninorm.experiments.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from omninorm.experiments.files import TEMPORARY, remove_temporaries, write_file, writing
from omninorm.experiments.record import RECORD_FILE, Record, read_record

CONFIG_FILE = "config.json"
CHECKPOINTS = "checkpoints"
FORMAT = 1
_LOCK = ".lock"

__all__ = ["RunFolder", "fresh_folder", "list_checkpoints", "load_checkpoint", "save_checkpoint"]


class RunFolder:
    """The folder of a run that this process writes. Only one process can have it open; `close` lets it go.

    The lock is the kernel's (flock), so it ends with the process, however that dies.
    """

    def __init__(self, path: Path) -> None:
        """Takes over a folder that has a config.json: locks it and cleans up after a killed process.

        Raises:
            RunError: no such run, or another process is at work on it.
        """
        self.path = path
        read_config(path)
        with contextlib.ExitStack() as stack:
            stack.enter_context(_locked(path))
            self._open(stack)

    @classmethod
    def create(cls, path: Path, config: Mapping[str, Any], files: Mapping[str, bytes]) -> RunFolder:
        """Makes a new folder with config.json and `files`.

        Raises:
            RunError: the folder has something in it, can't be written, or the disk is full. What was made is
                removed again.
        """
        run = cls.__new__(cls)
        run.path = path
        made = not path.exists()
        _check_empty(path)
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(_locked(path))
                _check_empty(path)  # again: until the lock was held another process could fill it
                run._write(config, files)
                run._open(stack)
        except BaseException:
            if made and not _entries(path):
                shutil.rmtree(path, ignore_errors=True)
            raise
        return run

    def _write(self, config: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
        with writing(self.path):
            remove_temporaries(self.path)
            try:
                for name, content in files.items():
                    write_file(self.path / name, content)
                # Last, since it is what makes the folder a run.
                text = json.dumps({"format": FORMAT, **config}, indent=2, ensure_ascii=False)
                write_file(self.path / CONFIG_FILE, text.encode())
            except BaseException:
                for name in (*files, _LOCK):
                    (self.path / name).unlink(missing_ok=True)
                raise

    def _open(self, stack: contextlib.ExitStack) -> None:
        with writing(self.path):
            remove_temporaries(self.path)
            remove_temporaries(self.checkpoints)
        self.record = Record(self.path / RECORD_FILE)
        stack.callback(self.record.close)
        self._resources = stack.pop_all()

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    def newest(self) -> int | None:
        """Step of the newest checkpoint, or None if there is none."""
        steps = list_checkpoints(self.checkpoints)
        return steps[-1] if steps else None

    def close(self) -> None:
        """Closes the record and releases the lock."""
        self._resources.close()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_config(path: Path) -> dict[str, Any]:
    """A run's config.json.

    Raises:
        RunError: there is no such run, or the file is damaged or of another format.
    """
    file = path / CONFIG_FILE
    try:
        config = json.loads(file.read_bytes())
    except OSError as error:
        remedy = "name the folder that omninorm train wrote"
        raise RunError(f"a run's folder must have a {CONFIG_FILE}", f"{error.strerror} at {file}", remedy) from error
    except ValueError as error:
        raise RunError(f"{CONFIG_FILE} must be JSON", f"{error} in {file}", "restore the file") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        received = f"{config.get('format')!r}" if isinstance(config, dict) else type(config).__name__
        remedy = "use the version of omninorm that wrote it"
        raise RunError(f"{CONFIG_FILE} must have format {FORMAT}", f"{received} in {file}", remedy)
    return config


def fresh_folder(name: str, parent: Path = Path("runs")) -> Path:
    """The first of runs/name-1, runs/name-2, … that does not exist."""
    number = 1
    while os.path.lexists(parent / f"{name}-{number}"):
        number += 1
    return parent / f"{name}-{number}"


def is_finished(path: Path) -> bool:
    """Whether the run in `path` has done all its steps."""
    return any(event["kind"] == "finished" for event in read_record(path / RECORD_FILE))


def _check_empty(path: Path) -> None:
    if entries := _entries(path):
        received = f"{path} with {entries[0]!r} in it"
        remedy = "choose another folder, or resume the run that is in it"
        raise RunError("a new run needs an empty or a new folder", received, remedy)


def _entries(path: Path) -> list[str]:
    """What is in a folder, apart from what a process that was killed at the very start may have left."""
    try:
        names = sorted(os.listdir(path)) if os.path.lexists(path) else []
    except OSError as error:
        remedy = "choose another folder"
        raise RunError("a new run needs a folder", f"{error.strerror!r} at {path}", remedy) from error
    return [name for name in names if name != _LOCK and not name.startswith(TEMPORARY)]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            remedy = "wait for it, stop it, or choose another folder"
            raise RunError("only one process may write a run", f"another one at work on {path}", remedy) from error
        yield
    finally:
        os.close(descriptor)
