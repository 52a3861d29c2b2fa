"""torch.export, torch.jit.trace and ONNX: programs compute what the model does, for other sizes too, and can be trained."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import omninorm
import omninorm.onnx

pytestmark = [
    # torch's own, when it exports.
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),  # the reference's checks of shapes
]
WIDTH = 24
NORMS = {
    "RMSNorm": lambda: omninorm.RMSNorm(WIDTH, 1e-6),
    "RMSNorm of Llama": lambda: omninorm.RMSNorm(WIDTH, 1e-6, cast="llama"),
    "RMSNorm of Gemma": lambda: omninorm.RMSNorm(WIDTH, 1e-6, gain_offset=1.0),
    "RMSNorm without gain": lambda: omninorm.RMSNorm(WIDTH, 1e-6, elementwise_affine=False),
    "LayerNorm": lambda: omninorm.LayerNorm(WIDTH),
    "LayerNorm without bias": lambda: omninorm.LayerNorm(WIDTH, bias=False),
    "LayerNorm without gain": lambda: omninorm.LayerNorm(WIDTH, elementwise_affine=False),
}


class Two(nn.Module):
    """A norm, and the same norm after a residual addition in one step."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm(x)
        if isinstance(self.norm, omninorm.LayerNorm):
            return omninorm.functional.add_layer_norm(x, y, self.norm.weight, self.norm.bias, self.norm.eps)
        norm = self.norm
        return omninorm.functional.add_rms_norm(
            x, y, norm.weight, norm.eps, gain_offset=norm.gain_offset, cast=norm.cast
        )


def model(name: str, dtype: torch.dtype = torch.float32) -> Two:
    made = Two(NORMS[name]())
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    return made.to(dtype).eval()


SIZES = {"x": {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}}


def paired(values: Sequence[Any], *quick: tuple[str, Any]) -> list[Any]:
    """Return every norm with every value for parametrize.

    The quick pairs run in `make test`; of the others, `make test-slow` runs one value for each norm, in turns.
    """
    cases = []
    for (number, name), value in itertools.product(enumerate(NORMS), values):
        slow = value == values[number % len(values)]
        marks = () if (name, value) in quick else pytest.mark.slow if slow else pytest.mark.exhaustive
        cases.append(pytest.param(name, value, marks=marks))
    return cases


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("trainable", [True, False])
def test_export(name: str, trainable: bool) -> None:
    """One operator per norm, also if nothing is trainable; sizes stay dynamic."""
    made = model(name).requires_grad_(trainable)
    program = torch.export.export(made, (torch.randn(2, 3, WIDTH),), dynamic_shapes=SIZES)
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert len([target for target in called if target.startswith("omninorm.")]) == 2
    assert not [target for target in called if target.startswith("aten.") and "sym_size" not in target]
    x = torch.randn(5, 7, WIDTH)
    for ours, expected in zip(program.module()(x), made(x), strict=True):
        assert torch.equal(ours, expected)


def test_export_by_the_reference_needs_no_omninorm() -> None:
    made = model("RMSNorm")
    with omninorm.use_backend("reference"):
        program = torch.export.export(made, (torch.randn(2, 3, WIDTH),))
    assert not [node for node in program.graph.nodes if "omninorm" in str(node.target)]
    x = torch.randn(2, 3, WIDTH)
    torch.testing.assert_close(program.module()(x), made(x))


def gradients(run: Callable[[Tensor], tuple[Tensor, Tensor]], of: nn.Module, x: Tensor) -> list[Tensor]:
    """Return the gradients of a sum over the results of `run`, for x and the model's parameters."""
    x = x.clone().requires_grad_()
    results = run(x)
    weights = torch.linspace(-1, 1, x.numel(), dtype=torch.float64).view(x.shape)
    total = sum((y.double() * weights * scale).sum() for scale, y in enumerate(results, 1))
    return list(torch.autograd.grad(total, [x, *of.parameters()]))


@pytest.mark.parametrize(
    ("name", "strict"), paired([True, False], *itertools.product(["RMSNorm of Llama", "LayerNorm"], [True, False]))
)
def test_an_exported_program_has_the_gradients_of_the_model(name: str, strict: bool) -> None:
    """Also a program that was exported with frozen parameters in no_grad."""
    made = model(name).requires_grad_(strict)
    with torch.set_grad_enabled(strict):
        program = torch.export.export(made, (torch.randn(2, 3, WIDTH),), dynamic_shapes=SIZES, strict=strict).module()
    x = torch.randn(5, 7, WIDTH)
    expected = gradients(made.requires_grad_(), made, x)
    for ours, theirs in zip(gradients(program, program.requires_grad_(), x), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("name", "strict"), paired([True, False], ("RMSNorm of Gemma", True), ("RMSNorm of Gemma", False))
)
def test_a_program_by_the_reference_trains(name: str, strict: bool) -> None:
    made = model(name)
    with omninorm.use_backend("reference"):
        program = torch.export.export(made, (torch.randn(2, 3, WIDTH),), strict=strict).module()
    x = torch.randn(2, 3, WIDTH)
    ours = gradients(program, program, x)
    exact = gradients(made.double(), made, x.double())
    for value, expected in zip(ours, exact, strict=True):
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)  # sums of 144 float32 numbers


