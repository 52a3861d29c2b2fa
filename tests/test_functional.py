"""The functions: worked examples, arguments, and the errors for invalid input."""

import contextlib
import inspect
import math
import re
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, fx

import omninorm
from omninorm import backends, functional, use_backend
from omninorm.errors import ConfigError, InputError

COMPUTE = [backend.name for backend in backends() if backend.available and backend.name != "triton"]


def assert_rounded(values: torch.Tensor, expected: list[float], digits: int) -> None:
    assert [round(value, digits) for value in values.tolist()] == expected


def test_z_score_of_a_worked_example() -> None:
    x = torch.tensor([10.0, 20.0, 30.0, 40.0])
    assert x.mean().item() == 25
    assert round(x.std(correction=0).item(), 2) == 11.18
    assert_rounded(functional.z_score(x), [-1.34, -0.45, 0.45, 1.34], 2)


def test_layer_norm_of_a_worked_example() -> None:
    x = torch.tensor([2.0, 4.0, 6.0, 8.0])
    assert_rounded(functional.layer_norm(x), [-1.34, -0.45, 0.45, 1.34], 2)
    weight, bias = torch.full((4,), 2.0), torch.ones(4)
    # Computed manually, with x̂ rounded to two places first: 2·1.34 + 1 = 3.68 and 2·0.45 + 1 = 1.9.
    expected = [-1.68, 0.1, 1.9, 3.68]
    y = functional.layer_norm(x, weight, bias)
    torch.testing.assert_close(y, torch.tensor(expected), rtol=0, atol=2 * 0.005)
    assert_rounded(y, [-1.6833, 0.1056, 1.8944, 3.6833], 4)


def test_rms_norm_of_a_worked_example() -> None:
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
NESTED = torch.nested.nested_tensor([X[0], X[0, :2]], layout=torch.jagged)


def strided() -> Tensor:
    """A nested tensor in the strided layout, which warns when it is made."""
    return torch.nested.nested_tensor([X, X])


