"""The Triton kernels, compiled ahead of time for GPUs: they stay in registers and move no byte twice."""

import itertools

import pytest
import torch

from omninorm.kernels import gpu

pytestmark = pytest.mark.skipif(gpu.INTERPRETED, reason="interpreted kernels are not compiled")

if not gpu.INTERPRETED:
    from helpers.triton_compile import KERNELS, TARGETS, Case, bytes_moved, compiled, local_memory, totals

    WIDTHS = [64, 768, 1024, 4096, 8192, 12288, 16384, 65536]
    DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
    EVERY = [Case(*case) for case in itertools.product(KERNELS, DTYPES, WIDTHS, TARGETS)]
    # `make test` compiles each kernel once, `make test-slow` for two more dtypes, widths and targets, in turns.
    QUICK = [Case(kernel, torch.bfloat16, 1024, "sm_90") for kernel in KERNELS]
    OTHERS = [
        (torch.bfloat16, 16384, "sm_90"),
        (torch.bfloat16, 4096, "sm_100"),
        (torch.float32, 16384, "gfx942"),
        (torch.float32, 8192, "sm_80"),
    ]
    PAIRED = [
        Case(kernel, *other)
        for number, kernel in enumerate(KERNELS)
        for place, other in enumerate(OTHERS)
        if (number.bit_count() + place)
        % 2  # two kernels that differ in norm, direction or addition get all four together
    ]

    def marks(case: Case) -> tuple:
        return () if case in QUICK else (pytest.mark.slow,) if case in PAIRED else (pytest.mark.exhaustive,)

    CASES = [pytest.param(case, marks=marks(case), id=str(case)) for case in EVERY]
    # Whole rows whose width is a power of two: each byte is moved by exactly one instruction.
    COUNTED = [Case(kernel, *other) for kernel in KERNELS for other in OTHERS if other[2] != "gfx942"]
    COUNTED += [*QUICK, *(Case(kernel, torch.float16, 4096, "sm_90") for kernel in KERNELS)]

    # The fastest choices for wide rows, by measurement: whole rows with some of a thread's numbers in memory, or two
    # rows in steps.
    PARKED = {(True, 8192): 144, (True, 16384): 400, (False, 4096): 128}

    @pytest.mark.parametrize("case", CASES)
    def test_rows_stay_in_registers(case: Case) -> None:
        """Backward, NVIDIA's compiler parks up to six numbers of a thread in memory before its loop over rows: masks and
        addresses, which don't depend on the row; of the widest rows that are read whole, gains and accumulators too."""
        most = PARKED.get((case.tile.WHOLE, case.tile.BLOCK), 24) if "backward" in case.kernel else 0
        assert local_memory(compiled(case)) <= most

    @pytest.mark.parametrize(
        "case",
        [pytest.param(case, marks=marks(case), id=str(case)) for case in COUNTED if case.tile.WHOLE],
    )
    def test_every_byte_of_a_row_is_moved_once_16_at_a_time(case: Case) -> None:
        """Forward moves x and y once, backward x, dy and dx once; an addition moves one more of each. In addition, each
        program moves the gains and the sums of their gradients once, and the rows' statistics.

        A backward pass has the loads of x and dy twice in its code: for its first rows, and for the next ones. LayerNorm has
        code for rare rows: forward it reads them five times in small steps, backward it reads the gain once more.
        """
        _, rows, block, warps = case.tile
        layer, add, backward = "layer" in case.kernel, case.kernel.startswith("add_"), "backward" in case.kernel
        row, threads = rows * block * case.dtype.itemsize, warps * 32
        gains = block * 4 * (2 if layer else 1)
        loaded = row * (4 + add) + block * 4 if backward else row * (1 + add) + gains
        rare = (
            (block * 4 if backward else 5 * rows * min(block, 1024) * case.dtype.itemsize * (1 + add)) if layer else 0
        )
        stored = row * (1 + (add and not backward)) + (gains if backward else 0)
        loads, stores = bytes_moved(case, "ld"), bytes_moved(case, "st")
        # In steps that are small for its threads, one loads less at a time.
        assert loads.pop(16) in (loaded, loaded + rare)
        assert stores.pop(16) == stored
        # The rest are the statistics and LayerNorm's first element: a number per row, which each thread may store.
        statistics = threads * 4 * (2 if layer else 1)
        first = threads * rows * case.dtype.itemsize * (1 + add) + rare if layer else 0
        assert sum(loads.values()) <= (statistics * rows * 4 if backward else first)
        assert sum(stores.values()) <= (0 if backward else statistics)

    def totals_cases() -> list:
        """Return dtypes and targets: float32 in `make test`, and one more for each target in `make test-slow`."""
        cases = []
        for (number, target), (place, dtype) in itertools.product(enumerate(TARGETS), enumerate(DTYPES)):
            slow = pytest.mark.slow if place == (0, 2, 3)[number % 3] else pytest.mark.exhaustive
            cases.append(pytest.param(dtype, target, marks=() if dtype == torch.float32 else slow))
        return cases

    @pytest.mark.parametrize(("dtype", "target"), totals_cases(), ids=str)
    def test_block_sums_of_gain_gradients_stay_in_registers(dtype: torch.dtype, target: str) -> None:
        assert local_memory(totals(dtype, target)) == 0
