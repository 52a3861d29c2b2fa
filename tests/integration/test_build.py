"""setup.py builds the operators or writes down why not, and removes the results of earlier builds."""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")

# The smallest operators that have the three sources' parts.
KERNELS = """
namespace omninorm { namespace OMNINORM_SET { int answer() { return 42; } } }
"""
SELECT = """
#if defined(OMNINORM_HAS_BASELINE)
namespace omninorm { namespace baseline { int answer(); } }
int answer() { return omninorm::baseline::answer(); }
#else
namespace omninorm { namespace neon { int answer(); } }
int answer() { return omninorm::neon::answer(); }
#endif
"""
OPERATORS = """
#include <torch/csrc/stable/library.h>
#include "answer.h"
int64_t f(int64_t x) { return x + answer(); }
STABLE_TORCH_LIBRARY(omninorm_test_build, m) { m.def("f(int x) -> int"); }
STABLE_TORCH_LIBRARY_IMPL(omninorm_test_build, CompositeExplicitAutograd, m) { m.impl("f", TORCH_BOX(&f)); }
"""
USE = "import sys, torch; torch.ops.load_library(sys.argv[1]); print(torch.ops.omninorm_test_build.f(1))"


@pytest.fixture
def setup_py(monkeypatch):
    """setup.py as a module."""
    for name in ("CXX", "CXXFLAGS", "LDFLAGS", "OMNINORM_BUILD"):
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("omninorm_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Repository:
    """A copy of what setup.py needs, with tiny operators."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, root / name)
        package = root / "src" / "omninorm"
        (package / "kernels").mkdir(parents=True)
        shutil.copy(ROOT / "src" / "omninorm" / "__init__.py", package)
        (package / "kernels" / "__init__.py").touch()
        self.library = package / "kernels" / "_cpu.so"
        self.note = package / "kernels" / "_cpu_missing.txt"
        (root / "csrc").mkdir()
        sources = {
            "kernels.cpp": KERNELS,
            "select.cpp": SELECT,
            "operators.cpp": OPERATORS,
            "answer.h": "int answer();",
        }
        for name, text in sources.items():
            (root / "csrc" / name).write_text(text)

    def setup(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
        """Run setup.py in an environment in which only these build variables are set."""
        ours = ("CXX", "CXXFLAGS", "LDFLAGS", "OMNINORM_BUILD")
        environment = {name: value for name, value in os.environ.items() if name not in ours}
        command = [sys.executable, "setup.py", "--quiet", *arguments]
        return subprocess.run(command, cwd=self.root, env=environment | variables, capture_output=True, text=True)

    def build(self, **variables: str) -> subprocess.CompletedProcess:
        return self.setup("build_ext", "--inplace", **variables)

    def pretend(self) -> None:
        """Pretend that earlier builds left results."""
        self.library.write_text("stale")
        self.note.write_text("stale")


@pytest.fixture
def repository(tmp_path):
    return Repository(tmp_path)


def torch_folder(parent: Path, version: str, headers: bool = True) -> str:
    stable = parent / "torch" / "include" / "torch" / "csrc" / "stable"
    stable.mkdir(parents=True)
    (parent / "torch" / "version.py").write_text(f"__version__ = '{version}'\n")
    if headers:
        (stable / "library.h").touch()
    return str(parent)


def test_torch_is_found_without_importing_it(setup_py):
    assert setup_py.find_torch(setup_py.package_folders()) == Path(torch.__file__).parent


def test_the_first_usable_torch_is_found(setup_py, tmp_path):
    old = torch_folder(tmp_path / "old", "2.9.1+cu128")
    bare = torch_folder(tmp_path / "bare", "2.11.0", headers=False)
    good = torch_folder(tmp_path / "good", "2.10.0a0+git1")
    other = torch_folder(tmp_path / "other", "3.0.0")
    assert setup_py.find_torch([str(tmp_path), old, bare, good, other]) == tmp_path / "good" / "torch"


def test_an_unusable_torch_is_named_with_the_remedy(setup_py, tmp_path):
    old = torch_folder(tmp_path / "old", "2.9.1")
    bare = torch_folder(tmp_path / "bare", "2.11.0", headers=False)
    cases = [
        ([], "torch was not installed"),
        ([old], "torch 2.9.1 is too old"),
        ([bare], "torch 2.11.0 was installed without its C++ headers"),
    ]
    for folders, reason in cases:
        with pytest.raises(setup_py.UnavailableError) as caught:
            setup_py.find_torch(folders)
        assert str(caught.value).startswith(reason)
        assert "Install torch >= 2.10, then reinstall omninorm with pip install --force-reinstall" in str(caught.value)
        assert "--no-build-isolation" in str(caught.value)


def test_instruction_sets_that_the_compiler_refuses_are_skipped(setup_py, tmp_path, monkeypatch, capsys):
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\ncase "$*" in *-mavx512dq*) echo refused >&2; exit 1;; esac\n')
    compiler.chmod(0o755)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    sets = setup_py.supported_sets([str(compiler)])
    assert list(sets) == ["baseline", "avx2"]
    assert "no avx512 operators" in capsys.readouterr().err
    select, *kernels = setup_py.kernel_jobs(sets, "", [])
    defined = [flag for flag in select.flags if flag.startswith("-DOMNINORM")]
    assert defined == ["-DOMNINORM_HAS_BASELINE", "-DOMNINORM_HAS_AVX2"]
    assert [job.flags[-1] for job in kernels] == ["-DOMNINORM_SET=baseline", "-DOMNINORM_SET=avx2"]


def test_the_first_instruction_set_needs_no_flags(setup_py):
    """The linker keeps only the first of equal inline functions, and this one must run on every processor."""
    assert all(next(iter(sets.values())) == "" for sets in setup_py.SETS.values())


def test_an_unknown_machine_is_named(setup_py, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with pytest.raises(setup_py.UnavailableError, match=r"don't support .* on riscv64"):
        setup_py.supported_sets(["c++"])


def test_without_a_compiler_a_note_holds_the_reason(repository):
    repository.pretend()
    done = repository.build(CXX="/nonexistent")
    assert done.returncode == 0, done.stderr
    why = repository.note.read_text()
    assert why == (
        "No C++ compiler found: the compiler of CXX=/nonexistent. Install g++ or clang++, or set CXX, "
        "then reinstall omninorm with pip install --force-reinstall --no-deps --no-cache-dir.\n"
    )
    assert f"omninorm is installed without its C++ operators, so its norms are slower. {why}" in done.stderr
    assert not repository.library.exists()


def test_omninorm_build_is_obeyed_or_refused(repository):
    done = repository.build(OMNINORM_BUILD="0")
    assert done.returncode == 0, done.stderr
    assert "OMNINORM_BUILD=0. Unset it, then " in repository.note.read_text()

    repository.pretend()
    done = repository.build(OMNINORM_BUILD="1", CXX="/nonexistent")
    assert done.returncode != 0
    assert "OMNINORM_BUILD=1 requires them. No C++ compiler found: the compiler of CXX=/nonexistent." in done.stderr
    assert not repository.library.exists()
    assert not repository.note.exists()

    done = repository.build(OMNINORM_BUILD="yes")
    assert done.returncode != 0
    assert "OMNINORM_BUILD must be 0, 1 or empty, got 'yes'" in done.stderr


@needs_compiler
def test_a_broken_source_leaves_a_note_and_a_fixed_one_a_library(repository):
    repository.pretend()
    assert repository.build(OMNINORM_BUILD="1").stderr == ""
    assert not repository.note.exists()
    used = subprocess.run([sys.executable, "-c", USE, str(repository.library)], capture_output=True, text=True)
    assert used.stdout == "43\n", used.stderr

    kernels = repository.root / "csrc" / "kernels.cpp"
    kernels.write_text("int broken(\n")
    assert repository.build().returncode == 0
    assert not repository.library.exists()
    why = repository.note.read_text()
    assert why.startswith("Compiling kernels-")
    assert "csrc/kernels.cpp:" in why
    assert why.count("\n") == 1

    kernels.write_text(KERNELS)
    assert repository.build(OMNINORM_BUILD="1").returncode == 0
    assert repository.library.exists()
    assert not repository.note.exists()


@pytest.mark.slow
@needs_compiler
def test_only_what_changed_is_compiled(repository):
    def objects() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in repository.root.glob("build/operators/*.o")}

    repository.build(OMNINORM_BUILD="1")
    before = objects()
    repository.build(OMNINORM_BUILD="1")
    assert objects() == before

    (repository.root / "csrc" / "answer.h").write_text("int answer(); int more();")
    repository.build(OMNINORM_BUILD="1")
    after = objects()
    assert len(after) == len(before) >= 3
    assert [name.split("-")[0] for name in set(after) - set(before)] == ["operators"]


@pytest.mark.slow
@needs_compiler
def test_a_wheel_is_tagged_by_its_content(repository):
    def wheel(**variables: str) -> tuple[str, set[str]]:
        done = repository.setup("bdist_wheel", "--dist-dir", "wheels", **variables)
        assert done.returncode == 0, done.stderr
        (made,) = (repository.root / "wheels").iterdir()
        with zipfile.ZipFile(made) as archive:
            names = {Path(name).name for name in archive.namelist() if Path(name).name.startswith("_cpu")}
        made.unlink()
        return made.stem.split("-", 2)[2], names

    tag, names = wheel(OMNINORM_BUILD="1")
    assert tag.startswith("py3-none-")
    assert tag != "py3-none-any"
    assert names == {"_cpu.so"}
    assert wheel(OMNINORM_BUILD="0") == ("py3-none-any", {"_cpu_missing.txt"})
