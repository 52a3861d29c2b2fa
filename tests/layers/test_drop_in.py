"""RMSNorm and LayerNorm can replace those of torch.nn everywhere."""

import inspect

import numpy
import pytest
import torch
from helpers import oracle
from torch import nn

import omninorm
from omninorm.errors import ConfigError, InputError

PAIRS = [(omninorm.RMSNorm, nn.RMSNorm), (omninorm.LayerNorm, nn.LayerNorm)]
ARGUMENTS = [
    {"normalized_shape": 8},
    {"normalized_shape": [8]},
    {"normalized_shape": (3, 8)},
    {"normalized_shape": (2, 3, 8), "eps": 1e-3},
    {"normalized_shape": 8, "elementwise_affine": False},
    {"normalized_shape": torch.Size([3, 8]), "eps": 0.5, "dtype": torch.bfloat16},
    {"normalized_shape": 8, "dtype": torch.float64},
]


def torch_gains(theirs: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return theirs


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_same_arguments_repr_state_and_values(ours, theirs, arguments) -> None:
    peer, norm = torch_gains(theirs(**arguments)), ours(**arguments)
    assert repr(norm) == repr(peer)
    assert list(norm.state_dict()) == list(peer.state_dict())
    assert isinstance(norm, theirs)
    norm.load_state_dict(peer.state_dict())
    x = torch.randn(4, 2, 3, 8, dtype=arguments.get("dtype", torch.float32))
    y, expected = norm(x), peer(x)
    assert y.shape == x.shape
    # Both sides may be off by FORWARD_ULP of the row's largest value.
    dims = len(norm.normalized_shape)
    allowed = 2 * oracle.FORWARD_ULP[x.dtype] * oracle.ulp(oracle.row_max(expected.flatten(-dims)), x.dtype)
    assert ((y.double() - expected.double()).abs().flatten(-dims) <= allowed).all()
    peer.load_state_dict(norm.state_dict())


@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm_without_bias(bias: bool) -> None:
    norm, peer = omninorm.LayerNorm(5, bias=bias), nn.LayerNorm(5, bias=bias)
    assert list(norm.state_dict()) == list(peer.state_dict())
    assert repr(norm) == repr(peer)
    x = torch.randn(3, 5)
    torch.testing.assert_close(norm(x), peer(x))


def test_positional_arguments_are_torchs() -> None:
    """device and dtype come last, as there."""
    assert omninorm.RMSNorm(4, 1e-3, True, "meta", torch.float16).weight.dtype == torch.float16
    assert omninorm.LayerNorm(4, 1e-3, True, True, "meta", torch.float16).bias.device.type == "meta"
    assert omninorm.RMSNorm(4).eps is None
    assert omninorm.LayerNorm(4).eps == 1e-5


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
@pytest.mark.parametrize("shape", [8, (3, 8)], ids=str)
def test_the_output_may_be_changed_in_place(ours, theirs, shape) -> None:
    """As residual code does: y += x."""
    results = []
    for norm in (ours(shape, dtype=torch.float64), theirs(shape, dtype=torch.float64)):
        x = torch.linspace(-1, 2, 48, dtype=torch.float64).reshape(2, 3, 8).requires_grad_()
        y = norm(x)
        y += x
        y.relu_().square().sum().backward()
        results.append(x.grad)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    "norm_type", [omninorm.CRMSNorm, omninorm.ScaleNorm, omninorm.DynamicTanh, omninorm.DynamicErf]
)
def test_the_output_of_the_other_norms_may_be_changed_in_place(norm_type) -> None:
    x = torch.randn(2, 8, requires_grad=True)
    norm_type(8)(x).mul_(2.0).sum().backward()
    assert x.grad.isfinite().all()


def test_sizes_may_be_numpy_integers_and_inputs_keyword_arguments() -> None:
    assert omninorm.RMSNorm(numpy.int64(4)).normalized_shape == (4,)
    x = torch.randn(2, 4)
    assert torch.equal(omninorm.LayerNorm(4)(input=x), omninorm.LayerNorm(4)(x))
    assert torch.equal(omninorm.RMSNorm(4)(x=x), omninorm.RMSNorm(4)(x))


