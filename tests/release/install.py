"""Installs what `make dist` made in an empty environment and tries it: the wheel, and the sdist without a compiler.

python tests/release/install.py dist
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
CLEAN = ROOT / "build" / "clean"
SMOKE = Path(__file__).with_name("smoke.py")
CONSTRAINTS = ("--constraint", str(ROOT / "constraints.txt"))


def call(*command: str | Path, **variables: str) -> str:
    """From a folder in which there is no omninorm."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    done = subprocess.run([str(part) for part in command], cwd=CLEAN, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def main(folder: Path) -> None:
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    venv.EnvBuilder(clear=True, with_pip=True).create(CLEAN)
    python = CLEAN / "bin" / "python"
    pip = (python, "-m", "pip", "--quiet", "--disable-pip-version-check", "install", *CONSTRAINTS)
    print(f"{wheel.name}, with torch and nothing else")
    call(*pip, wheel)
    print(call(python, SMOKE, "cpu"), end="")
    command = subprocess.run([CLEAN / "bin" / "omninorm"], cwd=CLEAN, capture_output=True, text=True)
    assert command.returncode == 2, command
    assert 'pip install "omninorm[train]"' in command.stderr, command
    print(f"{sdist.name}, where there is no compiler")
    call(*pip, "setuptools>=77")
    call(*pip, "--force-reinstall", "--no-deps", "--no-build-isolation", "--no-cache-dir", sdist, CXX="none")
    print(call(python, SMOKE, "reference"), end="")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
