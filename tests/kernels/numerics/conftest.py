"""Every test of this folder holds for the reference and for the operators on each instruction set of this machine; with
TRITON_INTERPRET=1 in the environment, for the Triton kernels by their interpreter instead (`make test-triton`).

Where a test's input is not for the operators (a function transform, a subclass), the choice of the back end falls on
the reference once more, so nothing is forced on it here. That plain tensors reach the operators is in tests/backends.
"""

from collections.abc import Iterator

import pytest

from omninorm.kernels import cpu, dispatch, gpu

OPERATORS = "cpu-"
HERE = ["triton"] if gpu.INTERPRETED else ["reference", *(OPERATORS + name for name in cpu.instruction_sets())]


@pytest.fixture(autouse=True, params=HERE)
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of what computes the norms during the test."""
    if not request.param.startswith(OPERATORS):
        with dispatch.use_backend(request.param):
            yield request.param
        return
    before = cpu.instruction_set()
    cpu.use_instruction_set(request.param.removeprefix(OPERATORS))
    yield request.param
    cpu.use_instruction_set(before)