NORMS = [omninorm.RMSNorm, omninorm.LayerNorm, omninorm.CRMSNorm, omninorm.ScaleNorm, omninorm.DynamicTanh, omninorm.DynamicErf]  # fmt: skip


@pytest.mark.parametrize("norm_type", NORMS)
def test_built_without_memory_and_filled_later(norm_type) -> None:
    norm, expected = norm_type(8, device="meta").to_empty(device="cpu"), norm_type(8)
    for parameter in norm.parameters():
        parameter.data.fill_(float("nan"))
    norm.reset_parameters()
    for name, parameter in expected.named_parameters():
        assert torch.equal(norm.get_parameter(name), parameter)


@pytest.mark.parametrize("norm_type", NORMS)
def test_gradients_per_sample(norm_type) -> None:
    """vmap over grad, against one backward pass a sample."""
    norm, samples = norm_type(8, dtype=torch.float64), torch.randn(5, 3, 8, dtype=torch.float64)
    parameters = dict(norm.named_parameters())

    def loss(parameters: dict[str, torch.Tensor], sample: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(norm, parameters, (sample,)).square().sin().sum()

    together = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, samples)
    for index, sample in enumerate(samples):
        alone = torch.autograd.grad(loss(parameters, sample), list(parameters.values()))
        for name, gradient in zip(parameters, alone, strict=True):
            torch.testing.assert_close(together[name][index], gradient)


def test_with_a_gain_offset_the_initial_norm_is_the_same() -> None:
    x = torch.randn(2, 6)
    norm = omninorm.RMSNorm(6, gain_offset=1.0)
    assert torch.equal(norm.weight, torch.zeros(6))
    assert torch.equal(norm(x), omninorm.RMSNorm(6)(x))
    assert repr(norm) == "RMSNorm((6,), eps=None, elementwise_affine=True, gain_offset=1.0)"
    assert repr(omninorm.RMSNorm(6, cast="llama")) == "RMSNorm((6,), eps=None, elementwise_affine=True, cast='llama')"


