"""Builds the C++ operators for the CPU. Everything else about the package stands in pyproject.toml.

They are one library, which `torch.ops.load_library` loads: no Python module, and on PyTorch's stable ABI, so that it
works with every Python and with every torch from TARGET on. Where it cannot be built the package is installed
without it, and a file in its place says why.

OMNINORM_BUILD=0 leaves the operators out; with OMNINORM_BUILD=1 it is an error if they cannot be built.
CXX names the compiler; CXXFLAGS and LDFLAGS are added to its flags.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import platform
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from setuptools import Command, Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist
from setuptools.errors import CompileError, OptionError

ROOT = Path(__file__).resolve().parent
BUILD = ROOT / "build" / "operators"
LIBRARY = Path("omninorm", "kernels", "_cpu.so")
# What kernels/cpu.py reads when there is no library: the reason, in one line.
NOTE = LIBRARY.with_name("_cpu_missing.txt")

# The oldest torch whose headers will do, which is also the oldest that the library works with.
TARGET = (2, 10)
TARGET_MACRO = f"-DTORCH_TARGET_VERSION=0x{TARGET[0]:02x}{TARGET[1]:02x}000000000000"

# Contraction would give each instruction set its own roundings; what the kernels fuse they fuse by name.
# GCC's guesses about values that are never set are wrong about its own headers, and clang doesn't know the option.
FLAGS = """-O3 -std=c++17 -fPIC -fvisibility=hidden -ffp-contract=off -fno-math-errno -fno-trapping-math
    -Wall -Wextra -Wno-unknown-warning-option -Wno-maybe-uninitialized -Wno-uninitialized""".split()  # noqa: SIM905
SANITIZE = ["-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

# kernels.cpp is compiled once per set. The plainest set stands first, and is linked first: of an inline function that
# several objects have, the linker keeps the first, and that one must run everywhere.
X86 = {
    "baseline": "",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma -mf16c -mprefer-vector-width=512",
}
ARM = {"neon": ""}
SETS = {"x86_64": X86, "amd64": X86, "aarch64": ARM, "arm64": ARM}


class UnavailableError(Exception):
    """Why the operators cannot be built here, and what would help; as text, one line."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"{reason}; {remedy}")


def again(first: str) -> str:
    """The remedy: do this, then install anew. pip keeps the wheel that it built without the operators."""
    return f"{first}, then install omninorm again with pip's --force-reinstall --no-deps --no-cache-dir"


class Job(NamedTuple):
    """One source to compile."""

    name: str
    source: str
    flags: list[str]