@pytest.mark.parametrize(
    ("name", "backend"),
    paired(["cpu", "reference"], *itertools.product(["RMSNorm of Llama", "LayerNorm"], ["cpu", "reference"])),
)
def test_a_traced_program_has_the_gradients_of_the_model(name: str, backend: str) -> None:
    made, x = model(name), torch.randn(5, 7, WIDTH)
    with omninorm.use_backend(backend):
        program = torch.jit.trace(made, (torch.randn(2, 3, WIDTH),))
        expected = gradients(made, made, x)
    for ours, theirs in zip(gradients(program, program, x), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.slow
def test_a_program_has_second_derivatives() -> None:
    """In float64, against finite differences."""
    made = model("LayerNorm", torch.float64)
    program = torch.export.export(made, (torch.randn(2, 3, WIDTH).double(),)).module()
    x = torch.randn(2, 3, WIDTH).double().requires_grad_()
    assert torch.autograd.gradgradcheck(program, (x,))


@pytest.mark.slow
def test_a_compiled_program_trains() -> None:
    made, x = model("RMSNorm of Llama"), torch.randn(2, 3, WIDTH)
    program = torch.export.export(made, (x,)).module()
    ours = gradients(torch.compile(program, fullgraph=True), program, x)
    for value, expected in zip(ours, gradients(made, made, x), strict=True):
        torch.testing.assert_close(value, expected)


def to_onnx(
    made: nn.Module, x: Tensor, path: Path, table: bool = True, opset: int = 23
) -> onnxruntime.InferenceSession:
    torch.onnx.export(
        made, (x,), path, dynamo=True, opset_version=opset, verbose=False, dynamic_shapes=SIZES, external_data=False,
        custom_translation_table=omninorm.onnx.translations() if table else None,
    )  # fmt: skip
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(("name", "trainable"), paired([False, True], ("RMSNorm", True)))
def test_onnx(name: str, trainable: bool, tmp_path: Path) -> None:
    made = model(name).requires_grad_(trainable)
    session = to_onnx(made, torch.randn(2, 3, WIDTH), tmp_path / "model.onnx")
    x = torch.randn(5, 7, WIDTH) * 3
    with torch.no_grad():
        expected = [value.double() for value in made.double()(x.double())]
    for ours, exact in zip(session.run(None, {"x": x.numpy()}), expected, strict=True):
        assert ours.dtype == numpy.float32
        # onnxruntime's own sums of 24 numbers
        torch.testing.assert_close(torch.from_numpy(ours).double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "opset"), paired([23, 18], ("RMSNorm of Llama", 23)))
def test_onnx_without_the_table(name: str, opset: int, tmp_path: Path) -> None:
    """Without custom_translation_table the norms become basic operations."""
    made = model(name)
    session = to_onnx(made, torch.randn(2, 3, WIDTH), tmp_path / "model.onnx", table=False, opset=opset)
    x = torch.randn(5, 7, WIDTH) * 3
    with torch.no_grad():
        expected = [value.double() for value in made.double()(x.double())]
    for ours, exact in zip(session.run(None, {"x": x.numpy()}), expected, strict=True):
        # onnxruntime's own sums of 24 numbers
        torch.testing.assert_close(torch.from_numpy(ours).double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NORMS)
def test_decompositions_return_what_the_operators_return(name: str) -> None:
    """With the statistics; the decompositions are what torch.onnx.export uses without the table."""
    made = model(name).double()
    x = torch.randn(2, 3, WIDTH).double()
    program = torch.export.export(made, (x,))
    table = {op: torch._decomp.decomposition_table[op] for op in omninorm.onnx.translations()}
    decomposed = program.run_decompositions(table)
    assert not [node for node in decomposed.graph.nodes if "omninorm" in str(node.target)]
    for ours, expected in zip(decomposed.module()(x), made(x), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "table"),
    [
        pytest.param(name, table, marks=pytest.mark.slow if table == (name != "RMSNorm") else pytest.mark.exhaustive)
        for name, table in itertools.product(["RMSNorm", "RMSNorm of Llama", "LayerNorm"], [True, False])
    ],
)
def test_onnx_in_float16(name: str, table: bool, tmp_path: Path) -> None:
    """Within two units: onnxruntime rounds the sum as omninorm does."""
    made = model(name, torch.float16)
    x = torch.randn(2, 3, WIDTH).half()
    session = to_onnx(made, x, tmp_path / "model.onnx", table=table)
    with torch.no_grad():
        expected = made(x)
    for ours, theirs in zip(session.run(None, {"x": x.numpy()}), expected, strict=True):
        assert ours.dtype == numpy.float16
        torch.testing.assert_close(torch.from_numpy(ours), theirs, rtol=2e-3, atol=2e-3)


def test_onnx_holds_one_node_per_norm_in_opset_23() -> None:
    made = nn.Sequential(omninorm.RMSNorm(WIDTH, 1e-6), omninorm.LayerNorm(WIDTH)).eval()
    program = torch.onnx.export(
        made, (torch.randn(2, WIDTH),), dynamo=True, opset_version=23, verbose=False,
        custom_translation_table=omninorm.onnx.translations(),
    )  # fmt: skip
    assert [node.op_type for node in program.model.graph] == ["RMSNormalization", "LayerNormalization"]
