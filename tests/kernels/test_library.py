"""The operator library: it exists if it can be built, OMNINORM_CPU chooses its instruction set, and norms work without it."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

import omninorm
from omninorm.errors import ConfigError
from omninorm.kernels import cpu

PACKAGE = Path(omninorm.__file__).parent
ROOT = Path(__file__).parents[2]
needs_operators = pytest.mark.skipif(bool(cpu.unavailable()), reason=cpu.unavailable())


def run(code: str, *flags: str, path: Path = PACKAGE.parent, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a separate process, with the package from this folder."""
    environment = {name: value for name, value in os.environ.items() if name != "OMNINORM_CPU"}
    command = [sys.executable, *flags, "-c", code]
    environment |= {"PYTHONPATH": str(path), **variables}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def slow_except(*quick: str, names: Iterable[str]) -> list[Any]:
    """Return the names for parametrize, those that are not quick with the mark `slow`: each starts a process."""
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in names]


def can_be_built() -> bool:
    """Return whether setup.py finds everything that it needs, without building."""
    spec = importlib.util.spec_from_file_location("omninorm_setup", ROOT / "setup.py")
    setup_py = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup_py)
    try:
        setup_py.find_torch(setup_py.package_folders())
        return bool(setup_py.supported_sets(setup_py.find_compiler()))
    except setup_py.UnavailableError:
        return False


def test_the_operators_exist_if_they_can_be_built() -> None:
    """Otherwise all tests of the operators would be skipped silently. OMNINORM_BUILD=0 means that none are expected."""
    build = os.environ.get("OMNINORM_BUILD")
    if build == "0" or (build != "1" and not can_be_built()):
        pytest.skip(f"no operators are expected here: {cpu.unavailable() or 'OMNINORM_BUILD=0'}")
    assert not cpu.unavailable(), "run: python setup.py build_ext --inplace"
    assert cpu.instruction_sets()


@needs_operators
def test_instruction_sets_are_ordered_from_best_to_baseline() -> None:
    order = ["avx512", "avx2", "neon", "baseline"]
    places = [order.index(name) for name in cpu.instruction_sets()]
    assert places == sorted(places)
    assert cpu.instruction_sets()[-1] in ("baseline", "neon")


@needs_operators
def test_a_set_is_chosen_by_name(instruction_set: str) -> None:
    assert cpu.instruction_set() == instruction_set
    with pytest.raises(ConfigError) as caught:
        cpu.use_instruction_set("mmx")
    assert caught.value.received == "'mmx'"
    assert caught.value.remedy.endswith(", ".join(cpu.instruction_sets()))
    assert cpu.instruction_set() == instruction_set


ASK = "from omninorm.kernels import cpu; print(cpu.instruction_set())"


@needs_operators
@pytest.mark.parametrize("name", slow_except("baseline", "neon", names=cpu.instruction_sets()))
def test_the_environment_variable_chooses_the_set(name: str) -> None:
    done = run(ASK, OMNINORM_CPU=name)
    assert done.stdout.strip() == name, done.stderr


@pytest.mark.slow
@needs_operators
@pytest.mark.parametrize("variables", [{}, {"OMNINORM_CPU": ""}], ids=["unset", "empty"])
def test_without_the_variable_the_best_set_is_used(variables: dict[str, str]) -> None:
    assert run(ASK, **variables).stdout.strip() == cpu.instruction_sets()[0]


@needs_operators
@pytest.mark.parametrize("name", slow_except("mmx", names=["mmx", "AVX2"]))
def test_an_unknown_set_in_the_environment_is_refused(name: str) -> None:
    done = run(ASK, OMNINORM_CPU=name)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("omninorm.errors.ConfigError: OMNINORM_CPU must name an instruction set")
    assert f"got {name!r}" in last
    assert ", ".join(cpu.instruction_sets()) in last


# Without the library ---------------------------------------------------------------------------------------------


WITHOUT = """
import json, warnings, torch
with warnings.catch_warnings(record=True) as at_import:
    warnings.simplefilter("always")
    import omninorm
    from omninorm.kernels import cpu, dispatch
x = torch.tensor([2.0, 4.0, 6.0, 8.0], requires_grad=True)
caught = []
for _ in range(2):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        y = omninorm.functional.rms_norm(x)
        y.sum().backward()
        omninorm.functional.add_layer_norm(x, x)
        omninorm.LayerNorm(4)(x)
    caught.append([[w.category.__name__, str(w.message)] for w in found])
try:
    with dispatch.use_backend("cpu"):
        pass
    refused = ""
except omninorm.errors.ConfigError as error:
    refused = str(error)
backend = next(each for each in omninorm.backends() if each.name == "cpu")
print(json.dumps({
    "at import": [str(w.message) for w in at_import], "first": caught[0], "second": caught[1], "y": y.tolist(),
    "refused": refused, "backend": list(backend), "sets": cpu.instruction_sets(), "set": cpu.instruction_set(),
}))
"""


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the package without the results of a build."""
    left = shutil.ignore_patterns("_cpu.so", "_cpu_missing.txt", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "omninorm", ignore=left)
    return tmp_path


REASONS = {
    "not built": (None, None, "The C++ operators have not been built"),
    "a note": ("_cpu_missing.txt", "No C++ compiler found: c++. Install g++.\n", "No C++ compiler found: c++. Install g++"),
    "no library": ("_cpu.so", "this is no library", "The library with the C++ operators does not load: "),
}  # fmt: skip


@pytest.mark.parametrize("case", slow_except("a note", names=REASONS))
def test_without_the_library_norms_work_and_one_warning_gives_the_reason(case: str, copy: Path) -> None:
    name, content, reason = REASONS[case]
    if name:
        (copy / "omninorm" / "kernels" / name).write_text(content)
    done = run(WITHOUT, path=copy)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert [round(value, 4) for value in printed["y"]] == [0.3651, 0.7303, 1.0954, 1.4606]
    assert printed["at import"] == []
    assert printed["backend"][:2] == ["cpu", False]
    assert reason in printed["backend"][2]
    assert reason in printed["refused"]
    assert (printed["sets"], printed["set"]) == ([], "")
    ((category, message),) = printed["first"]
    assert category in ("UserWarning", "RuntimeWarning")
    assert reason in message
    assert printed["second"] == []


@pytest.mark.slow
def test_a_chosen_set_without_the_library_is_no_error(copy: Path) -> None:
    """The variable chooses among the sets of the operators; the warning above reports that there are none."""
    done = run("import omninorm", "-W", "error", path=copy, OMNINORM_CPU="avx2")
    assert (done.returncode, done.stderr) == (0, "")


@needs_operators
def test_the_library_uses_no_symbols_of_python(copy: Path) -> None:
    """torch's stable ABI only, so that one build serves every Python: no symbol of Python's or of torch's C++."""
    if not shutil.which("nm"):
        pytest.skip("nm is not installed")
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", str(cpu.LIBRARY)], capture_output=True, text=True, check=True
    )
    undefined = {line.split()[-1].split("@")[0] for line in listed.stdout.splitlines()}
    assert {name for name in undefined if name.startswith("aoti_torch_")}
    assert not {name for name in undefined if name.startswith(("Py", "_Py", "_ZN2at", "_ZN3c10", "_ZN5torch"))}
    assert torch.ops.omninorm.rms_norm
