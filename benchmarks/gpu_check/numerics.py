"""Compares every kernel with float64, with the formulas and tolerances of the tests, and checks what must be bit-exact.

An error is a share of the allowed error, so it is at most 1 if the result is right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch

import omninorm
from gpu_check import cases, place
from gpu_check.cases import Case
from gpu_check.items import Item
from gpu_check.sizes import Sizes

LARGE = "more than 2³¹ elements"
CHECKS: dict[str, Callable[[str, Sizes], Iterator[Case]]] = {
    "extreme rows": cases.extreme_rows,
    "strided inputs": cases.strided,
    "same bits again, and for a row alone": cases.repeated,
    "add-norms equal two steps": cases.additions,
    "infinity, NaN, constant rows, empty batches": cases.nonfinite,
    "gain offset": cases.gain_offset,
    "Llama's rounding order": cases.llama_rounding,
    LARGE: cases.large,
}


def items(device: str, sizes: Sizes, _: Any) -> Iterator[Item]:
    for name, backend, found in groups(device, sizes):
        yield Item(name, 60.0, partial(_checked, backend, found))


def warming(device: str, sizes: Sizes) -> list[Callable[[], object]]:
    """Return the cases of our kernels, in the order of the items; running a case compiles its kernels.

    Triton compiles another variant for other dtypes, alignments and divisors of sizes, and for a size of 1. Only the
    cases themselves have the right combinations of all these.
    """
    return [
        partial(_checked, backend, [case])
        for name, backend, found in groups(device, sizes)
        for case in found
        if backend == "triton" and not name.endswith(LARGE)
    ]


def groups(device: str, sizes: Sizes) -> Iterator[tuple[str, str, list[Case]]]:
    """Yield name, back end and cases of every item: first one item of every kind, then other dtypes and back ends."""
    backends = place.our_backends(device)
    yield from _matrices(backends[0], cases.DTYPES[:1], device, sizes)
    for backend in backends:
        # PyTorch's operators promise less for extreme rows, and refuse some arguments; docs/gpu.md lists both.
        for name, check in CHECKS.items() if backend != "torch" else ():
            if name != LARGE or sizes.large:
                yield f"{backend} {name}", backend, list(check(device, sizes))
    for number, backend in enumerate(backends):
        yield from _matrices(backend, cases.DTYPES[not number :], device, sizes)


def _matrices(
    backend: str, dtypes: Iterable[torch.dtype], device: str, sizes: Sizes
) -> Iterator[tuple[str, str, list[Case]]]:
    for dtype in dtypes:
        for kind in cases.NORMS:
            name = f"{backend} {kind} {str(dtype).removeprefix('torch.')}"
            yield name, backend, list(cases.matrix(kind, dtype, backend == "torch", device, sizes))


def _checked(backend: str, found: list[Case]) -> dict[str, Any]:
    torch.manual_seed(20)
    with omninorm.use_backend(backend):
        return judged([case() for case in found])


def judged(found: list[dict[str, Any] | list[str]]) -> dict[str, Any]:
    """Return the largest share of each result, and a sentence for every faulty case."""
    wrong = [sentence for each in found if isinstance(each, list) for sentence in each]
    compared = [each for each in found if isinstance(each, dict)]
    names = [name for name in ("y", "dx", "dgain", "dbias") if any(name in each for each in compared)]
    wrong += [
        f"{name} of {each['case']} is off by {each[name]:.3g} × the allowed error"
        for each in compared
        for name in names
        if not each.get(name, 0.0) <= 1
    ]
    result: dict[str, Any] = {"cases": len(found), "wrong": wrong}
    if compared:
        result["worst"] = {name: _largest([each[name] for each in compared if name in each]) for name in names}
        texts = [f"{name} {share:.2f}" for name, share in result["worst"].items()]
        result["summary"] = f"errors over allowed errors: {', '.join(texts)}"
    return result


def _largest(shares: list[float]) -> float:
    """Return the largest share, or NaN if one is NaN, which `max` may ignore."""
    return next((share for share in shares if share != share), max(shares))
