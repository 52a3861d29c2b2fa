"""The chapter's worked examples, and what the functions say to input that they can't use."""

import contextlib
import inspect
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from omninorm import backends, functional, use_backend
from omninorm.errors import InputError

COMPUTE = [backend.name for backend in backends() if backend.available and backend.name != "triton"]


def assert_rounded(values: torch.Tensor, expected: list[float], digits: int) -> None:
    assert [round(value, digits) for value in values.tolist()] == expected


def test_the_chapters_z_score() -> None:
    x = torch.tensor([10.0, 20.0, 30.0, 40.0])
    assert x.mean().item() == 25
    assert round(x.std(correction=0).item(), 2) == 11.18
    assert_rounded(functional.z_score(x), [-1.34, -0.45, 0.45, 1.34], 2)


def test_the_chapters_layer_norm() -> None:
    x = torch.tensor([2.0, 4.0, 6.0, 8.0])
    assert_rounded(functional.layer_norm(x), [-1.34, -0.45, 0.45, 1.34], 2)
    weight, bias = torch.full((4,), 2.0), torch.ones(4)
    # The chapter rounds x̂ to two places first: 2·1.34 + 1 = 3.68 and 2·0.45 + 1 = 1.9.
    expected = [-1.68, 0.1, 1.9, 3.68]
    y = functional.layer_norm(x, weight, bias)
    torch.testing.assert_close(y, torch.tensor(expected), rtol=0, atol=2 * 0.005)
    assert_rounded(y, [-1.6833, 0.1056, 1.8944, 3.6833], 4)


def test_the_chapters_rms_norm() -> None:
    x = torch.tensor([2.0, 4.0, 6.0, 8.0])
    assert round(math.sqrt(30), 3) == 5.477
    assert_rounded(functional.rms_norm(x), [0.365, 0.73, 1.095, 1.461], 3)


def test_z_score_along_any_dimension() -> None:
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    for dim in range(-3, 3):
        expected = (x - x.mean(dim, keepdim=True)) / x.std(dim, correction=0, keepdim=True)
        torch.testing.assert_close(functional.z_score(x, dim), expected)
    assert functional.z_score(torch.ones(4)).isnan().all()


