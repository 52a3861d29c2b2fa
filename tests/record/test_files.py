"""Atomic writes of files and folders: pipes, failures, and what a killed process has left."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from omninorm.errors import RunError
from omninorm.record import Record
from omninorm.record.files import remove_folder, remove_temporaries, write_file, write_folder, writing


def test_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_file(path, b"content")
        assert os.read(reader, 100) == b"content"
    finally:
        os.close(reader)
    assert path.is_fifo()
    assert list(tmp_path.iterdir()) == [path]


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "page"
    write_file(path, b"one")
    write_file(path, b"two")
    assert path.read_bytes() == b"two"

    def fail(*names: object) -> None:
        raise OSError("full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="full"):
        write_file(path, b"three")
    assert path.read_bytes() == b"two"
    assert list(tmp_path.iterdir()) == [path]


def test_next_write_replaces_what_a_kill_left(tmp_path: Path) -> None:
    (tmp_path / ".tmp-report.html").write_bytes(b"half of a longer page")
    write_file(tmp_path / "report.html", b"page")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_bytes() == b"page"


def test_opening_a_record_removes_an_abandoned_page_but_not_one_being_written(tmp_path: Path) -> None:
    page, foreign = tmp_path / ".tmp-report.html", tmp_path / ".tmp-of-another-program"
    page.write_bytes(b"half")
    foreign.write_bytes(b"")
    with open(page, "rb") as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)
        Record(tmp_path / "record.jsonl").close()
        assert page.exists()
    Record(tmp_path / "record.jsonl").close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [foreign.name, "record.jsonl"]


def test_package_is_imported_and_writes_without_locks_where_there_is_no_fcntl(tmp_path: Path) -> None:
    """This is so on Windows; the test runs in a separate process."""
    (tmp_path / ".tmp-report.html").write_bytes(b"half")
    program = """
import sys
from pathlib import Path
sys.modules["fcntl"] = None
import omninorm, omninorm.monitor, omninorm.report
from omninorm.record import Record, files
folder = Path(sys.argv[1])
Record(folder / "record.jsonl").close()
assert (folder / ".tmp-report.html").exists()
files.write_file(folder / "report.html", b"page")
"""
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)
    assert (tmp_path / "report.html").read_bytes() == b"page"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["record.jsonl", "report.html"]


def test_symbolic_link_under_the_temporary_name_is_not_followed(tmp_path: Path) -> None:
    victim, page = tmp_path / "victim", tmp_path / "report.html"
    victim.write_bytes(b"untouched")
    page.write_bytes(b"old")
    (tmp_path / ".tmp-report.html").symlink_to(victim)
    with pytest.raises(RunError), writing(page):
        write_file(page, b"new")
    assert (victim.read_bytes(), page.read_bytes()) == (b"untouched", b"old")


def test_holder_of_the_lock_removes_all_temporaries(tmp_path: Path) -> None:
    (tmp_path / ".tmp-config.json").write_bytes(b"half")
    (tmp_path / ".tmp-step-3").mkdir()
    (tmp_path / ".tmp-step-3" / "model").write_bytes(b"half")
    (tmp_path / "kept").write_bytes(b"")
    remove_temporaries(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_folders_are_written_and_removed_despite_what_a_kill_left(tmp_path: Path) -> None:
    for name in (".tmp-step-3", ".tmp-old-step-3"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_bytes(b"")
    write_folder(tmp_path / "step-3", {"model": b"weights"})
    assert [path.name for path in (tmp_path / "step-3").iterdir()] == ["model"]
    remove_folder(tmp_path / "step-3")
    assert list(tmp_path.iterdir()) == []


def test_writers_of_the_same_file_do_not_mix_their_contents(tmp_path: Path) -> None:
    contents = [bytes([letter]) * 300_000 for letter in b"abcd"]
    path = tmp_path / "report.html"
    writers = [
        threading.Thread(target=lambda mine=mine: [write_file(path, mine) for _ in range(5)]) for mine in contents
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert path.read_bytes() in contents
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("number", "remedy"), [(28, "free some disk space"), (27, "ulimit -f"), (13, "choose another folder")]
)
def test_error_while_writing_names_the_path_the_reason_and_a_remedy(tmp_path: Path, number: int, remedy: str) -> None:
    with pytest.raises(RunError) as error, writing(tmp_path / "record.jsonl"):
        raise OSError(number, os.strerror(number))
    assert str(tmp_path / "record.jsonl") in error.value.invariant
    assert os.strerror(number) in error.value.invariant
    assert remedy in error.value.remedy