# Call, the argument that the error must name, and what was received.
BAD_CALLS = {
    "a list": (lambda: functional.rms_norm([1.0, 2.0]), "x", "list"),
    "a number": (lambda: functional.rms_norm(2.5), "x", "float 2.5"),
    "integers": (lambda: functional.rms_norm(X.int()), "x", "torch.int32"),
    "complex": (lambda: functional.layer_norm(X.to(torch.complex64)), "x", "torch.complex64"),
    "sparse": (lambda: functional.rms_norm(X.to_sparse()), "x", "torch.sparse_coo"),
    "a scalar": (lambda: functional.rms_norm(torch.tensor(1.0)), "x", "shape ()"),
    "width 0": (lambda: functional.layer_norm(torch.ones(3, 0)), "x", "shape (3, 0)"),
    "a gain of another width": (lambda: functional.rms_norm(X, torch.ones(3)), "weight", "(3,) for x of shape (2, 4)"),
    "a gain of two dimensions": (lambda: functional.rms_norm(X, torch.ones(2, 4)), "weight", "(2, 4) for x of shape (2, 4)"),
    "a gain that is a list": (lambda: functional.rms_norm(X, [1.0] * 4), "weight", "list"),
    "an integer bias": (lambda: functional.layer_norm(X, None, torch.ones(4).int()), "bias", "torch.int32"),
    "a gain on another device": (lambda: functional.rms_norm(X, torch.ones(4, device="meta")), "weight", "meta and cpu"),
    "a bias of another width": (lambda: functional.layer_norm(X, None, torch.ones(5)), "bias", "(5,) for x of shape (2, 4)"),
    "a residual on another device": (lambda: functional.add_rms_norm(X, X.to("meta")), "residual", "float32[2, 4] on cpu and float32[2, 4] on meta"),
    "an offset that is a bool": (lambda: functional.rms_norm(X, gain_offset=True), "gain_offset", "True"),
    "a dimension that is a float": (lambda: functional.z_score(X, 1.0), "dim", "dim=1.0 for shape (2, 4)"),
    "negative eps": (lambda: functional.rms_norm(X, eps=-1e-6), "eps", "-1e-06"),
    "eps NaN": (lambda: functional.layer_norm(X, eps=float("nan")), "eps", "nan"),
    "eps infinite": (lambda: functional.rms_norm(X, eps=float("inf")), "eps", "inf"),
    "eps beyond float32": (lambda: functional.rms_norm(X, eps=1e300), "eps", "1e+300"),
    "eps a string": (lambda: functional.rms_norm(X, eps="1e-6"), "eps", "'1e-6'"),
    "eps a bool": (lambda: functional.rms_norm(X, eps=True), "eps", "True"),
    "eps a vector": (lambda: functional.layer_norm(X, eps=torch.ones(2)), "eps", "tensor([1., 1.])"),
    "an unknown cast": (lambda: functional.rms_norm(X, cast="gemma"), "cast", "'gemma'"),
    "an offset that is NaN": (lambda: functional.rms_norm(X, gain_offset=float("nan")), "gain_offset", "nan"),
    "a residual of another shape": (lambda: functional.add_rms_norm(X, X[0]), "residual", "float32[2, 4] on cpu and float32[4] on cpu"),
    "a residual of another dtype": (lambda: functional.add_layer_norm(X, X.double()), "residual", "float32[2, 4] on cpu and float64[2, 4] on cpu"),
    "jagged features": (lambda: functional.rms_norm(NESTED), "A nested tensor", "shape torch.Size([2, j"),
    "a strided nested tensor": (lambda: functional.rms_norm(strided()), "x", "a strided nested tensor"),
    "layer_norm's gain": (lambda: functional.layer_norm(X, torch.ones(3)), "weight", "(3,) for x of shape (2, 4)"),
    "an offset beyond float32": (lambda: functional.rms_norm(X, gain_offset=-1e300), "gain_offset", "-1e+300"),
    "a sum with a list": (lambda: functional.add_rms_norm([1.0], X), "x", "list"),
    "a residual that is a list": (lambda: functional.add_layer_norm(X, [1.0]), "residual", "list"),
    "add_rms_norm's gain": (lambda: functional.add_rms_norm(X, X, torch.ones(3)), "weight", "(3,) for x of shape (2, 4)"),
    "add_rms_norm's eps": (lambda: functional.add_rms_norm(X, X, eps=-1.0), "eps", "-1.0"),
    "add_rms_norm's offset": (lambda: functional.add_rms_norm(X, X, gain_offset=math.nan), "gain_offset", "nan"),
    "add_layer_norm's gain": (lambda: functional.add_layer_norm(X, X, torch.ones(3)), "weight", "(3,) for x of shape (2, 4)"),
    "add_layer_norm's bias": (lambda: functional.add_layer_norm(X, X, None, torch.ones(3)), "bias", "(3,) for x of shape (2, 4)"),
    "add_layer_norm's eps": (lambda: functional.add_layer_norm(X, X, eps=-1.0), "eps", "-1.0"),
    "z_score of a list": (lambda: functional.z_score([1.0]), "x", "list"),
    "no such dimension": (lambda: functional.z_score(X, 2), "dim", "dim=2 for shape (2, 4)"),
    "a negative dimension beyond the first": (lambda: functional.z_score(X, -3), "dim", "dim=-3 for shape (2, 4)"),
    "a dimension that is a bool": (lambda: functional.z_score(X, True), "dim", "dim=True for shape (2, 4)"),
    "z_score of integers": (lambda: functional.z_score(X.int()), "x", "torch.int32"),
    "z_score of a jagged tensor": (lambda: functional.z_score(NESTED), "x", ""),
    "a sum of jagged and dense": (lambda: functional.add_rms_norm(NESTED, X), "residual", "float32[2, j"),
    "a sum of strided nested tensors": (lambda: functional.add_layer_norm(strided(), strided()), "x", "a strided nested tensor"),
    "a strided nested residual": (lambda: functional.add_rms_norm(X, strided()), "residual", "a strided nested tensor"),
    "add_rms_norm's cast": (lambda: functional.add_rms_norm(X, X, cast="gemma"), "cast", "'gemma'"),
    "a string": (lambda: functional.rms_norm("text"), "x", "str 'text'"),
    "a bias on another device": (lambda: functional.layer_norm(X, None, torch.ones(4, device="meta")), "bias", "meta and cpu"),
    "a scalar's dimension": (lambda: functional.z_score(X[0, 0], 0), "dim", "dim=0 for shape ()"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*prototype stage:UserWarning")
@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_arguments_are_refused_by_name_with_the_value(name: str, backend: str | None) -> None:
    call, argument, received = BAD_CALLS[name]
    with contextlib.nullcontext() if backend is None else use_backend(backend), pytest.raises(InputError) as caught:
        call()
    words = caught.value.invariant.replace(",", "").split()
    assert argument in caught.value.invariant if " " in argument else argument in words
    assert str(caught.value.received).startswith(received)
    assert bool(caught.value.received) == bool(received)
    assert re.match(r"[A-Z]?[a-z_]*\b", caught.value.invariant)[0] in {"A", argument, "x"}
    assert re.match(r"[a-z0-9]", caught.value.remedy)
    assert "\n" not in str(caught.value)


# A part of the rule that was broken, and of the remedy.
REMEDIES = {
    "a list": ("torch.Tensor", "torch.as_tensor"),
    "integers": ("float16, bfloat16, float32 or float64", "x.float()"),
    "an integer bias": ("float16, bfloat16, float32 or float64", "bias.float()"),
    "sparse": ("dense", "x.to_dense()"),
    "a scalar": ("last dimension of width ≥ 1", "features in its last dimension"),
    "width 0": ("last dimension of width ≥ 1", "features in its last dimension"),
    "a gain of another width": ("shape (4,)", "pass a weight with one value per feature"),
    "a bias of another width": ("shape (4,)", "pass a bias with one value per feature"),
    "a gain on another device": ("same device", "weight.to(x.device)"),
    "a bias on another device": ("same device", "bias.to(x.device)"),
    "an offset that is NaN": ("finite number", "0.0, or 1.0 for Gemma's"),
    "an unknown cast": ("fp32, llama", "choose one"),
    "a residual of another shape": ("same shape, dtype and device", "convert one"),
    "a sum of jagged and dense": ("same shape, dtype and device", "convert one"),
    "jagged features": ("same number of features", "transpose"),
    "a strided nested tensor": ("dense or a jagged", "layout=torch.jagged"),
    "a strided nested residual": ("dense or a jagged", "layout=torch.jagged"),
    "z_score of a jagged tensor": ("nested tensor", "to_padded_tensor"),
    "no such dimension": ("dimension of x", "an integer from -2 to 1"),
    "a scalar's dimension": ("dimension of x", "tensor of features"),
    "negative eps": ("finite number ≥ 0, or None", "1e-6"),
}


@pytest.mark.filterwarnings("ignore:.*prototype stage:UserWarning")
@pytest.mark.parametrize("name", REMEDIES)
def test_an_error_states_the_rule_and_suggests_a_remedy(name: str) -> None:
    invariant, remedy = REMEDIES[name]
    with pytest.raises(InputError) as caught:
        BAD_CALLS[name][0]()
    assert invariant in caught.value.invariant
    assert remedy in caught.value.remedy


def test_a_whole_error_reads_as_sentences() -> None:
    with pytest.raises(InputError) as caught:
        functional.rms_norm(X, eps=-1.0)
    expected = "eps must be a finite number ≥ 0, or None, got -1.0. Use a small positive value such as 1e-6."
    assert str(caught.value) == expected


def test_a_problem_of_any_length_becomes_a_short_message() -> None:
    message = str(ConfigError("act must be known", "ß" * 10_000, "use silu"))
    assert message.startswith("act must be known, got ßßß")
    assert message.endswith("ß …. Use silu.")
    assert len(message) < 1100


# Arguments -----------------------------------------------------------------------------------------------------------

GENERATOR = torch.Generator().manual_seed(5)
ROWS, RESIDUAL = (torch.randn(3, 6, generator=GENERATOR, dtype=torch.float64) for _ in range(2))
GAIN, BIAS = (torch.randn(6, generator=GENERATOR, dtype=torch.float64) for _ in range(2))


def rms(x: Tensor, gain: Tensor | float = 1.0, eps: float = 1e-6) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * gain


def layer(x: Tensor, gain: Tensor | float = 1.0, bias: Tensor | float = 0.0, eps: float = 1e-6) -> Tensor:
    return rms(x - x.mean(-1, keepdim=True), gain, eps) + bias


TOTAL = ROWS + RESIDUAL
# Function, arguments, options and the expected result.
CALLS: dict[str, tuple[str, tuple[Any, ...], dict[str, Any], Tensor]] = {
    "rms_norm": ("rms_norm", (ROWS,), {}, rms(ROWS)),
    "its gain": ("rms_norm", (ROWS, GAIN), {}, rms(ROWS, GAIN)),
    "its ε": ("rms_norm", (ROWS, GAIN, 0.3), {}, rms(ROWS, GAIN, 0.3)),
    "its offset": ("rms_norm", (ROWS, GAIN, 0.3), {"gain_offset": 0.7}, rms(ROWS, GAIN + 0.7, 0.3)),
    "its machine epsilon": ("rms_norm", (1e-8 * ROWS, GAIN, None), {}, rms(1e-8 * ROWS, GAIN, torch.finfo(torch.float64).eps)),
    "layer_norm": ("layer_norm", (ROWS,), {}, layer(ROWS)),
    "its two gains": ("layer_norm", (ROWS, GAIN, BIAS), {}, layer(ROWS, GAIN, BIAS)),
    "its bias alone": ("layer_norm", (ROWS, None, BIAS, 0.3), {}, layer(ROWS, 1.0, BIAS, 0.3)),
    "add_rms_norm": ("add_rms_norm", (ROWS, RESIDUAL), {}, rms(TOTAL)),
    "all of add_rms_norm": ("add_rms_norm", (ROWS, RESIDUAL, GAIN, 0.3), {"gain_offset": 0.7}, rms(TOTAL, GAIN + 0.7, 0.3)),
    "add_layer_norm": ("add_layer_norm", (ROWS, RESIDUAL), {}, layer(TOTAL)),
    "all of add_layer_norm": ("add_layer_norm", (ROWS, RESIDUAL, GAIN, BIAS, 0.3), {}, layer(TOTAL, GAIN, BIAS, 0.3)),
}  # fmt: skip


@pytest.mark.parametrize("needs_grad", [False, True], ids=["", "with gradients"])
@pytest.mark.parametrize("backend", [None, *COMPUTE])
@pytest.mark.parametrize("name", CALLS)
def test_every_argument_changes_the_result_on_every_back_end(name: str, backend: str | None, needs_grad: bool) -> None:
    function, arguments, settings, expected = CALLS[name]
    given = [each.clone().requires_grad_(needs_grad) if isinstance(each, Tensor) else each for each in arguments]
    with contextlib.nullcontext() if backend is None else use_backend(backend):
        found = getattr(functional, function)(*given, **settings)
    y, total = found if isinstance(found, tuple) else (found, TOTAL)
    torch.testing.assert_close(y.detach(), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(total.detach(), TOTAL)
    assert y.requires_grad == needs_grad


@pytest.mark.parametrize("backend", [name for name in COMPUTE if name != "torch"])  # PyTorch's operators refuse it
def test_llama_cast_rounds_before_the_gain(backend: str) -> None:
    x, gain = (torch.randn(shape, generator=GENERATOR).bfloat16() for shape in ((64, 6), (6,)))
    rounded = rms(x.float()).bfloat16()
    with use_backend(backend):
        llama = functional.rms_norm(x, gain, cast="llama")
        both, _ = functional.add_rms_norm(x, torch.zeros_like(x), gain, cast="llama")
        once = functional.rms_norm(x, gain)
    assert torch.equal(llama, rounded * gain)
    assert torch.equal(both, llama)
    assert not torch.equal(once, llama)


def test_constants_up_to_the_largest_float32_and_eps_zero_are_accepted() -> None:
    largest = torch.finfo(torch.float32).max
    assert torch.equal(functional.rms_norm(X, eps=0.0), X)
    assert functional.rms_norm(X, eps=largest).isfinite().all()
    for offset in (largest, -largest):
        found = functional.rms_norm(X, torch.zeros(4), eps=0.0, gain_offset=offset)
        assert torch.equal(found, torch.full_like(X, offset))


def test_defaults_are_the_documented_ones() -> None:
    rms_defaults = {"weight": None, "eps": 1e-6, "gain_offset": 0.0, "cast": "fp32"}
    layer_defaults = {"weight": None, "bias": None, "eps": 1e-6}
    gate = {"weight": None, "eps": 1e-6, "activation": "silu", "norm_first": True, "groups": 1, "cast": "fp32"}
    for name, wanted in {
        "rms_norm": {**rms_defaults, "groups": 1, "dim": -1}, "add_rms_norm": rms_defaults,
        "layer_norm": {**layer_defaults, "dim": -1}, "add_layer_norm": layer_defaults, "z_score": {"dim": -1},
        "gated_rms_norm": gate, "l2_norm": {"eps": 1e-6}, "modulated_rms_norm": {"shift": None, "eps": 1e-6},
        "modulated_layer_norm": {"shift": None, "eps": 1e-6},
    }.items():  # fmt: skip
        parameters = inspect.signature(getattr(functional, name)).parameters.values()
        assert {each.name: each.default for each in parameters if each.default is not each.empty} == wanted


def test_meta_tensors_get_shapes() -> None:
    x = torch.empty(2, 3, 8, device="meta", dtype=torch.bfloat16)
    y = functional.rms_norm(x, torch.empty(8, device="meta"))
    assert (y.device.type, y.shape, y.dtype) == ("meta", x.shape, x.dtype)


# Numbers and tensors of other kinds ------------------------------------------------------------------------------

NUMBERS = {
    "np.float16": numpy.float16(0.25),
    "np.float32": numpy.float32(0.25),
    "np.float64": numpy.float64(0.25),
    "np.longdouble": numpy.longdouble(0.25),
    "np.int64": numpy.int64(1),
    "a 0-d array": numpy.array(0.25),
    "a 0-d tensor": torch.tensor(0.25),
}


@pytest.mark.parametrize("kind", NUMBERS)
def test_constants_may_be_numpy_scalars_or_0d_tensors(kind: str) -> None:
    number = NUMBERS[kind]
    value = float(number)
    for ours, expected in [
        (functional.rms_norm(ROWS, GAIN, number, gain_offset=number), rms(ROWS, GAIN + value, value)),
        (functional.layer_norm(ROWS, GAIN, BIAS, number), layer(ROWS, GAIN, BIAS, value)),
        (functional.add_rms_norm(ROWS, RESIDUAL, GAIN, number, gain_offset=number)[0], rms(TOTAL, GAIN + value, value)),
        (functional.add_layer_norm(ROWS, RESIDUAL, GAIN, BIAS, number)[0], layer(TOTAL, GAIN, BIAS, value)),
    ]:
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_a_dimension_may_be_a_numpy_integer() -> None:
    assert torch.equal(functional.z_score(ROWS, numpy.int64(0)), functional.z_score(ROWS, 0))


def jagged(*lengths: int, needs_grad: bool = True) -> Tensor:
    """A jagged nested tensor (batch, length, 6) of float64."""
    parts = [torch.randn(length, 6, generator=GENERATOR, dtype=torch.float64) for length in lengths]
    return torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=needs_grad)


@pytest.mark.filterwarnings("ignore:.*prototype stage:UserWarning")
@pytest.mark.parametrize("name", ["rms_norm", "layer_norm"])
def test_jagged_tensors_are_normalized_row_by_row(name: str) -> None:
    norm = getattr(functional, name)
    x, gain = jagged(2, 5, 1), GAIN.clone().requires_grad_()
    y = norm(x, gain)
    assert y.shape == x.shape
    (y * y).values().sum().backward()
    dense, dense_gain = x.detach().values().clone().requires_grad_(), GAIN.clone().requires_grad_()
    expected = norm(dense, dense_gain)
    (expected * expected).sum().backward()
    assert torch.equal(y.values(), expected)
    assert torch.equal(x.grad.values(), dense.grad)
    assert torch.equal(gain.grad, dense_gain.grad)


@pytest.mark.filterwarnings("ignore:.*prototype stage:UserWarning")
@pytest.mark.parametrize(("name", "norm"), [("add_rms_norm", "rms_norm"), ("add_layer_norm", "layer_norm")])
def test_jagged_sums_are_the_two_steps(name: str, norm: str) -> None:
    x = jagged(2, 3, needs_grad=False)
    residual = x * 2
    y, total = getattr(functional, name)(x, residual, GAIN)
    assert torch.equal(total.values(), 3 * x.values())
    assert torch.equal(y.values(), getattr(functional, norm)(total.values(), GAIN))
    assert (y + total).shape == x.shape
    with pytest.raises(InputError, match="residual"):
        getattr(functional, name)(x, jagged(3, 2, needs_grad=False))


@pytest.mark.filterwarnings("ignore:.*prototype stage:UserWarning")
def test_jagged_tensors_with_heads_or_gaps_keep_their_rows() -> None:
    heads = jagged(2, 4, needs_grad=False).unflatten(-1, (2, 3)).transpose(1, 2)  # (batch, head, length, 3)
    y = functional.rms_norm(heads)
    assert y.shape == heads.shape
    for ours, rows in zip(y.unbind(), heads.unbind(), strict=True):
        assert torch.equal(ours, functional.rms_norm(rows))
    starts, lengths = torch.tensor([0, 1]), torch.tensor([2, 3])
    gaps = torch.nested.narrow(torch.stack([ROWS, RESIDUAL]).repeat(1, 2, 1), 1, starts, lengths, layout=torch.jagged)
    for ours, rows in zip(functional.layer_norm(gaps).unbind(), gaps.unbind(), strict=True):
        assert torch.equal(ours, functional.layer_norm(rows))


@pytest.mark.filterwarnings("ignore:.*prototype stage:UserWarning")
@pytest.mark.parametrize("norm", [omninorm.RMSNorm(6), omninorm.LayerNorm(6)], ids=lambda norm: type(norm).__name__)
def test_jagged_results_can_be_added_to_their_input_and_keep_its_lengths(norm: torch.nn.Module) -> None:
    starts, lengths = torch.tensor([0, 1]), torch.tensor([2, 3])
    dense = torch.randn(2, 5, 6, generator=GENERATOR).requires_grad_()
    gaps = torch.nested.narrow(dense, 1, starts, lengths, layout=torch.jagged)
    y = norm(gaps)
    total = y + gaps
    assert total.shape == y.shape == gaps.shape
    assert torch.equal(y.lengths(), lengths)
    assert (y._maybe_min_seqlen, y._maybe_max_seqlen) == (2, 3)
    expected = norm(dense) + dense
    rows = [expected[0, :2], expected[1, 1:4]]
    for ours, theirs in zip(total.unbind(), rows, strict=True):
        assert torch.equal(ours, theirs)
    (found,) = torch.autograd.grad(torch.cat(total.unbind()).square().sum(), dense)
    (wanted,) = torch.autograd.grad(torch.cat(rows).square().sum(), dense)
    torch.testing.assert_close(found, wanted)


@pytest.mark.filterwarnings("ignore:.*prototype stage:UserWarning")
def test_jagged_results_keep_only_what_is_cached() -> None:
    x = jagged(2, 4, needs_grad=False)
    offsets_only = torch.nested.nested_tensor_from_jagged(x.values(), x.offsets())
    y = functional.rms_norm(offsets_only)
    assert (y._maybe_min_seqlen, y._maybe_max_seqlen, y.lengths()) == (None, None, None)
    y = functional.rms_norm(torch.nested.nested_tensor_from_jagged(x.values(), x.offsets(), min_seqlen=2, max_seqlen=4))
    assert (y._maybe_min_seqlen, y._maybe_max_seqlen) == (2, 4)


# Symbolic tracing and jagged tensors, with every constant other than its default ---------------------------------------

HALF_ROWS, HALF_RESIDUAL = (torch.randn(16, 6, generator=GENERATOR).bfloat16() for _ in range(2))
HALF_GAIN, HALF_BIAS = (torch.randn(6, generator=GENERATOR).bfloat16() for _ in range(2))
# The function, its tensors, its other positional arguments, and its keyword arguments.
SETTINGS: dict[str, tuple[list[Tensor], tuple[Any, ...], dict[str, Any]]] = {
    "rms_norm": ([HALF_ROWS, HALF_GAIN], (0.3,), {"gain_offset": 0.7, "cast": "llama"}),
    "layer_norm": ([HALF_ROWS, HALF_GAIN, HALF_BIAS], (0.3,), {}),
    "add_rms_norm": ([HALF_ROWS, HALF_RESIDUAL, HALF_GAIN], (0.3,), {"gain_offset": 0.7, "cast": "llama"}),
    "add_layer_norm": ([HALF_ROWS, HALF_RESIDUAL, HALF_GAIN, HALF_BIAS], (0.3,), {}),
    "z_score": ([HALF_ROWS], (0,), {}),
}
TENSORS = [(name, position) for name, (tensors, _, _) in SETTINGS.items() for position in range(len(tensors))]


def as_pair(result: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def without_each_argument(name: str) -> list[tuple[Tensor, ...]]:
    """The results of a function where one of its optional arguments has its default."""
    function = getattr(functional, name)
    tensors, others, options = SETTINGS[name]
    named = dict(zip(list(inspect.signature(function).parameters), (*tensors, *others), strict=False)) | options
    optional = [each for each in named if each not in ("x", "residual")]
    return [as_pair(function(**{key: value for key, value in named.items() if key != each})) for each in optional]


@pytest.mark.parametrize("name", SETTINGS)
def test_the_settings_for_tracing_and_jagged_tensors_all_matter(name: str) -> None:
    tensors, others, options = SETTINGS[name]
    y = as_pair(getattr(functional, name)(*tensors, *others, **options))[0]
    assert not any(torch.equal(y, changed[0]) for changed in without_each_argument(name))


@pytest.mark.parametrize(("name", "position"), TENSORS)
def test_a_function_of_any_proxy_is_traced_as_one_node_with_all_arguments(name: str, position: int) -> None:
    function = getattr(functional, name)
    tensors, others, options = SETTINGS[name]

    def call(replaced: Any) -> Any:
        given = [replaced if index == position else tensor for index, tensor in enumerate(tensors)]
        return function(*given, *others, **options)

    traced = fx.symbolic_trace(call)
    assert [node.target for node in traced.graph.nodes if node.op == "call_function"] == [function]
    for value in (tensors[position], tensors[position] * 3):
        for ours, expected in zip(as_pair(traced(value)), as_pair(call(value)), strict=True):
            assert torch.equal(ours, expected)


@pytest.mark.filterwarnings("ignore:.*prototype stage:UserWarning")
@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "z_score"])
def test_jagged_tensors_with_all_settings_give_the_rows_of_dense_ones(name: str) -> None:
    function = getattr(functional, name)
    tensors, others, options = SETTINGS[name]
    offsets = torch.tensor([0, 5, 6, 16])
    nested = [
        torch.nested.nested_tensor_from_jagged(tensor, offsets) if tensor.ndim == 2 else tensor for tensor in tensors
    ]
    found = as_pair(function(*nested, *others, **options))
    expected = as_pair(function(*tensors, *others, **options))
    for ours, rows in zip(found, expected, strict=True):
        assert torch.equal(ours.values(), rows)
        assert torch.equal(ours.offsets(), offsets)
