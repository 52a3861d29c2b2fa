"""Every test of this folder holds for the reference and for the operators on each instruction set of this machine.

Where a test's input is not for the operators (a function transform, a subclass), the choice of the back end falls on
the reference once more, so nothing is forced on it here. That plain tensors reach the operators is in tests/backends.
"""

from collections.abc import Iterator

import pytest

from omninorm.kernels import cpu, dispatch

OPERATORS = "cpu-"


@pytest.fixture(autouse=True, params=["reference", *(OPERATORS + name for name in cpu.instruction_sets())])
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of what computes the norms during the test."""
    if request.param == "reference":
        with dispatch.use_backend("reference"):
            yield request.param
        return
    before = cpu.instruction_set()
    cpu.use_instruction_set(request.param.removeprefix(OPERATORS))
    yield request.param
    cpu.use_instruction_set(before)