def test_a_fused_torch_encoder_layer_accepts_ours() -> None:
    """nn.TransformerEncoderLayer reads weight, bias and eps of its norms on its fast path."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        expected = layer(x)
        layer.norm1, layer.norm2 = omninorm.LayerNorm(8), omninorm.LayerNorm(8)
        torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("norm", [omninorm.RMSNorm, omninorm.LayerNorm, omninorm.DynamicTanh, omninorm.DynamicErf])
@pytest.mark.parametrize("shape", [0, -3, (), (4, 0), 2.5, "8", True, None])
def test_bad_shapes_are_refused(norm, shape) -> None:
    with pytest.raises(ConfigError, match="normalized_shape must be one or more integers ≥ 1, got"):
        norm(shape)


@pytest.mark.parametrize("norm", [omninorm.RMSNorm, omninorm.LayerNorm, omninorm.CRMSNorm, omninorm.ScaleNorm])
@pytest.mark.parametrize("eps", [-1e-6, float("nan"), float("inf"), "small"])
def test_bad_eps_is_refused(norm, eps) -> None:
    with pytest.raises(ConfigError, match=r"eps must be a finite number ≥ 0 and ≤ 3\.4e\+38, got"):
        norm(4, eps)


@pytest.mark.parametrize("norm", [omninorm.RMSNorm, omninorm.LayerNorm, omninorm.DynamicTanh, omninorm.DynamicErf])
def test_an_input_of_another_shape_or_type_is_refused(norm) -> None:
    with pytest.raises(InputError, match=r"shape ends in \(3, 4\), got shape \(2, 3, 5\)"):
        norm((3, 4))(torch.ones(2, 3, 5))
    with pytest.raises(InputError, match="got list"):
        norm(4)([1.0])
    with pytest.raises(InputError, match=r"must be float16, bfloat16, float32 or float64, got torch\.int64"):
        norm(4)(torch.ones(4, dtype=torch.int64))


@pytest.mark.parametrize("norm", [omninorm.DynamicTanh, omninorm.DynamicErf])
def test_an_input_on_another_device_is_refused_with_both_names(norm) -> None:
    with pytest.raises(InputError, match="meta and cpu"):
        norm(8, device="meta")(torch.ones(2, 8))


@pytest.mark.parametrize("offset", [1e39, -1e39, float("nan")])
def test_a_gain_offset_beyond_float32_is_refused(offset: float) -> None:
    with pytest.raises(ConfigError, match="gain_offset"):
        omninorm.RMSNorm(8, gain_offset=offset)
    with pytest.raises(ConfigError, match="gain_offset"):
        omninorm.NormConfig(gain_offset=offset)


NUMBERS = [numpy.float16(0.25), numpy.float32(0.25), numpy.float64(0.25), numpy.array(0.25), torch.tensor(0.25)]


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: type(number).__name__)
def test_constants_and_sizes_are_stored_as_python_numbers(number: object) -> None:
    for norm in (omninorm.RMSNorm(8, number), omninorm.LayerNorm(8, number), omninorm.CRMSNorm(8, number), omninorm.ScaleNorm(8, number)):  # fmt: skip
        assert type(norm.eps) is float
        assert norm.eps == 0.25
    offset = omninorm.RMSNorm(8, gain_offset=number).gain_offset
    assert (type(offset), offset) == (float, 0.25)
    assert omninorm.DynamicTanh(8, alpha=number).alpha.item() == 0.25
    for size in (numpy.int32(8), torch.tensor(8), numpy.array(8)):
        assert type(omninorm.CRMSNorm(size).width) is int
        assert omninorm.RMSNorm(size).normalized_shape == (8,)
        assert omninorm.LayerNorm((2, size)).normalized_shape == (2, 8)


@pytest.mark.parametrize("norm_type", NORMS)
def test_an_unknown_argument_is_refused_with_the_known_ones(norm_type) -> None:
    with pytest.raises(ConfigError) as caught:
        norm_type(8, devise="cpu")
    assert norm_type.__name__ in caught.value.invariant
    assert caught.value.received == "devise"
    assert "did you mean 'device'" in caught.value.remedy


@pytest.mark.parametrize("norm_type", [norm for norm in NORMS if norm is not omninorm.LayerNorm])
def test_a_bias_where_there_is_none_is_refused(norm_type) -> None:
    with pytest.raises(ConfigError) as caught:
        norm_type(8, bias=True)
    assert norm_type.__name__ in caught.value.invariant
    assert caught.value.received == "bias=True"
    assert "LayerNorm" in caught.value.remedy


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_signatures_contain_those_of_torch(ours, theirs) -> None:
    parameters = inspect.signature(ours.__init__).parameters
    assert [*inspect.signature(theirs.__init__).parameters] == [*parameters][: len(inspect.signature(theirs.__init__).parameters)]  # fmt: skip


ONE_DIMENSION = (omninorm.CRMSNorm, omninorm.ScaleNorm)


@pytest.mark.filterwarnings("ignore:.*prototype stage:UserWarning")
@pytest.mark.parametrize(
    ("norm_type", "shape"),
    [*((norm, (8,)) for norm in NORMS)] + [(norm, (2, 4)) for norm in NORMS if norm not in ONE_DIMENSION],
)
def test_jagged_nested_tensors_are_normalized_row_by_row(norm_type, shape: tuple[int, ...]) -> None:
    norm = norm_type(shape if len(shape) > 1 else 8)
    parts = [torch.randn(length, *shape) for length in (2, 3)]
    x = torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=True)
    y = norm(x)
    assert (y + x).shape == x.shape
    y.values().square().sum().backward()
    gradients = [parameter.grad.clone() for parameter in norm.parameters()]
    dense = torch.cat(parts).requires_grad_()
    norm.zero_grad()
    expected = norm(dense)
    expected.square().sum().backward()
    assert torch.equal(y.values(), expected)
    assert torch.equal(x.grad.values(), dense.grad)
    for ours, theirs in zip(gradients, norm.parameters(), strict=True):
        assert torch.equal(ours, theirs.grad)
