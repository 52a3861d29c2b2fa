"""Every test starts from the same random state."""

import pytest
import torch

# pytest would import it a second time, as a module to search for doctests, under the name of its siblings.
collect_ignore = ["conftest.py"]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(20)