def package_folders() -> list[str]:
    """Where packages are. In pip's isolated builds sys.path is not all: torch is in the environment outside."""
    outside = [*site.getsitepackages(), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    if sys.prefix == sys.base_prefix:  # else the user's packages belong to another environment
        outside.append(site.getusersitepackages())
    return list(dict.fromkeys([*sys.path, *outside]))


def find_torch(folders: Iterable[str]) -> Path:
    """The first torch in these folders whose headers will do, found without importing it."""
    wanted = f"torch >= {TARGET[0]}.{TARGET[1]}"
    reason = "torch was not there when omninorm was installed"
    for folder in (Path(name) / "torch" for name in folders):
        if not (folder / "version.py").is_file():
            continue
        found = re.search(r"__version__ = ['\"]((\d+)\.(\d+)[^'\"]*)", (folder / "version.py").read_text("utf-8"))
        if not found or (int(found[2]), int(found[3])) < TARGET:
            reason = f"torch was {found[1] if found else 'of unknown version'} when omninorm was installed"
        elif not (folder / "include" / "torch" / "csrc" / "stable" / "library.h").is_file():
            reason = f"torch {found[1]} was there without its C++ headers"
        else:
            return folder
    raise UnavailableError(reason, f"{again(f'install {wanted}')}, and --no-build-isolation where that is not enough")


def find_compiler() -> list[str]:
    """CXX, which may have arguments, or the first of the usual names."""
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    sought = f"CXX={shlex.join(named)} is not there" if named else "no C++ compiler was found (c++, g++, clang++)"
    raise UnavailableError(sought, again("install g++ or clang++, or name another with CXX"))


def run(command: list[str], what: str) -> str:
    """Run a compiler; what it prints. Paths are relative to ROOT, so that its messages and __FILE__ are too."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace")
    if done.stderr:
        print(done.stderr, file=sys.stderr)
    if done.returncode:
        lines = done.stderr.splitlines() or [f"exit status {done.returncode}"]
        reason = next((line for line in lines if "error" in line), lines[-1])
        raise UnavailableError(
            f"{what} failed: {reason.strip()}", "pip install -v shows all of it; CXX names another compiler"
        )
    return done.stdout


def supported_sets(compiler: list[str]) -> dict[str, list[str]]:
    """This machine's instruction sets that the compiler knows, each with its flags."""
    machine = platform.machine()
    if os.name != "posix" or machine.lower() not in SETS:
        raise UnavailableError(
            f"{platform.system()} on {machine} has no operators yet", "Linux and macOS on x86-64 and ARM do"
        )
    supported = {}
    for name, text in SETS[machine.lower()].items():
        flags = text.split()
        probe = [*compiler, *FLAGS, *flags, "-fsyntax-only", "-x", "c++", os.devnull]
        if not flags:
            run(probe, f"trying the compiler {shlex.join(compiler)}")
        elif subprocess.run(probe, capture_output=True).returncode:
            print(f"omninorm: {shlex.join(compiler)} does not know {text}: no {name} operators", file=sys.stderr)
            continue
        supported[name] = flags
    return supported


def compile_all(compiler: list[str], jobs: list[Job]) -> list[str]:
    """Compile side by side; the objects, in the order of the jobs."""
    version = run([*compiler, "--version"], "trying the compiler")
    BUILD.mkdir(parents=True, exist_ok=True)

    def compile_one(job: Job) -> str:
        command = [*compiler, *shlex.split(os.environ.get("CXXFLAGS", "")), *job.flags, job.source]
        # An object is named by all that it is made of, headers too, so there is never a doubt whether it is up to date.
        text = run([*command, "-E"], f"compiling {job.name}")
        made_of = hashlib.sha256("\0".join([version, shlex.join(command), text]).encode()).hexdigest()
        made = BUILD / f"{job.name}-{made_of[:16]}.o"
        if not made.exists():
            for old in BUILD.glob(f"{job.name}-*.o"):
                old.unlink(missing_ok=True)
            unfinished = made.with_suffix(f".{os.getpid()}")
            run([*command, "-c", "-o", str(unfinished)], f"compiling {job.name}")
            unfinished.replace(made)
        return str(made.relative_to(ROOT))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, jobs))


def kernel_jobs(sets: dict[str, list[str]], prefix: str, flags: list[str]) -> list[Job]:
    """What the library and the sanitizers' program have in common: the choice of a set, and each set's kernels."""
    known = [f"-DOMNINORM_HAS_{name.upper()}" for name in sets]
    kernels = [
        Job(f"{prefix}kernels-{name}", "csrc/kernels.cpp", [*FLAGS, *flags, *own, f"-DOMNINORM_SET={name}"])
        for name, own in sets.items()
    ]
    return [Job(f"{prefix}select", "csrc/select.cpp", [*FLAGS, *flags, *known]), *kernels]


def build_library(library: Path) -> None:
    """Compile and link the operators, or raise UnavailableError."""
    compiler = find_compiler()
    sets = supported_sets(compiler)
    torch = find_torch(package_folders())
    headers = ["-isystem", str(torch / "include"), TARGET_MACRO, f"-ffile-prefix-map={torch}=torch"]
    jobs = [Job("operators", "csrc/operators.cpp", [*FLAGS, *headers]), *kernel_jobs(sets, "", [])]
    objects = compile_all(compiler, jobs)
    # No rpath: torch is imported first, and its library is found because it is loaded already.
    link = ["-ltorch_cpu", f"-L{torch / 'lib'}", *shlex.split(os.environ.get("LDFLAGS", ""))]
    if sys.platform == "linux":
        link.append("-Wl,-z,defs")  # a symbol that nobody has is an error now, not when the library is loaded
    # Renamed into place: overwriting a library would crash the processes that use it.
    unfinished = library.with_suffix(f".{os.getpid()}")
    run([*compiler, "-shared", *objects, *link, "-o", str(unfinished.resolve())], "linking")
    unfinished.replace(library)


