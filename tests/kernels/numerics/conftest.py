"""Runs every test of this folder with the reference and with the operators of each instruction set of this machine.

With TRITON_INTERPRET=1 in the environment, the tests run with the Triton kernels in Triton's interpreter instead
(`make test-triton`). For inputs that the operators do not take (a function transform, a subclass), the reference is
chosen as usual. tests/kernels/test_dispatch.py shows that plain tensors reach the operators.
"""

from collections.abc import Iterator

import pytest

from omninorm.kernels import cpu, dispatch, gpu

OPERATORS = "cpu-"
HERE = ["triton"] if gpu.INTERPRETED else ["reference", *(OPERATORS + name for name in cpu.instruction_sets())]
# With --device, the back ends for that device.
ON_DEVICES = {"cuda": ["triton", "reference"], "simgpu": ["reference"]}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    names = ON_DEVICES.get(metafunc.config.getoption("--device"), HERE)
    metafunc.parametrize("implementation", names, indirect=True)


@pytest.fixture(autouse=True)
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of the implementation that computes the norms during the test."""
    if not request.param.startswith(OPERATORS):
        with dispatch.use_backend(request.param):
            yield request.param
        return
    before = cpu.instruction_set()
    cpu.use_instruction_set(request.param.removeprefix(OPERATORS))
    yield request.param
    cpu.use_instruction_set(before)