X = torch.ones(2, 4)
BAD_CALLS = {
    "a list": (lambda: functional.rms_norm([1.0, 2.0]), "x must be a torch.Tensor, got list. Convert it"),
    "integers": (lambda: functional.rms_norm(X.int()), "x must be float16, bfloat16, float32 or float64, got torch.int32"),
    "complex": (lambda: functional.layer_norm(X.to(torch.complex64)), "got torch.complex64. Convert it first"),
    "sparse": (lambda: functional.rms_norm(X.to_sparse()), "x must be a dense tensor, got torch.sparse_coo. Use x.to_dense()"),
    "a scalar": (lambda: functional.rms_norm(torch.tensor(1.0)), "x must have a last dimension of width ≥ 1, got shape ()"),
    "width 0": (lambda: functional.layer_norm(torch.ones(3, 0)), "width ≥ 1, got shape (3, 0)"),
    "a gain of another width": (lambda: functional.rms_norm(X, torch.ones(3)), "weight must have shape (4,), x's last dimension, got (3,) for x of shape (2, 4)"),
    "a gain of two dimensions": (lambda: functional.rms_norm(X, torch.ones(2, 4)), "got (2, 4) for x"),
    "a gain that is a list": (lambda: functional.rms_norm(X, [1.0] * 4), "weight must be a torch.Tensor, got list"),
    "an integer bias": (lambda: functional.layer_norm(X, None, torch.ones(4).int()), "bias must be float16"),
    "a gain elsewhere": (lambda: functional.rms_norm(X, torch.ones(4, device="meta")), "weight and x must be on one device, got meta and cpu"),
    "a bias of another width": (lambda: functional.layer_norm(X, None, torch.ones(5)), "bias must have shape (4,)"),
    "a residual elsewhere": (lambda: functional.add_rms_norm(X, X.to("meta")), "float32[2, 4] on meta"),
    "an offset that is a bool": (lambda: functional.rms_norm(X, gain_offset=True), "gain_offset must be a finite number, got True"),
    "a dimension that is a float": (lambda: functional.z_score(X, 1.0), "dim must be a dimension of x, got dim=1.0"),
    "negative eps": (lambda: functional.rms_norm(X, eps=-1e-6), "eps must be a finite number ≥ 0 or None, got -1e-06. Pass e.g. 1e-6"),
    "eps NaN": (lambda: functional.layer_norm(X, eps=float("nan")), "got nan"),
    "eps infinite": (lambda: functional.rms_norm(X, eps=float("inf")), "got inf"),
    "eps beyond float32": (lambda: functional.rms_norm(X, eps=1e300), "got 1e+300"),
    "eps a string": (lambda: functional.rms_norm(X, eps="1e-6"), "got '1e-6'"),
    "eps a bool": (lambda: functional.rms_norm(X, eps=True), "got True"),
    "an unknown cast": (lambda: functional.rms_norm(X, cast="gemma"), "cast must be one of fp32, llama, got 'gemma'"),
    "an offset that is NaN": (lambda: functional.rms_norm(X, gain_offset=float("nan")), "gain_offset must be a finite number, got nan"),
    "a residual of another shape": (lambda: functional.add_rms_norm(X, X[0]), "x and residual must agree in shape, dtype and device, got float32[2, 4] on cpu and float32[4] on cpu"),
    "a residual of another dtype": (lambda: functional.add_layer_norm(X, X.double()), "float64[2, 4]"),
    "nested": (lambda: functional.rms_norm(torch.nested.nested_tensor([X[0], X[0, :2]], layout=torch.jagged)), "x must be a dense tensor, got a nested tensor. Pad it with to_padded_tensor"),
    "layer_norm's gain": (lambda: functional.layer_norm(X, torch.ones(3)), "weight must have shape (4,), x's last dimension, got (3,) for x of shape (2, 4)"),
    "an offset beyond float32": (lambda: functional.rms_norm(X, gain_offset=-1e300), "gain_offset must be a finite number, got -1e+300"),
    "no sum for a list": (lambda: functional.add_rms_norm([1.0], X), "x must be a torch.Tensor, got list"),
    "a residual that is a list": (lambda: functional.add_layer_norm(X, [1.0]), "residual must be a torch.Tensor, got list"),
    "add_rms_norm's gain": (lambda: functional.add_rms_norm(X, X, torch.ones(3)), "weight must have shape (4,), x's last dimension, got (3,) for x of shape (2, 4)"),
    "add_rms_norm's ε": (lambda: functional.add_rms_norm(X, X, eps=-1.0), "eps must be a finite number ≥ 0 or None, got -1.0"),
    "add_rms_norm's offset": (lambda: functional.add_rms_norm(X, X, gain_offset=math.nan), "gain_offset must be a finite number, got nan"),
    "add_layer_norm's gain": (lambda: functional.add_layer_norm(X, X, torch.ones(3)), "weight must have shape (4,), x's last dimension, got (3,) for x of shape (2, 4)"),
    "add_layer_norm's bias": (lambda: functional.add_layer_norm(X, X, None, torch.ones(3)), "bias must have shape (4,), x's last dimension, got (3,) for x of shape (2, 4)"),
    "add_layer_norm's ε": (lambda: functional.add_layer_norm(X, X, eps=-1.0), "eps must be a finite number ≥ 0 or None, got -1.0"),
    "no z of a list": (lambda: functional.z_score([1.0]), "x must be a torch.Tensor, got list"),
    "no such dimension": (lambda: functional.z_score(X, 2), "dim must be a dimension of x, got dim=2 for shape (2, 4)"),
}  # fmt: skip


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_input_is_refused_in_one_sentence(name: str, backend: str | None) -> None:
    call, message = BAD_CALLS[name]
    way = contextlib.nullcontext() if backend is None else use_backend(backend)
    with way, pytest.raises(InputError, match=re.escape(message)) as caught:
        call()
    assert "\n" not in str(caught.value)


REMEDIES = {
    "a list": "convert it with torch.as_tensor",
    "integers": "convert it first, e.g. x.float()",
    "a scalar": "pass a tensor with features in its last dimension",
    "a gain of another width": "make them agree",
    "a gain elsewhere": "move one, e.g. weight.to(x.device)",
    "an offset that is NaN": "pass 0.0, or 1.0 for Gemma's form",
    "an unknown cast": "choose one of these",
    "a residual of another shape": "convert one of them",
    "no such dimension": "choose another",
    "negative eps": "pass e.g. 1e-6",
}


@pytest.mark.parametrize("name", REMEDIES)
def test_every_refusal_says_what_to_do(name: str) -> None:
    with pytest.raises(InputError) as caught:
        BAD_CALLS[name][0]()
    assert caught.value.remedy == REMEDIES[name]
    assert str(caught.value).endswith(f"; {REMEDIES[name]}")


# Arguments -----------------------------------------------------------------------------------------------------------

GENERATOR = torch.Generator().manual_seed(5)
ROWS, RESIDUAL = (torch.randn(3, 6, generator=GENERATOR, dtype=torch.float64) for _ in range(2))
GAIN, BIAS = (torch.randn(6, generator=GENERATOR, dtype=torch.float64) for _ in range(2))


def rms(x: Tensor, gain: Tensor | float = 1.0, eps: float = 1e-6) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * gain


def layer(x: Tensor, gain: Tensor | float = 1.0, bias: Tensor | float = 0.0, eps: float = 1e-6) -> Tensor:
    return rms(x - x.mean(-1, keepdim=True), gain, eps) + bias


