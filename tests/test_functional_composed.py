"""The norms that are made of others, gated, grouped, L2 and modulated, against their formulas in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from helpers import oracle
from torch import Tensor, fx

from omninorm import functional
from omninorm.errors import InputError

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
WIDTH, EPS = 24, 1e-3
Arguments = dict[str, Tensor]


def grouped(x: Tensor, groups: int) -> Tensor:
    return oracle.rms_norm(x.unflatten(-1, (groups, -1)), None, EPS).flatten(-2)


# Each norm by its formula, and by omninorm, on the same named tensors.
NORMS: dict[str, tuple[Callable[[Arguments], Tensor], Callable[[Arguments], Tensor]]] = {
    "norm then SiLU gate": (
        lambda a: oracle.rms_norm(a["x"], a["weight"], EPS) * a["z"] / (1 + torch.exp(-a["z"])),
        lambda a: functional.gated_rms_norm(a["x"], a["z"], a["weight"], EPS),
    ),
    "SiLU gate then norm": (
        lambda a: oracle.rms_norm(a["x"] * a["z"] / (1 + torch.exp(-a["z"])), a["weight"], EPS),
        lambda a: functional.gated_rms_norm(a["x"], a["z"], a["weight"], EPS, norm_first=False),
    ),
    "norm of 4 groups then sigmoid gate": (
        lambda a: grouped(a["x"], 4) * a["weight"] / (1 + torch.exp(-a["z"])),
        lambda a: functional.gated_rms_norm(a["x"], a["z"], a["weight"], EPS, activation="sigmoid", groups=4),
    ),
    "SiLU gate then norm of 3 groups without gain": (
        lambda a: grouped(a["x"] * a["z"] / (1 + torch.exp(-a["z"])), 3),
        lambda a: functional.gated_rms_norm(a["x"], a["z"], None, EPS, norm_first=False, groups=3),
    ),
    "groups": (
        lambda a: grouped(a["x"], 6) * (a["weight"] + 0.5),
        lambda a: functional.rms_norm(a["x"], a["weight"], EPS, groups=6, gain_offset=0.5),
    ),
    "L2": (
        lambda a: a["x"] / torch.sqrt((a["x"] * a["x"]).sum(-1, keepdim=True) + EPS),
        lambda a: functional.l2_norm(a["x"], EPS),
    ),
    "modulated RMSNorm": (
        lambda a: oracle.rms_norm(a["x"], None, EPS) * (1 + a["scale"]) + a["shift"],
        lambda a: functional.modulated_rms_norm(a["x"], a["scale"], a["shift"], EPS),
    ),
    "modulated RMSNorm without shift": (
        lambda a: oracle.rms_norm(a["x"], None, EPS) * (1 + a["scale"]),
        lambda a: functional.modulated_rms_norm(a["x"], a["scale"], None, EPS),
    ),
    "modulated LayerNorm": (
        lambda a: oracle.layer_norm(a["x"], None, None, EPS) * (1 + a["scale"]) + a["shift"],
        lambda a: functional.modulated_layer_norm(a["x"], a["scale"], a["shift"], EPS),
    ),
}


def arguments(dtype: torch.dtype, other: torch.dtype | None = None) -> Arguments:
    """x and z of `dtype`, and gains, scales and shifts of `other`, the same by default."""
    other = other or dtype
    return {
        "x": torch.randn(3, 5, WIDTH).to(dtype),
        "z": torch.randn(3, 5, WIDTH).mul(3).to(dtype),
        "weight": (torch.rand(WIDTH) + 0.5).to(other),
        "scale": torch.randn(3, 1, WIDTH).to(other),
        "shift": torch.randn(3, 1, WIDTH).to(other),
    }


def doubled(values: Arguments) -> Arguments:
    return {name: value.detach().double().requires_grad_() for name, value in values.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_it_is_rounded_once_from_the_formula(name: str, dtype: torch.dtype) -> None:
    formula, ours = NORMS[name]
    values = arguments(dtype)
    y = ours(values)
    assert (y.dtype, y.shape) == (dtype, values["x"].shape)
    oracle.assert_forward(y, formula(doubled(values)))


@pytest.mark.parametrize("name", NORMS)
def test_gains_and_modulations_may_be_wider_than_the_input(name: str) -> None:
    formula, ours = NORMS[name]
    values = arguments(torch.bfloat16, torch.float32)
    y = ours(values)
    assert y.dtype == torch.bfloat16
    oracle.assert_forward(y, formula(doubled(values)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_gradients_are_those_of_the_formula(name: str, dtype: torch.dtype) -> None:
    formula, ours = NORMS[name]
    values = {key: value.requires_grad_() for key, value in arguments(dtype).items()}
    exact = doubled(values)
    dy = torch.randn(values["x"].shape).to(dtype)
    ours(values).backward(dy)
    formula(exact).backward(dy.double())
    for key, value in values.items():
        if exact[key].grad is None:
            assert value.grad is None
            continue
        assert value.grad is not None
        assert value.grad.dtype == dtype
        error = (value.grad.double() - exact[key].grad).norm() / exact[key].grad.norm()
        assert error < 4 * torch.finfo(dtype).eps, key


@pytest.mark.parametrize("name", NORMS)
def test_first_and_second_derivatives_are_right_in_float64(name: str) -> None:
    _, ours = NORMS[name]
    small = {
        key: value[..., :1, :].clone() if value.ndim == 3 else value for key, value in arguments(torch.float64).items()
    }
    keys, tensors = zip(*((key, value.requires_grad_()) for key, value in small.items()), strict=True)

    def call(*given: Tensor) -> Tensor:
        return ours(dict(zip(keys, given, strict=True)))

    assert torch.autograd.gradcheck(call, tensors)
    assert torch.autograd.gradgradcheck(call, tensors)


@pytest.mark.parametrize("name", NORMS)
def test_torch_fx_records_one_node(name: str) -> None:
    _, ours = NORMS[name]
    values = arguments(torch.float32)

    class Model(torch.nn.Module):
        def forward(self, x: Tensor, z: Tensor, weight: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
            return ours({"x": x, "z": z, "weight": weight, "scale": scale, "shift": shift})

    traced = fx.symbolic_trace(Model())
    calls = [node for node in traced.graph.nodes if node.op == "call_function"]
    assert len(calls) == 1
    assert torch.equal(traced(**values), ours(values))


@pytest.mark.parametrize("name", NORMS)
def test_it_compiles_into_one_graph(name: str) -> None:
    _, ours = NORMS[name]
    values = arguments(torch.float32)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(values), ours(values))


def test_groups_of_one_feature_leave_only_signs() -> None:
    x = torch.tensor([3.0, -2.0, 0.5])
    assert torch.equal(functional.rms_norm(x, eps=0.0, groups=3), torch.tensor([1.0, -1.0, 1.0]))


@pytest.mark.parametrize("cast", ["fp32", "llama"])
def test_one_group_is_the_plain_norm(cast: str) -> None:
    x, weight = torch.randn(4, WIDTH).bfloat16(), torch.randn(WIDTH).bfloat16()
    plain = functional.rms_norm(x, weight, cast=cast)
    assert torch.equal(functional.rms_norm(x[None], weight, cast=cast, dim=2), plain[None])


@pytest.mark.parametrize("dim", [1, -3])
@pytest.mark.parametrize("norm", [functional.rms_norm, functional.layer_norm])
def test_any_dimension_can_hold_the_features(norm: Callable[..., Tensor], dim: int) -> None:
    x, weight = torch.randn(2, 6, 4, 5), torch.rand(6) + 0.5
    expected = norm(x.permute(0, 2, 3, 1).contiguous(), weight).permute(0, 3, 1, 2)
    assert torch.equal(norm(x, weight, dim=dim), expected)


def test_numbers_may_be_scalars_of_numpy() -> None:
    x, z, scale, eps = torch.randn(2, 6), torch.randn(2, 6), torch.randn(6), numpy.float64(1e-3)
    ours = functional.gated_rms_norm(x, z, eps=eps, groups=numpy.int64(2))
    assert torch.equal(ours, functional.gated_rms_norm(x, z, eps=1e-3, groups=2))
    assert torch.equal(
        functional.rms_norm(x, eps=eps, groups=numpy.int64(3)), functional.rms_norm(x, eps=1e-3, groups=3)
    )
    assert torch.equal(functional.l2_norm(x, eps), functional.l2_norm(x, 1e-3))
    for norm in (functional.modulated_rms_norm, functional.modulated_layer_norm):
        assert torch.equal(norm(x, scale, eps=eps), norm(x, scale, eps=1e-3))


def test_rows_of_zeros_stay_zero() -> None:
    x = torch.zeros(2, WIDTH)
    assert not functional.l2_norm(x).any()
    assert not functional.gated_rms_norm(x, x + 1, groups=2).any()


X, Z = torch.ones(2, 6), torch.ones(2, 6)
BAD: dict[str, tuple[Callable[[], Any], str, str]] = {
    "a gate of another shape": (lambda: functional.gated_rms_norm(X, torch.ones(6)), "z must have x's shape", "(6,)"),
    "an integer gate": (lambda: functional.gated_rms_norm(X, Z.int()), "z must be float16", "torch.int32"),
    "a gate elsewhere": (lambda: functional.gated_rms_norm(X, Z.to("meta")), "z and x must be on the same", "meta"),
    "an activation": (lambda: functional.gated_rms_norm(X, Z, activation="relu"), "activation must be", "'relu'"),
    "groups that do not divide": (lambda: functional.rms_norm(X, groups=4), "groups must divide x's 6", "groups=4"),
    "no groups": (lambda: functional.gated_rms_norm(X, Z, groups=0), "groups must divide x's 6", "groups=0"),
    "half a group": (lambda: functional.rms_norm(X, groups=1.5), "groups must divide x's 6", "groups=1.5"),
    "a scale of another shape": (
        lambda: functional.modulated_rms_norm(X, torch.ones(2, 5)), "scale must broadcast", "(2, 5) for x of shape (2, 6)"
    ),
    "a scale that would grow x": (
        lambda: functional.modulated_layer_norm(X, torch.ones(3, 2, 6)), "scale must broadcast", "(3, 2, 6)"
    ),
    "a shift of another shape": (
        lambda: functional.modulated_rms_norm(X, torch.ones(6), torch.ones(3, 6)), "shift must broadcast", "(3, 6)"
    ),
    "no such dimension": (lambda: functional.rms_norm(X, dim=2), "dim must be a dimension of x", "dim=2"),
    "a gain for another dimension": (lambda: functional.rms_norm(X, torch.ones(6), dim=0), "weight must have shape (2,)", "(6,)"),
    "no ε": (lambda: functional.l2_norm(X, None), "eps must be a finite number", "None"),  # type: ignore[arg-type]
    "a negative ε": (lambda: functional.l2_norm(X, -1.0), "eps must be a finite number", "-1.0"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_refused(case: str) -> None:
    call, problem, received = BAD[case]
    with pytest.raises(InputError) as caught:
        call()
    assert problem in caught.value.invariant
    assert received in str(caught.value)
