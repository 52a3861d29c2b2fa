"""The package's own promises: imports go one way, importing is inert, and the core needs nothing but torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import omninorm
from omninorm.errors import MissingExtraError

SOURCE = Path(omninorm.__file__).parent
# DESIGN: each part may import those before it.
ORDER = [
    "errors",
    "memory",
    "device",
    "record",
    "timing",
    "config",
    "checks",
    "kernels",
    "functional",
    "layers",
    "placement",
    "thinker",
    "experiments",
    "bench",
    "cli",
]
# Packages outside this order, and the parts of it that they may import. `experiments` and later parts may import them.
CORE = ORDER[: ORDER.index("placement")]
ASIDE = {
    "report": ["errors", "record"],
    "monitor": [*CORE, "report"],
    "surgery": [*CORE, "inspection"],
    "inspection": ["errors", "device", "record"],
    "onnx": ["errors", "kernels"],
}
FACADES = {"__init__", "__main__"}


def part(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_parts(path: Path) -> list[tuple[int, str]]:
    """(line, part) of every import of omninorm in the file, inside functions too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: imports are absolute here"
            names = (
                [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "omninorm" else [node.module]
            )
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found += [(node.lineno, name.split(".")[1]) for name in names if name.startswith("omninorm.")]
    return found


FILES = [path for path in sorted(SOURCE.rglob("*.py")) if part(path) not in FACADES]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_one_way(path: Path) -> None:
    here = part(path)
    assert here in ORDER or here in ASIDE, f"{here} has no place in the order of imports"
    allowed = {here, "__version__", *(ORDER[: ORDER.index(here)] if here in ORDER else ASIDE[here])}
    if here in ORDER[ORDER.index("experiments") :]:
        allowed |= set(ASIDE)
    wrong = [f"line {line} imports {name}" for line, name in imported_parts(path) if name not in allowed]
    assert not wrong, f"{here} may import {sorted(allowed)}: {'; '.join(wrong)}"


def test_the_walk_sees_imports() -> None:
    """Otherwise the test above would pass on an empty list."""
    assert len(FILES) > 20
    assert sum(len(imported_parts(path)) for path in FILES) > 40


INERT = """
import sys, os, logging, warnings, signal
import torch
import threading
before = (torch.get_num_threads(), torch.get_default_dtype(), dict(os.environ), logging.root.level, logging.root.handlers[:],
          warnings.filters[:], signal.getsignal(signal.SIGINT), threading.active_count(), torch.random.initial_seed(),
          torch.nn.RMSNorm, torch.nn.LayerNorm, torch.nn.functional.rms_norm)
loaded = set(sys.modules)
numpy, sys.modules["numpy"] = sys.modules.get("numpy"), None  # torch has loaded it, so that importing it again is not seen
import omninorm
sys.modules["numpy"] = numpy
from omninorm.errors import MissingExtraError
after = (torch.get_num_threads(), torch.get_default_dtype(), dict(os.environ), logging.root.level, logging.root.handlers[:],
         warnings.filters[:], signal.getsignal(signal.SIGINT), threading.active_count(), torch.random.initial_seed(),
         torch.nn.RMSNorm, torch.nn.LayerNorm, torch.nn.functional.rms_norm)
assert before == after, "importing changed something"
allowed = set(sys.stdlib_module_names) | {"omninorm", "torch"}
foreign = sorted({name.split(".")[0] for name in set(sys.modules) - loaded} - allowed)
assert not foreign, f"importing loaded {foreign}"
print(omninorm.__version__)
"""


def test_importing_is_inert_and_needs_only_torch() -> None:
    run = subprocess.run([sys.executable, "-c", INERT], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == omninorm.__version__
    assert run.stderr == ""


def test_public_names() -> None:
    assert all(hasattr(omninorm, name) for name in omninorm.__all__)
    designed = {"RMSNorm", "LayerNorm", "CRMSNorm", "ScaleNorm", "DynamicTanh", "DynamicErf", "NormConfig"}
    assert designed | {"Block", "Thinker", "ThinkerConfig", "backends", "functional"} <= set(omninorm.__all__)


def test_backends_say_what_runs_here() -> None:
    found = {backend.name: backend for backend in omninorm.backends()}
    assert found["reference"].available
    assert all(backend.reason for backend in found.values())


def test_a_clone_is_told_how_to_install_its_own_extras(tmp_path, monkeypatch):
    error = MissingExtraError("ONNX needs onnxscript", "", 'install it with pip install "omninorm[onnx]"')
    clone = tmp_path / "clone"
    monkeypatch.setattr("omninorm.errors.__file__", str(clone / "src" / "omninorm" / "errors.py"))
    assert 'pip install "omninorm[onnx]"' in str(error)
    clone.mkdir()
    (clone / "pyproject.toml").touch()
    assert f'pip install -e "{clone}[onnx]"' in str(error)
    monkeypatch.chdir(clone)
    assert 'pip install -e ".[onnx]"' in str(error)