TOTAL = ROWS + RESIDUAL
# What is called with what, and what must come out.
CALLS: dict[str, tuple[str, tuple[Any, ...], dict[str, Any], Tensor]] = {
    "rms_norm": ("rms_norm", (ROWS,), {}, rms(ROWS)),
    "its gain": ("rms_norm", (ROWS, GAIN), {}, rms(ROWS, GAIN)),
    "its ε": ("rms_norm", (ROWS, GAIN, 0.3), {}, rms(ROWS, GAIN, 0.3)),
    "its offset": ("rms_norm", (ROWS, GAIN, 0.3), {"gain_offset": 0.7}, rms(ROWS, GAIN + 0.7, 0.3)),
    "its machine's ε": ("rms_norm", (1e-8 * ROWS, GAIN, None), {}, rms(1e-8 * ROWS, GAIN, torch.finfo(torch.float64).eps)),
    "layer_norm": ("layer_norm", (ROWS,), {}, layer(ROWS)),
    "its two gains": ("layer_norm", (ROWS, GAIN, BIAS), {}, layer(ROWS, GAIN, BIAS)),
    "its bias alone": ("layer_norm", (ROWS, None, BIAS, 0.3), {}, layer(ROWS, 1.0, BIAS, 0.3)),
    "add_rms_norm": ("add_rms_norm", (ROWS, RESIDUAL), {}, rms(TOTAL)),
    "all of add_rms_norm": ("add_rms_norm", (ROWS, RESIDUAL, GAIN, 0.3), {"gain_offset": 0.7}, rms(TOTAL, GAIN + 0.7, 0.3)),
    "add_layer_norm": ("add_layer_norm", (ROWS, RESIDUAL), {}, layer(TOTAL)),
    "all of add_layer_norm": ("add_layer_norm", (ROWS, RESIDUAL, GAIN, BIAS, 0.3), {}, layer(TOTAL, GAIN, BIAS, 0.3)),
}  # fmt: skip


@pytest.mark.parametrize("learns", [False, True], ids=["", "with gradients"])
@pytest.mark.parametrize("backend", [None, *COMPUTE])
@pytest.mark.parametrize("name", CALLS)
def test_every_argument_counts_whoever_computes(name: str, backend: str | None, learns: bool) -> None:
    function, arguments, settings, expected = CALLS[name]
    given = [each.clone().requires_grad_(learns) if isinstance(each, Tensor) else each for each in arguments]
    with contextlib.nullcontext() if backend is None else use_backend(backend):
        found = getattr(functional, function)(*given, **settings)
    y, total = found if isinstance(found, tuple) else (found, TOTAL)
    torch.testing.assert_close(y.detach(), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(total.detach(), TOTAL)
    assert y.requires_grad == learns


@pytest.mark.parametrize("backend", COMPUTE)
def test_llamas_order_rounds_before_the_gain(backend: str) -> None:
    x, gain = (torch.randn(shape, generator=GENERATOR).bfloat16() for shape in ((64, 6), (6,)))
    rounded = rms(x.float()).bfloat16()
    with use_backend(backend):
        llama = functional.rms_norm(x, gain, cast="llama")
        both, _ = functional.add_rms_norm(x, torch.zeros_like(x), gain, cast="llama")
        once = functional.rms_norm(x, gain)
    assert torch.equal(llama, rounded * gain)
    assert torch.equal(both, llama)
    assert not torch.equal(once, llama)


def test_the_constants_may_be_as_large_as_float32_goes_and_eps_zero() -> None:
    largest = torch.finfo(torch.float32).max
    assert torch.equal(functional.rms_norm(X, eps=0.0), X)
    assert functional.rms_norm(X, eps=largest).isfinite().all()
    for offset in (largest, -largest):
        found = functional.rms_norm(X, torch.zeros(4), eps=0.0, gain_offset=offset)
        assert torch.equal(found, torch.full_like(X, offset))


def test_the_defaults_are_those_that_the_docs_name() -> None:
    rms_defaults = {"weight": None, "eps": 1e-6, "gain_offset": 0.0, "cast": "fp32"}
    layer_defaults = {"weight": None, "bias": None, "eps": 1e-6}
    for name, wanted in {
        "rms_norm": rms_defaults, "add_rms_norm": rms_defaults, "layer_norm": layer_defaults,
        "add_layer_norm": layer_defaults, "z_score": {"dim": -1},
    }.items():  # fmt: skip
        parameters = inspect.signature(getattr(functional, name)).parameters.values()
        assert {each.name: each.default for each in parameters if each.default is not each.empty} == wanted


def test_meta_tensors_get_shapes() -> None:
    x = torch.empty(2, 3, 8, device="meta", dtype=torch.bfloat16)
    y = functional.rms_norm(x, torch.empty(8, device="meta"))
    assert (y.device.type, y.shape, y.dtype) == ("meta", x.shape, x.dtype)
