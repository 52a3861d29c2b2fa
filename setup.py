"""Builds the C++ operators for the CPU. All other package settings are in pyproject.toml.

The operators are one library, loaded by `torch.ops.load_library`. It is no Python module and uses PyTorch's stable
ABI, so it works with every Python and with every torch from TARGET on. If it can't be built, the package is installed
without it, and a file in its place holds the reason.

OMNINORM_BUILD=0 skips the operators. With OMNINORM_BUILD=1, it is an error if they can't be built.
CXX names the compiler. CXXFLAGS and LDFLAGS are added to its flags.
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
# Read by kernels/cpu.py if there is no library: the reason, in one line.
NOTE = LIBRARY.with_name("_cpu_missing.txt")

# The oldest torch whose headers can be used, which is also the oldest that the library works with.
TARGET = (2, 10)
TARGET_MACRO = f"-DTORCH_TARGET_VERSION=0x{TARGET[0]:02x}{TARGET[1]:02x}000000000000"

# No implicit FMA contraction: rounding must not depend on the instruction set. Kernels call fma explicitly.
# GCC's warnings about uninitialized values are wrong for its own headers, and clang does not know the option.
FLAGS = """-O3 -std=c++17 -fPIC -fvisibility=hidden -ffp-contract=off -fno-math-errno -fno-trapping-math
    -Wall -Wextra -Wno-unknown-warning-option -Wno-maybe-uninitialized -Wno-uninitialized""".split()  # noqa: SIM905
SANITIZE = ["-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

# kernels.cpp is compiled once per instruction set. The baseline is first and linked first: if several objects define
# the same inline function, the linker keeps the first one, and that one must run on every processor.
X86 = {
    "baseline": "",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma -mf16c -mprefer-vector-width=512",
}
ARM = {"neon": ""}
SETS = {"x86_64": X86, "amd64": X86, "aarch64": ARM, "arm64": ARM}


class UnavailableError(Exception):
    """Why the operators can't be built on this machine, and what to do about it: two sentences in one line."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"{reason}. {remedy}.")


def again(first: str) -> str:
    """Return the remedy: do this, then install again. The options keep pip from using the cached wheel."""
    return f"{first}, then reinstall omninorm with pip install --force-reinstall --no-deps --no-cache-dir"


class Job(NamedTuple):
    """One source to compile."""

    name: str
    source: str
    flags: list[str]


def package_folders() -> list[str]:
    """Return the folders with packages, also those outside pip's isolated build environment, where torch is."""
    outside = [*site.getsitepackages(), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    if sys.prefix == sys.base_prefix:  # otherwise the user's packages belong to another environment
        outside.append(site.getusersitepackages())
    return list(dict.fromkeys([*sys.path, *outside]))


def find_torch(folders: Iterable[str]) -> Path:
    """Return the first torch in these folders with usable headers, without importing it."""
    wanted = f"torch >= {TARGET[0]}.{TARGET[1]}"
    reason = "torch was not installed when omninorm was built"
    for folder in (Path(name) / "torch" for name in folders):
        if not (folder / "version.py").is_file():
            continue
        found = re.search(r"__version__ = ['\"]((\d+)\.(\d+)[^'\"]*)", (folder / "version.py").read_text("utf-8"))
        if not found or (int(found[2]), int(found[3])) < TARGET:
            version = found[1] if found else "of unknown version"
            reason = f"torch {version} is too old to build omninorm's C++ operators"
        elif not (folder / "include" / "torch" / "csrc" / "stable" / "library.h").is_file():
            reason = f"torch {found[1]} was installed without its C++ headers when omninorm was built"
        else:
            return folder
    raise UnavailableError(reason, f"{again(f'Install {wanted}')}; if that is not enough, add --no-build-isolation")


def find_compiler() -> list[str]:
    """Return CXX, which may have arguments, or the first of the usual compilers."""
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    tried = f"the compiler of CXX={shlex.join(named)}" if named else "c++, g++ or clang++"
    raise UnavailableError(f"No C++ compiler found: {tried}", again("Install g++ or clang++, or set CXX"))


def run(command: list[str], what: str) -> str:
    """Run a compiler and return its output. It runs in ROOT, so that paths in messages and __FILE__ are relative."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace")
    if done.stderr:
        print(done.stderr, file=sys.stderr)
    if done.returncode:
        lines = done.stderr.splitlines() or [f"exit status {done.returncode}"]
        reason = next((line for line in lines if "error" in line), lines[-1])
        remedy = "Run pip install -v for the whole output, or choose another compiler with CXX"
        raise UnavailableError(f"{what} failed: {reason.strip().rstrip('.')}", remedy)
    return done.stdout


def supported_sets(compiler: list[str]) -> dict[str, list[str]]:
    """Return this machine's instruction sets that the compiler supports, each with its flags."""
    machine = platform.machine()
    if os.name != "posix" or machine.lower() not in SETS:
        reason = f"The C++ operators don't support {platform.system()} on {machine} yet"
        raise UnavailableError(reason, "They support Linux and macOS on x86-64 and ARM")
    supported = {}
    for name, text in SETS[machine.lower()].items():
        flags = text.split()
        probe = [*compiler, *FLAGS, *flags, "-fsyntax-only", "-x", "c++", os.devnull]
        if not flags:
            run(probe, f"Running the compiler {shlex.join(compiler)}")
        elif subprocess.run(probe, capture_output=True).returncode:
            print(
                f"omninorm: no {name} operators, because {shlex.join(compiler)} does not support {text}",
                file=sys.stderr,
            )
            continue
        supported[name] = flags
    return supported


def compile_all(compiler: list[str], jobs: list[Job]) -> list[str]:
    """Compile in parallel; return the objects in the order of the jobs."""
    version = run([*compiler, "--version"], "Running the compiler")
    BUILD.mkdir(parents=True, exist_ok=True)

    def compile_one(job: Job) -> str:
        command = [*compiler, *shlex.split(os.environ.get("CXXFLAGS", "")), *job.flags, job.source]
        # An object's name holds a hash of everything that it is compiled from, headers included: it can't be outdated.
        text = run([*command, "-E"], f"Compiling {job.name}")
        made_of = hashlib.sha256("\0".join([version, shlex.join(command), text]).encode()).hexdigest()
        made = BUILD / f"{job.name}-{made_of[:16]}.o"
        if not made.exists():
            for old in BUILD.glob(f"{job.name}-*.o"):
                old.unlink(missing_ok=True)
            unfinished = made.with_suffix(f".{os.getpid()}")
            run([*command, "-c", "-o", str(unfinished)], f"Compiling {job.name}")
            unfinished.replace(made)
        return str(made.relative_to(ROOT))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, jobs))


