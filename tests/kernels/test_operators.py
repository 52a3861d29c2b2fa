"""torch.ops.omninorm: PyTorch's requirements for operators, and errors for invalid calls before anything is read."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from omninorm.kernels import cpu, operators

pytestmark = pytest.mark.skipif(bool(cpu.unavailable()), reason=cpu.unavailable())

OPERATORS = torch.ops.omninorm
RMS, LAYER = (1e-6, 0.0, False), (1e-6,)


class Inputs:
    """Matching tensors; `gains` is whether there are γ and β."""

    def __init__(
        self, shape: tuple[int, ...] = (2, 3, 5), dtype: torch.dtype = torch.float32, gains: bool = True
    ) -> None:
        self.x, self.residual, self.dy, self.dtotal = (torch.randn(shape).to(dtype) for _ in range(4))
        self.weight, self.bias = (torch.randn(shape[-1]) if gains else None for _ in range(2))
        rows, compute = self.x.numel() // shape[-1], torch.float64 if dtype == torch.float64 else torch.float32
        self.mean, self.scale = torch.randn(rows, dtype=compute), torch.rand(rows, dtype=compute) + 0.5


CALLS: dict[str, Callable[[Inputs], tuple[Any, ...]]] = {
    "rms_norm": lambda t: (t.x, t.weight, *RMS),
    "rms_norm_forward": lambda t: (t.x, t.weight, *RMS),
    "rms_norm_autograd": lambda t: (t.x, t.weight, *RMS),
    "add_rms_norm": lambda t: (t.x, t.residual, t.weight, *RMS),
    "add_rms_norm_forward": lambda t: (t.x, t.residual, t.weight, *RMS),
    "add_rms_norm_autograd": lambda t: (t.x, t.residual, t.weight, *RMS),
    "rms_norm_backward": lambda t: (t.dy, t.dtotal, t.x, t.scale, t.weight, *RMS, True),
    "rms_norm_backward_blocks": lambda t: (t.dy, t.dtotal, t.x, t.scale, t.weight, *RMS, True),
    "layer_norm": lambda t: (t.x, t.weight, t.bias, *LAYER),
    "layer_norm_forward": lambda t: (t.x, t.weight, t.bias, *LAYER),
    "layer_norm_autograd": lambda t: (t.x, t.weight, t.bias, *LAYER),
    "add_layer_norm": lambda t: (t.x, t.residual, t.weight, t.bias, *LAYER),
    "add_layer_norm_forward": lambda t: (t.x, t.residual, t.weight, t.bias, *LAYER),
    "add_layer_norm_autograd": lambda t: (t.x, t.residual, t.weight, t.bias, *LAYER),
    "layer_norm_backward": lambda t: (t.dy, t.dtotal, t.x, t.mean, t.scale, t.weight, t.bias, *LAYER, True),
    "layer_norm_backward_blocks": lambda t: (t.dy, t.dtotal, t.x, t.mean, t.scale, t.weight, t.bias, *LAYER, True),
}


def call(name: str, inputs: Inputs) -> Any:
    return getattr(OPERATORS, name).default(*CALLS[name](inputs))


def test_all_operators_are_tested_here() -> None:
    schemas = {schema.name for schema in torch._C._jit_get_all_schemas()}
    ours = {name for name in schemas if name.startswith("omninorm::")}
    # The watch's compute nothing; tests/watch has them in graphs.
    others = {"omninorm::watch_see", "omninorm::watch_gradient"}
    assert ours - others == {f"omninorm::{name}" for name in CALLS}


def test_the_schemas_in_python_equal_those_of_the_library() -> None:
    ours = [torch._C.parse_schema(f"omninorm::{schema}") for schema in operators.SCHEMAS]
    assert {schema.name for schema in ours} == {f"omninorm::{name}" for name in CALLS}
    for schema in ours:
        assert str(schema) == str(getattr(OPERATORS, schema.name.removeprefix("omninorm::")).default._schema)


INPUTS = {
    "float32": lambda: Inputs(),
    "bfloat16": lambda: Inputs(dtype=torch.bfloat16),
    "float64": lambda: Inputs(dtype=torch.float64),
    "without gains": lambda: Inputs(dtype=torch.float16, gains=False),
    "an empty batch": lambda: Inputs((0, 5)),
    "one row": lambda: Inputs((5,)),
    "several blocks": lambda: Inputs((130, 5)),
}


def opcheck_cases() -> list[Any]:
    """Return operators and inputs: two inputs for all operators in `make test`, and one more for each in `make test-slow`.

    Operators that return block sums also get several blocks, because the meta kernel computes their number.
    """
    others = [each for each in INPUTS if each not in ("float32", "without gains")]
    cases = []
    for number, name in enumerate(CALLS):
        for each in INPUTS:
            slow = each == others[number % len(others)] or (each == "several blocks" and name.endswith("_blocks"))
            marks = () if each not in others else pytest.mark.slow if slow else pytest.mark.exhaustive
            cases.append(pytest.param(name, each, marks=marks))
    return cases


@pytest.mark.parametrize(("name", "inputs"), opcheck_cases())
def test_opcheck(name: str, inputs: str) -> None:
    """The schema is right about aliases and mutation, and the meta kernel about shapes and dtypes."""
    torch.library.opcheck(getattr(OPERATORS, name).default, CALLS[name](INPUTS[inputs]()))


@pytest.mark.parametrize("name", [name for name in CALLS if "autograd" in name])
def test_opcheck_of_derivatives(name: str) -> None:
    inputs = Inputs()
    for tensor in (inputs.x, inputs.residual, inputs.weight, inputs.bias):
        tensor.requires_grad_()
    torch.library.opcheck(getattr(OPERATORS, name).default, CALLS[name](inputs))


@pytest.mark.parametrize("name", [name for name in CALLS if "backward" in name])
def test_opcheck_without_gain_gradients(name: str) -> None:
    arguments = CALLS[name](Inputs())[:-1]
    torch.library.opcheck(getattr(OPERATORS, name).default, (*arguments, False))
    dtotal = (*arguments[:1], None, *arguments[2:])
    torch.library.opcheck(getattr(OPERATORS, name).default, (*dtotal, True))


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_results_of_strided_inputs_are_contiguous_as_in_the_meta_kernels(name: str) -> None:
    inputs = Inputs((4, 3, 5))
    for field in ("x", "residual", "dy", "dtotal"):
        setattr(inputs, field, getattr(inputs, field).transpose(0, 1).contiguous().transpose(0, 1))
    torch.library.opcheck(getattr(OPERATORS, name).default, CALLS[name](inputs))


# Wrong calls -----------------------------------------------------------------------------------------------------


def change(**fields: Callable[[Inputs], Any]) -> Callable[[Inputs], None]:
    def apply(inputs: Inputs) -> None:
        for field, value in fields.items():
            setattr(inputs, field, value(inputs))

    return apply


AGREE = "must agree in shape and dtype"
STATISTICS = "must be those of the forward pass"
WRONG: dict[str, tuple[str, Callable[[Inputs], None], str]] = {
    "a residual of another shape": ("residual", change(residual=lambda t: t.residual[0]), AGREE),
    "a residual of equal size": ("residual", change(residual=lambda t: t.residual.reshape(3, 2, 5)), AGREE),
    "a residual of another dtype": ("residual", change(residual=lambda t: t.residual.double()), AGREE),
    "fewer rows of dy": ("dy", change(dy=lambda t: t.dy[:1]), AGREE),
    "dy of another dtype": ("dy", change(dy=lambda t: t.dy.half()), AGREE),
    "dtotal of another shape": ("dtotal", change(dtotal=lambda t: t.dtotal[..., :4]), AGREE),
    "dtotal of another dtype": ("dtotal", change(dtotal=lambda t: t.dtotal.bfloat16()), AGREE),
    "a short scale": ("scale", change(scale=lambda t: t.scale[:-1]), STATISTICS),
    "an empty scale": ("scale", change(scale=lambda t: t.scale[:0]), STATISTICS),
    "a scale of another dtype": ("scale", change(scale=lambda t: t.scale.double()), STATISTICS),
    "a strided scale": ("scale", change(scale=lambda t: t.scale.repeat_interleave(2)[::2]), STATISTICS),
    "a short mean": ("mean", change(mean=lambda t: t.mean[:-1]), STATISTICS),
    "a mean of another dtype": ("mean", change(mean=lambda t: t.mean.half()), STATISTICS),
    "a narrow gain": ("weight", change(weight=lambda t: t.weight[:-1]), "must have shape (5,)"),
    "a wide gain": ("weight", change(weight=lambda t: torch.ones(6)), "must have shape (5,)"),
    "a gain of two dimensions": ("weight", change(weight=lambda t: torch.ones(1, 5)), "must have shape (5,)"),
    "an integer gain": ("weight", change(weight=lambda t: t.weight.int()), "the dtype must be float16"),
    "a narrow bias": ("bias", change(bias=lambda t: t.bias[:-1]), "must have shape (5,)"),
    "a scalar": ("x", change(x=lambda t: torch.tensor(1.0)), "a last dimension of width >= 1"),
    "width 0": ("x", change(x=lambda t: torch.ones(3, 0)), "a last dimension of width >= 1"),
    "integers": ("x", change(x=lambda t: t.x.int()), "the dtype must be float16"),
    "complex numbers": ("x", change(x=lambda t: t.x.to(torch.complex64)), "the dtype must be float16"),
}


def calls_with(argument: str) -> list[str]:
    """The operators that read this argument. Backward asks β for nothing but its dtype."""
    having = [name for name in CALLS if argument in CALLS[name].__code__.co_names]
    return [name for name in having if argument != "bias" or "layer_norm_backward" not in name]


@pytest.mark.parametrize(("wrong", "name"), [(wrong, name) for wrong in WRONG for name in calls_with(WRONG[wrong][0])])
def test_mismatched_tensors_are_refused(wrong: str, name: str) -> None:
    _, spoil, message = WRONG[wrong]
    inputs = Inputs()
    spoil(inputs)
    with pytest.raises(RuntimeError) as caught:
        call(name, inputs)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("eps", [-1e-6, float("nan"), float("inf")])
def test_an_eps_out_of_range_is_refused(name: str, eps: float) -> None:
    operator = getattr(OPERATORS, name).default
    names = [argument.name for argument in operator._schema.arguments]
    arguments = dict(zip(names, CALLS[name](Inputs()), strict=True)) | {"eps": eps}
    with pytest.raises(RuntimeError, match="eps must be >= 0 and finite"):
        operator(**arguments)


def test_a_gain_offset_that_is_not_finite_is_refused() -> None:
    x = torch.ones(2, 3)
    with pytest.raises(RuntimeError, match="the gain offset"):
        OPERATORS.rms_norm.default(x, None, 1e-6, float("nan"), False)


@pytest.mark.parametrize("name", CALLS)
def test_sparse_rows_are_refused(name: str) -> None:
    inputs = Inputs((3, 5))
    inputs.x = inputs.x.to_sparse()
    with pytest.raises(NotImplementedError):
        call(name, inputs)


def test_arguments_are_not_written(instruction_set: str) -> None:
    for name in CALLS:
        inputs = Inputs()
        before = [t.clone() if isinstance(t, Tensor) else t for t in CALLS[name](inputs)]
        call(name, inputs)
        for a, b in zip(CALLS[name](inputs), before, strict=True):
            assert torch.equal(a, b) if isinstance(a, Tensor) else a == b
