"""The operators themselves, the choice between back ends, and what surrounds both. The arithmetic is in numerics/."""

from collections.abc import Iterator

import pytest

from omninorm.kernels import cpu


@pytest.fixture(params=cpu.instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of the instruction set whose kernels run during the test: each that was built and runs here."""
    before = cpu.instruction_set()
    cpu.use_instruction_set(request.param)
    yield request.param
    cpu.use_instruction_set(before)