class BuildOperators(build_ext):
    """One library instead of a Python extension module, or a note that says why there is none."""

    made: Path | None = None

    def run(self) -> None:
        wish = os.environ.get("OMNINORM_BUILD", "")
        if wish not in ("", "0", "1"):
            raise OptionError(f"OMNINORM_BUILD must be 0, 1 or empty, not {wish!r}")
        package = ROOT / "src" if self.inplace else Path(self.build_lib)
        library, note = package / LIBRARY, package / NOTE
        library.parent.mkdir(parents=True, exist_ok=True)
        # Neither may outlive a build that ends the other way.
        library.unlink(missing_ok=True)
        note.unlink(missing_ok=True)
        try:
            if wish == "0":
                raise UnavailableError("OMNINORM_BUILD=0 left them out", again("unset it"))
            build_library(library)
            self.made = library
        except (UnavailableError, OSError) as why:
            if wish == "1":
                raise CompileError(f"OMNINORM_BUILD=1, but the C++ operators cannot be built: {why}") from why
            note.write_text(f"{why}\n", encoding="utf-8")
            self.made = note
            print(f"omninorm: installed without its C++ operators, in slower pure Python: {why}", file=sys.stderr)

    def get_outputs(self) -> list[str]:
        return list(self.get_output_mapping()) if self.inplace else [str(self.made)] if self.made else []

    def get_output_mapping(self) -> dict[str, str]:
        """For strict editable installs: where the file would be in a build folder, and where it is."""
        return {str(Path(self.build_lib) / LIBRARY.with_name(self.made.name)): str(self.made)} if self.made else {}


class Wheel(bdist_wheel):
    """A wheel for every Python, and for every platform if the operators were left out."""

    def run(self) -> None:
        self.run_command("build")
        if not (Path(self.get_finalized_command("build").build_lib) / LIBRARY).exists():
            self.distribution.ext_modules = None
            self.root_is_pure = True
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class Sanitize(Command):
    """Run csrc/tests/sanitize.cpp under the address and undefined-behaviour sanitizers, for each set that runs here."""

    description = "check the kernels with sanitizers"
    user_options = []  # noqa: RUF012

    def initialize_options(self) -> None: ...

    def finalize_options(self) -> None: ...

    def run(self) -> None:
        try:
            compiler = find_compiler()
            supported = supported_sets(compiler)
            sets = {name: flags for name, flags in supported.items() if runs_here(flags)}
            main = Job("sanitize-main", "csrc/tests/sanitize.cpp", [*FLAGS, *SANITIZE, "-Icsrc"])
            objects = compile_all(compiler, [main, *kernel_jobs(sets, "sanitize-", SANITIZE)])
            program = BUILD / "sanitize"
            run([*compiler, *SANITIZE, *objects, "-o", str(program)], "linking")
        except (UnavailableError, OSError) as why:
            raise CompileError(f"the sanitizers' program cannot be built: {why}") from why
        for name in supported:
            print(f"sanitize {name}" + ("" if name in sets else ": not on this CPU"), flush=True)
            if name in sets and (status := subprocess.run([program, name]).returncode):
                raise CompileError(f"the sanitizers found something in {name} (exit status {status})")


def runs_here(flags: list[str]) -> bool:
    """Whether this CPU has the instructions that the flags ask for; without Linux's list, only if they ask for none."""
    asked = {flag.removeprefix("-m") for flag in flags if "=" not in flag}
    listed = Path("/proc/cpuinfo")
    has = listed.read_text().replace("avx512_bf16", "avx512bf16").split() if listed.exists() else []
    return asked <= set(has)


class Sdist(sdist):
    """The same bits for the same files and SOURCE_DATE_EPOCH: no owner, no clock, one order."""

    def make_archive(self, base_name: str, format: str, root_dir: str | None = None, base_dir: str | None = None, **_):
        when = os.environ.get("SOURCE_DATE_EPOCH")
        if format != "gztar" or when is None or base_dir is None:
            return super().make_archive(base_name, format, root_dir, base_dir)

        def settled(entry: tarfile.TarInfo) -> tarfile.TarInfo:
            entry.uid = entry.gid = 0
            entry.uname = entry.gname = ""
            entry.mtime = int(when)
            entry.mode = 0o755 if entry.isdir() or entry.mode & 0o100 else 0o644
            return entry

        path = f"{base_name}.tar.gz"
        with (
            open(path, "wb") as file,
            gzip.GzipFile("", "wb", fileobj=file, mtime=int(when)) as packed,
            tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive,
        ):
            archive.add(base_dir, filter=settled)
        return path


if __name__ == "__main__":
    sources = ["csrc/operators.cpp", "csrc/select.cpp", "csrc/kernels.cpp"]
    setup(
        ext_modules=[Extension("omninorm.kernels._cpu", sources)],
        cmdclass={"build_ext": BuildOperators, "bdist_wheel": Wheel, "sanitize": Sanitize, "sdist": Sdist},
    )