def kernel_jobs(sets: dict[str, list[str]], prefix: str, flags: list[str]) -> list[Job]:
    """Return the jobs that the library and the sanitizers' program share: set selection, and each set's kernels."""
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
    # No rpath: torch is imported first, so its library is loaded already.
    link = ["-ltorch_cpu", f"-L{torch / 'lib'}", *shlex.split(os.environ.get("LDFLAGS", ""))]
    if sys.platform == "linux":
        link.append("-Wl,-z,defs")  # report undefined symbols now, not when the library is loaded
    # Renamed into place: overwriting a library would crash the processes that use it.
    unfinished = library.with_suffix(f".{os.getpid()}")
    run([*compiler, "-shared", *objects, *link, "-o", str(unfinished.resolve())], "Linking the operators")
    unfinished.replace(library)


class BuildOperators(build_ext):
    """Builds one library instead of a Python extension module, or writes a note with the reason why not."""

    made: Path | None = None

    def run(self) -> None:
        wish = os.environ.get("OMNINORM_BUILD", "")
        if wish not in ("", "0", "1"):
            raise OptionError(f"OMNINORM_BUILD must be 0, 1 or empty, got {wish!r}.")
        package = ROOT / "src" if self.inplace else Path(self.build_lib)
        library, note = package / LIBRARY, package / NOTE
        library.parent.mkdir(parents=True, exist_ok=True)
        # Remove the results of an earlier build, which may have ended differently.
        library.unlink(missing_ok=True)
        note.unlink(missing_ok=True)
        try:
            if wish == "0":
                raise UnavailableError("The C++ operators were skipped because of OMNINORM_BUILD=0", again("Unset it"))
            build_library(library)
            self.made = library
        except (UnavailableError, OSError) as why:
            if wish == "1":
                raise CompileError(
                    f"The C++ operators can't be built, although OMNINORM_BUILD=1 requires them. {why}"
                ) from why
            note.write_text(f"{why}\n", encoding="utf-8")
            self.made = note
            print(f"omninorm is installed without its C++ operators, so its norms are slower. {why}", file=sys.stderr)

    def get_outputs(self) -> list[str]:
        return list(self.get_output_mapping()) if self.inplace else [str(self.made)] if self.made else []

    def get_output_mapping(self) -> dict[str, str]:
        """Return the file's place in a build folder and its actual place, for strict editable installs."""
        return {str(Path(self.build_lib) / LIBRARY.with_name(self.made.name)): str(self.made)} if self.made else {}


class Wheel(bdist_wheel):
    """A wheel for every Python, and for every platform if it holds no operators."""

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
            raise CompileError(f"The sanitizers' program can't be built. {why}") from why
        for name in supported:
            print(f"sanitize {name}" + ("" if name in sets else ": skipped, this CPU does not support it"), flush=True)
            if name in sets and (status := subprocess.run([program, name]).returncode):
                raise CompileError(f"The sanitizers found an error in the {name} kernels (exit status {status}).")


def runs_here(flags: list[str]) -> bool:
    """Whether this CPU supports the instructions of these flags; without /proc/cpuinfo, only if there are none."""
    asked = {flag.removeprefix("-m") for flag in flags if "=" not in flag}
    listed = Path("/proc/cpuinfo")
    has = listed.read_text().replace("avx512_bf16", "avx512bf16").split() if listed.exists() else []
    return asked <= set(has)


class Sdist(sdist):
    """Reproducible archives: identical bytes for identical files and SOURCE_DATE_EPOCH."""

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
