"""A run's folder: refusals, locking, cleaning up, and full disks."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from omninorm.errors import RunError
from omninorm.experiments import RunFolder, build_optimizer, fresh_folder, is_finished, run_folder, save_checkpoint
from omninorm.experiments.run_folder import read_config

CONFIG = {"model": {}}


def _tree(path: Path) -> list[str]:
    return sorted(str(each.relative_to(path)) for each in path.rglob("*"))


def test_a_new_folder_has_its_files_and_opens_again(tmp_path):
    path = tmp_path / "a" / "run"
    RunFolder.create(path, CONFIG, {"tokenizer.json": b"{}"}).close()
    assert _tree(path) == [".lock", "config.json", "record.jsonl", "tokenizer.json"]
    with RunFolder(path) as run:
        assert run.newest() is None


def test_an_empty_folder_may_be_used(tmp_path):
    RunFolder.create(tmp_path, CONFIG, {}).close()
    assert (tmp_path / "config.json").exists()


def test_a_folder_that_is_not_empty_is_refused_and_unchanged(tmp_path):
    (tmp_path / "thesis.txt").write_text("do not touch")
    with pytest.raises(RunError, match=r"'thesis\.txt'"):
        RunFolder.create(tmp_path, CONFIG, {})
    assert _tree(tmp_path) == ["thesis.txt"]


@pytest.mark.parametrize("below", ["file.txt", "file.txt/run", "file.txt/a/b"])
def test_a_folder_that_cannot_be_made_is_refused(tmp_path, below):
    (tmp_path / "file.txt").write_text("a file")
    with pytest.raises(RunError, match=r"file\.txt"):
        RunFolder.create(tmp_path / below, CONFIG, {})
    assert _tree(tmp_path) == ["file.txt"]


def test_an_unwritable_folder_is_refused():
    # The tests may run as root, whom no permission stops; the kernel's own file system does.
    with pytest.raises(RunError, match="/proc/omninorm-run"):
        RunFolder.create(Path("/proc/omninorm-run"), CONFIG, {})


@pytest.mark.slow
def test_a_second_writer_is_refused_until_the_first_is_gone(tmp_path):
    code = f"""
        import sys, time
        from pathlib import Path
        from omninorm.experiments.run_folder import RunFolder
        run = RunFolder.create(Path({str(tmp_path / "run")!r}), {{}}, {{}})
        print("locked", flush=True)
        sys.stdin.read()
    """
    holder = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "locked\n"
        before = _tree(tmp_path)
        with pytest.raises(RunError, match=f"Another process is writing the run in {tmp_path}"):
            RunFolder(tmp_path / "run")
        assert _tree(tmp_path) == before
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    RunFolder(tmp_path / "run").close()


def test_files_left_by_a_killed_process_are_removed(tmp_path):
    RunFolder.create(tmp_path, CONFIG, {}).close()
    left = tmp_path / "checkpoints" / ".tmp-step-5"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".tmp-config.json").write_bytes(b"{")
    RunFolder(tmp_path).close()
    assert _tree(tmp_path) == [".lock", "checkpoints", "config.json", "record.jsonl"]


def test_a_folder_with_only_leftovers_of_a_killed_process_counts_as_empty(tmp_path):
    (tmp_path / ".lock").touch()
    (tmp_path / ".tmp-config.json").write_bytes(b"{")
    RunFolder.create(tmp_path, CONFIG, {}).close()
    assert _tree(tmp_path) == [".lock", "config.json", "record.jsonl"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no readable config.json"),
        (b"{", "config.json must be JSON"),
        (b"[]", "must have format 1, got list"),
        (b'{"format": 2}', "must have format 1, got format 2"),
        (b'{"format": true}', "must have format 1, got format True"),
    ],
)
def test_a_folder_that_is_not_a_run_is_refused_and_unchanged(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    before = _tree(tmp_path)
    with pytest.raises(RunError, match=message):
        RunFolder(tmp_path)
    assert _tree(tmp_path) == before


def test_fresh_names_count_up(tmp_path):
    assert fresh_folder("kjv", tmp_path).name == "kjv-1"
    (tmp_path / "kjv-1").mkdir()
    (tmp_path / "kjv-2").symlink_to("nowhere")
    assert fresh_folder("kjv", tmp_path).name == "kjv-3"


def test_a_run_is_finished_with_its_last_event_and_a_whole_last_checkpoint(tmp_path, model, small):
    with RunFolder.create(tmp_path, {"train": {"steps": 2}}, {}) as run:
        run.record.append({"kind": "step", "step": 2})
        optimizer = build_optimizer(model, small)
        save_checkpoint(run.checkpoints, 1, model, optimizer, keep=2)
        last = save_checkpoint(run.checkpoints, 2, model, optimizer, keep=2)
        assert not is_finished(tmp_path)
        run.record.append({"kind": "finished", "step": 2})
        assert is_finished(tmp_path)
        content = (last / "model.safetensors").read_bytes()
        (last / "model.safetensors").write_bytes(content[:-1])
        assert not is_finished(tmp_path)
        shutil.rmtree(last)
        assert not is_finished(tmp_path)
        shutil.rmtree(run.checkpoints)
        assert not is_finished(tmp_path)


def test_a_folder_that_another_process_has_just_locked_is_unchanged(tmp_path, monkeypatch):
    """Another process makes the folder after this one has looked, and has the lock but has written nothing yet."""
    path, check, winner = tmp_path / "run", run_folder._check_empty, contextlib.ExitStack()

    def lose(folder):
        check(folder)
        folder.mkdir()
        winner.enter_context(run_folder.locked(folder))

    monkeypatch.setattr(run_folder, "_check_empty", lose)
    with winner:
        with pytest.raises(RunError, match="Another process is writing the run in"):
            RunFolder.create(path, CONFIG, {})
        assert _tree(tmp_path) == ["run", "run/.lock"]


def test_a_lock_file_that_was_removed_meanwhile_does_not_count(tmp_path, monkeypatch):
    RunFolder.create(tmp_path, CONFIG, {}).close()
    monkeypatch.setattr("fcntl.flock", lambda descriptor, operation: (tmp_path / ".lock").unlink())
    with pytest.raises(RunError, match="Another process is writing the run in"):
        RunFolder(tmp_path)


def test_a_run_whose_record_cannot_be_created_leaves_nothing(tmp_path, monkeypatch):
    def refuse(path):
        raise RunError("a record must be writable", "a full disk", "free some space")

    monkeypatch.setattr(run_folder, "Record", refuse)
    (tmp_path / "there").mkdir()
    for name in ("new", "there"):
        with pytest.raises(RunError, match="a full disk"):
            RunFolder.create(tmp_path / name, CONFIG, {"tokenizer.json": b"{}"})
    assert _tree(tmp_path) == ["there"]


def test_a_folder_name_that_is_not_utf8_is_kept(tmp_path):
    name = os.fsdecode(b"run\xff")
    RunFolder.create(tmp_path / name, {"command": [name]}, {}).close()
    assert read_config(tmp_path / name)["command"] == [name]


@pytest.mark.parametrize("use", [RunFolder, is_finished, lambda path: RunFolder.create(path, CONFIG, {})])
def test_a_name_that_is_too_long_is_refused(tmp_path, use):
    with pytest.raises(RunError, match="File name too long"):
        use(tmp_path / ("x" * 300))


@pytest.fixture
def file_limit():
    """Limits how large a file of this process may grow; writing beyond it fails as a full disk does."""
    earlier = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, earlier[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, earlier)


def test_a_folder_that_cannot_be_filled_is_not_left_behind(tmp_path, file_limit):
    file_limit(100)
    with pytest.raises(RunError, match="File too large"):
        RunFolder.create(tmp_path / "run", {"filler": "x" * 1000}, {"tokenizer.json": b"{}"})
    file_limit(resource.RLIM_INFINITY)
    assert _tree(tmp_path) == []


def test_an_event_that_does_not_fit_leaves_no_half_line(tmp_path, file_limit):
    with RunFolder.create(tmp_path, CONFIG, {}) as run:
        run.record.append({"kind": "step", "step": 1})
        size = os.path.getsize(tmp_path / "record.jsonl")
        file_limit(size + 10)
        with pytest.raises(RunError, match="File too large"):
            run.record.append({"kind": "step", "step": 2})
        file_limit(resource.RLIM_INFINITY)
        assert os.path.getsize(tmp_path / "record.jsonl") == size
        run.record.append({"kind": "step", "step": 3})
    assert (tmp_path / "record.jsonl").read_text().endswith('1}\n{"kind": "step", "step": 3}\n')
