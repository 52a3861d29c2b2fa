"""omninorm's RMSNorm as a layer of Hugging Face `kernels`: what it computes, and models loaded with use_kernels=True."""

import importlib.metadata
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.utils import is_kernels_available

from omninorm import functional
from omninorm.errors import ConfigError, MissingExtraError
from omninorm.layers.hub import HubRMSNorm, register_hub_layers, rounding_order

DISTRIBUTION = [each for each in importlib.metadata.distributions() if each.metadata["Name"] == "kernels"]


class Fp32RMSNorm(LlamaRMSNorm):
    """Rounds once, after the gain."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        wide = hidden_states.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.weight * wide).to(hidden_states.dtype)


class Doubled(LlamaRMSNorm):
    """No RMSNorm."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return 2 * super().forward(hidden_states)


class Nameless(nn.Module):
    """An RMSNorm without `variance_epsilon`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return nn.functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.eps)


def replaced(layer: Any) -> Any:
    """Replace a module's forward method as `kernels` does."""
    layer.forward = MethodType(HubRMSNorm.forward, layer)
    return layer


@pytest.mark.parametrize(("kind", "order"), [(LlamaRMSNorm, "llama"), (Fp32RMSNorm, "fp32")])
def test_layer_computes_with_the_rounding_order_of_the_class_it_replaces(kind, order: str) -> None:
    layer, x = kind(64).bfloat16(), torch.randn(50, 64).bfloat16()
    nn.init.normal_(layer.weight)
    expected = layer(x)
    y = replaced(layer)(x)
    assert rounding_order(kind) == order
    assert torch.equal(y, functional.rms_norm(x, layer.weight, 1e-6, cast=order))
    assert (y != expected).float().mean() < 0.01
    other = functional.rms_norm(x, layer.weight, 1e-6, cast="fp32" if order == "llama" else "llama")
    assert (y != other).float().mean() > 0.05


@pytest.mark.parametrize("kind", [Doubled, Nameless])
def test_class_that_computes_something_else_keeps_its_forward(kind) -> None:
    layer, x = kind(64), torch.randn(5, 64)
    layer.eps = 1e-6
    expected = layer(x)
    assert rounding_order(kind) is None
    assert torch.equal(replaced(layer)(x), expected)


def test_result_of_a_wider_gain_keeps_the_dtype_of_the_class() -> None:
    layer, x = LlamaRMSNorm(64), torch.randn(5, 64).bfloat16()
    assert replaced(layer)(x).dtype == torch.float32


@pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated:DeprecationWarning")  # Dynamo's own
def test_layer_compiles_to_one_graph() -> None:
    layer, x = replaced(LlamaRMSNorm(64)), torch.randn(5, 64)
    assert torch.equal(torch.compile(layer.forward, backend="eager", fullgraph=True)(x), layer(x))


def test_unknown_device_is_refused() -> None:
    with pytest.raises(ConfigError, match="got 'gpu'"):
        register_hub_layers(["cpu", "gpu"])


@pytest.mark.skipif(bool(DISTRIBUTION), reason="kernels is installed")
def test_missing_kernels_package_is_named_with_the_command() -> None:
    with pytest.raises(MissingExtraError, match="pip install kernels"):
        register_hub_layers()


@pytest.mark.skipif(not is_kernels_available(), reason="no version of kernels that this transformers accepts")
def test_use_kernels_loads_a_model_with_omninorms_norms(tmp_path: Path) -> None:
    register_hub_layers()
    options = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64, "intermediate_size": 64}
    config = LlamaConfig(hidden_size=32, num_hidden_layers=2, **options)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, use_kernels=True)
    norms = [each for each in model.modules() if isinstance(each, LlamaRMSNorm)]
    assert len(norms) == 5
    assert all(norm.forward.__func__ is HubRMSNorm.forward for norm in norms)
    tokens = torch.arange(20)[None]
    torch.testing.assert_close(model(tokens).logits, plain(tokens).logits)
    model.train()(tokens).logits.float().square().sum().backward()
    assert all(norm.weight.grad.abs().sum() > 0 for norm in norms)
