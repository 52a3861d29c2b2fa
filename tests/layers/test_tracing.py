"""torch.fx and torch.jit.script: norms are traced as leaves, like torch.nn's; scripting them is refused with a remedy."""

import copy
import io
import operator
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

import omninorm
from omninorm import functional
from omninorm.errors import InputError
from omninorm.placement import PLACEMENT_TYPES, Block, FinalNorm, enter

NORMS: dict[str, Callable[[], nn.Module]] = {
    "RMSNorm": lambda: omninorm.RMSNorm(8, 1e-6),
    "RMSNorm of Llama": lambda: omninorm.RMSNorm(8, cast="llama"),
    "RMSNorm of Gemma": lambda: omninorm.RMSNorm(8, gain_offset=1.0),
    "RMSNorm without gain": lambda: omninorm.RMSNorm(8, elementwise_affine=False),
    "RMSNorm over two dimensions": lambda: omninorm.RMSNorm((2, 8)),
    "LayerNorm": lambda: omninorm.LayerNorm(8),
    "LayerNorm without bias": lambda: omninorm.LayerNorm(8, bias=False),
    "LayerNorm over two dimensions": lambda: omninorm.LayerNorm((2, 8)),
    "CRMSNorm": lambda: omninorm.CRMSNorm(8),
    "ScaleNorm": lambda: omninorm.ScaleNorm(8),
    "DynamicTanh": lambda: omninorm.DynamicTanh(8),
    "DynamicErf": lambda: omninorm.DynamicErf(8),
}


class Model(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.norm = norm
        self.last = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)))


def norm(name: str) -> nn.Module:
    """A norm with random parameters."""
    made = NORMS[name]()
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    return made


def nodes(graph: fx.Graph) -> list[tuple[str, str]]:
    return [(node.op, str(node.target)) for node in graph.nodes]


@pytest.mark.parametrize("name", NORMS)
def test_a_norm_in_a_model_is_one_module_node(name: str) -> None:
    model = Model(norm(name))
    traced = fx.symbolic_trace(model)
    calls = [("call_module", name) for name in ("first", "norm", "last")]
    assert nodes(traced.graph) == [("placeholder", "x"), *calls, ("output", "output")]
    x = torch.randn(3, 2, 8)
    expected = model(x)
    restored = pickle.loads(pickle.dumps(traced))
    buffer = io.BytesIO()
    torch.save(traced, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for graph_module in (traced, fx.symbolic_trace(traced), copy.deepcopy(traced), restored, loaded):
        assert torch.equal(graph_module(x), expected)


@pytest.mark.parametrize("name", NORMS)
def test_a_traced_model_has_the_gradients_of_the_model(name: str) -> None:
    model, x = Model(norm(name)), torch.randn(3, 2, 8)
    traced = copy.deepcopy(fx.symbolic_trace(model))
    for each in (model, traced):
        each(x).square().sum().backward()
    gradients = dict(traced.named_parameters())
    for key, parameter in model.named_parameters():
        assert torch.equal(gradients[key].grad, parameter.grad)


@pytest.mark.parametrize("name", NORMS)
def test_a_norm_traced_by_itself_is_one_function_node(name: str) -> None:
    """As a module of torch.nn, which is only a leaf inside a model."""
    module = norm(name)
    traced = fx.symbolic_trace(module)
    assert [op for op, _ in nodes(traced.graph)].count("call_function") == 1
    assert {op for op, _ in nodes(traced.graph)} <= {"placeholder", "get_attr", "call_function", "output"}
    x = torch.randn(3, 2, 8)
    for graph_module in (traced, fx.symbolic_trace(traced), copy.deepcopy(traced), pickle.loads(pickle.dumps(traced))):
        assert torch.equal(graph_module(x), module(x))


class Functions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        y, total = functional.add_rms_norm(functional.rms_norm(x, self.weight), x, self.weight, gain_offset=1.0)
        z, total = functional.add_layer_norm(functional.layer_norm(y), total, eps=1e-3)
        return functional.z_score(z, 0) + total


def test_functions_are_recorded_as_one_node_each() -> None:
    model = Functions()
    traced = fx.symbolic_trace(model)
    called = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    norms = [target for target in called if target not in (operator.getitem, operator.add)]
    assert norms == [
        functional.rms_norm, functional.add_rms_norm, functional.layer_norm, functional.add_layer_norm,
        functional.z_score,
    ]  # fmt: skip
    x = torch.randn(3, 8)
    assert torch.equal(traced(x), model(x))
    assert torch.equal(fx.symbolic_trace(traced)(x), model(x))


class Doubled(omninorm.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * super().forward(x)


def test_a_subclass_with_its_own_forward_is_traced_through() -> None:
    model = Model(Doubled(8))
    traced, x = fx.symbolic_trace(model), torch.randn(2, 8)
    assert torch.equal(traced(x), model(x))
    assert ("call_module", "norm") not in nodes(traced.graph)


def test_hooks_take_effect_once() -> None:
    model, x = Model(omninorm.LayerNorm(8)), torch.randn(2, 8)
    model.norm.register_forward_hook(lambda module, inputs, y: y + 1.0)
    model.norm.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2.0,))
    assert torch.equal(fx.symbolic_trace(model)(x), model(x))


