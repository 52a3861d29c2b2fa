"""More than 2³¹ elements: no offset may be a 32-bit number. The rows repeat a few hundred, so that each of them is known."""

import os
from collections.abc import Iterator

import pytest
import torch
from helpers import oracle
from torch import Tensor

from omninorm.kernels import cpu

GIB = 2**30
EPS = 1e-6
# Their product divides no power of two: an offset that lost its upper bits would meet another row.
WIDTH, PERIOD = 4099, 508
COPIES = 2**31 // (WIDTH * PERIOD) + 1
ROWS = COPIES * PERIOD
RMS = (EPS, 0.0, False)


def memory() -> int:
    """Return the available memory in bytes if Linux reports it, otherwise the whole memory."""
    with open("/proc/meminfo") as file:
        for line in file:
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.skipif(bool(cpu.unavailable()), reason=cpu.unavailable()),
    pytest.mark.skipif(
        not os.path.exists("/proc/meminfo") or memory() < 15 * GIB, reason="less than 15 GiB of memory are available"
    ),
]


@pytest.fixture(scope="module")
def base() -> Tensor:
    """The rows that x repeats, (PERIOD, WIDTH); they differ in size and are off centre."""
    numbers = torch.Generator().manual_seed(20)
    sizes = torch.exp(torch.randn(PERIOD, 1, generator=numbers))
    return (torch.randn(PERIOD, WIDTH, generator=numbers) * sizes + 0.3).bfloat16()


@pytest.fixture(scope="module")
def x(base: Tensor) -> Iterator[Tensor]:
    """(ROWS, WIDTH), 4.3 GB."""
    assert ROWS * WIDTH > 2**31
    x = torch.empty(ROWS, WIDTH, dtype=torch.bfloat16)
    x.view(COPIES, PERIOD, WIDTH).copy_(base)
    yield x
    del x


@pytest.fixture(autouse=True)
def all_cores() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(min(4, os.cpu_count() or 1))
    yield
    torch.set_num_threads(threads)


def assert_repeats(large: Tensor, small: Tensor) -> None:
    """Bit for bit, in every fifth of its copies, the last, and those around 2³⁰ elements, which are 2³¹ bytes."""
    copies, once = large.view(COPIES, -1).view(torch.int64), small.flatten().view(torch.int64)  # compared sooner
    seen = sorted({*range(0, COPIES, 5), *range(COPIES // 2 - 3, COPIES // 2 + 3), COPIES - 2, COPIES - 1})
    wrong = [copy for copy in seen if not torch.equal(copies[copy], once)]
    assert not wrong, f"{len(wrong)} of {len(seen)} copies are wrong, the first is {wrong[0]}"


def check_gain_gradient(large: Tensor, terms: Tensor, floor: Tensor) -> None:
    """Each of the few rows' terms comes COPIES times."""
    terms, floor = COPIES * terms, COPIES * floor
    oracle.assert_gain_gradient(large, terms.sum(0), terms, floor, torch.float32)


def test_add_rms_norm(x: Tensor, base: Tensor) -> None:
    """x serves as the residual and the gradients too, which saves memory: 13 GB are in use. An offset that went wrong
    in one of them alone would still be noticed."""
    weight = torch.randn(WIDTH)
    y, total, scale = torch.ops.omninorm.add_rms_norm_forward(x, x, weight, *RMS)
    small, small_total, small_scale = torch.ops.omninorm.add_rms_norm_forward(base, base, weight, *RMS)
    exact = 2 * base.double()
    assert torch.equal(small_total.double(), exact)
    oracle.assert_forward(small, oracle.rms_norm(exact, weight.double(), oracle.rounded_eps(EPS, x.dtype)))
    assert_repeats(y, small)
    assert_repeats(total, small_total)
    del y
    dx, dweight = torch.ops.omninorm.rms_norm_backward(x, x, total, scale, weight, *RMS, True)
    small, _ = torch.ops.omninorm.rms_norm_backward(base, base, small_total, small_scale, weight, *RMS, True)
    assert_repeats(dx, small)
    normed = oracle.rms_norm(exact, None, EPS)
    check_gain_gradient(dweight, base.double() * normed, torch.zeros_like(normed))


def test_layer_norm(x: Tensor, base: Tensor) -> None:
    weight, bias = torch.randn(WIDTH), torch.randn(WIDTH)
    y, mean, scale = torch.ops.omninorm.layer_norm_forward(x, weight, bias, EPS)
    small, *statistics = torch.ops.omninorm.layer_norm_forward(base, weight, bias, EPS)
    expected = oracle.layer_norm(base.double(), weight.double(), bias.double(), oracle.rounded_eps(EPS, x.dtype))
    oracle.assert_forward(small, expected)
    assert_repeats(y, small)
    del y
    dx, dweight, dbias = torch.ops.omninorm.layer_norm_backward(x, None, x, mean, scale, weight, bias, EPS, True)
    small, *_ = torch.ops.omninorm.layer_norm_backward(base, None, base, *statistics, weight, bias, EPS, True)
    assert_repeats(dx, small)
    normed, dy = oracle.layer_norm(base.double(), None, None, EPS), base.double()
    check_gain_gradient(dweight, dy * normed, dy)
    check_gain_gradient(dbias, dy, torch.zeros_like(dy))