@pytest.mark.parametrize("register", ["register_module_forward_hook", "register_module_forward_pre_hook"])
@pytest.mark.parametrize("name", NORMS)
def test_global_hooks_take_effect_once(name: str, register: str) -> None:
    model, x = Model(norm(name)), torch.randn(3, 2, 8)

    def double(module: nn.Module, inputs: tuple[Tensor, ...], *output: Tensor) -> Tensor | None:
        if module is not model.norm:
            return None
        return 2.0 * (output or inputs)[0]

    hook = getattr(nn.modules.module, register)(double)
    try:
        traced, expected = fx.symbolic_trace(model), model(x)
        assert torch.equal(traced(x), expected)
        assert not torch.equal(model.last(model.norm.forward(model.first(x))), expected)
    finally:
        hook.remove()
    assert torch.equal(traced(x), expected)


@pytest.mark.parametrize("placement", [name for name, kind in PLACEMENT_TYPES.items() if not kind.inner])
def test_blocks_are_traced_through_to_their_norms(placement: str) -> None:
    config = omninorm.NormConfig(norm_placement=placement)

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(
                Block(config, 8, nn.Linear(8, 8), nn.Linear(8, 8), block=number, blocks=2) for number in (1, 2)
            )
            self.final = FinalNorm(config, 8)

        def forward(self, x: Tensor) -> Tensor:
            stream = enter(config, x)
            for block in self.blocks:
                stream = block(stream)
            return self.final(stream)

    model, x = Stack(), torch.randn(2, 3, 8)
    traced = fx.symbolic_trace(model)
    assert torch.equal(traced(x), model(x))
    called = [traced.get_submodule(node.target) for node in traced.graph.nodes if node.op == "call_module"]
    norms = [module for module in model.modules() if isinstance(module, omninorm.RMSNorm)]
    assert [module for module in called if isinstance(module, omninorm.RMSNorm)] != [] or not norms
    assert {id(module) for module in called if isinstance(module, omninorm.RMSNorm)} == {id(norm) for norm in norms}


@pytest.mark.filterwarnings("ignore")  # torch.ao.quantization is deprecated in favour of torchao
@pytest.mark.parametrize("name", ["RMSNorm", "LayerNorm", "CRMSNorm", "ScaleNorm", "DynamicErf"])
def test_fx_quantization_runs_and_stays_close(name: str) -> None:
    model, x = Model(NORMS[name]()).eval(), torch.randn(64, 8)
    prepared = prepare_fx(model, get_default_qconfig_mapping("fbgemm"), (x,))
    prepared(x)
    quantized = convert_fx(prepared)
    assert isinstance(quantized.first, torch.ao.nn.quantized.Linear)
    assert type(quantized.norm) is type(model.norm)
    # The largest of 8-bit steps of three tensors, each about 1/128 of a range of a few units.
    assert (quantized(x) - model(x)).abs().max() < 0.25


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.parametrize("name", NORMS)
def test_torch_jit_script_is_refused_with_the_alternatives(name: str) -> None:
    module = NORMS[name]()
    for model in (module, Model(module)):
        with pytest.raises(InputError) as caught:
            torch.jit.script(model)
        assert type(module).__name__ in caught.value.invariant
        assert "torch.jit.trace" in caught.value.remedy
        assert "torch.export" in caught.value.remedy
