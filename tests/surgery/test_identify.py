"""identify recognizes norms by their outputs, refuses near-norms, and covers the norm classes of transformers."""

from __future__ import annotations

import importlib
import inspect
import logging
import pkgutil

import pytest
import torch
from torch import Tensor, nn

import omninorm
from omninorm.layers.identify import apply
from omninorm.surgery import Identity, Refusal, identify

D = 16


class Own(nn.Module):
    """A norm as somebody might write it: `formula(x, weight, bias)`."""

    def __init__(self, formula, bias: bool = False, **attributes: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D))
        self.bias = nn.Parameter(torch.zeros(D)) if bias else None
        self.formula = formula
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.formula(x, self.weight, self.bias)


def power(x: Tensor) -> Tensor:
    return x.square().mean(-1, keepdim=True)


def centred(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.LayerNorm(D, eps=1e-5), Identity("layernorm", D, 1e-5, "weight", 0.0, "bias", "fp32")),
        (nn.LayerNorm(D, eps=1e-12, bias=False), Identity("layernorm", D, 1e-12, "weight", 0.0, None, "fp32")),
        (nn.LayerNorm(D, elementwise_affine=False), Identity("layernorm", D, 1e-5, None, 0.0, None, "fp32")),
        (nn.RMSNorm(D), Identity("rmsnorm", D, None, "weight", 0.0, None, "fp32")),
        (nn.RMSNorm(D, eps=1e-6), Identity("rmsnorm", D, 1e-6, "weight", 0.0, None, "fp32")),
        (omninorm.RMSNorm(D, 1e-6, gain_offset=1.0), Identity("rmsnorm", D, 1e-6, "weight", 1.0, None, "fp32")),
        (omninorm.RMSNorm(D, 1e-6, cast="llama"), Identity("rmsnorm", D, 1e-6, "weight", 0.0, None, "llama")),
        (Own(lambda x, w, b: x * (power(x) + 3.7e-4).rsqrt() * w), Identity("rmsnorm", D, 3.7e-4, "weight", 0.0, None, None)),
        (Own(lambda x, w, b: x / (power(x) + 0.0).sqrt() * w), Identity("rmsnorm", D, 0.0, "weight", 0.0, None, None)),
        (Own(lambda x, w, b: (x.float() * (power(x.float()) + 1e-6).rsqrt()).to(x.dtype) * w), Identity("rmsnorm", D, 1e-6, "weight", 0.0, None, "llama")),
        (Own(lambda x, w, b: centred(x) / (power(centred(x)) + 1e-5).sqrt() * w + b, bias=True), Identity("layernorm", D, 1e-5, "weight", 0.0, "bias", None)),
    ],
)  # fmt: skip
def test_norm_is_identified_by_its_outputs(module: nn.Module, expected: Identity) -> None:
    found = identify(module)
    assert isinstance(found, Identity), found
    if expected.cast is None:  # computed in bfloat16 throughout, an order that omninorm does not have
        assert found.cast is None
    assert found == expected


NEAR = {
    "ε outside the root": (Own(lambda x, w, b: x / (power(x).sqrt() + 1e-3) * w), "its ε is not added to the mean square"),
    "ε as a floor": (Own(lambda x, w, b: x / power(x).sqrt().clamp_min(1e-3) * w), "its ε is not added to the mean square"),
    "unbiased variance": (Own(lambda x, w, b: centred(x) / (x.var(-1, keepdim=True) + 1e-5).sqrt() * w), "its gain is neither"),
    "sum of squares": (Own(lambda x, w, b: x / x.norm(dim=-1, keepdim=True) * w), "its gain is neither"),
    "mean of absolutes": (Own(lambda x, w, b: x / x.abs().mean(-1, keepdim=True) * w), "neither RMSNorm nor LayerNorm"),
    "centred, but not its power": (Own(lambda x, w, b: centred(x) / power(x).sqrt() * w), "neither RMSNorm nor LayerNorm"),
    "half of the features": (Own(lambda x, w, b: x / power(x[..., : D // 2]).sqrt() * w), "neither RMSNorm nor LayerNorm"),
    "groups": (Own(lambda x, w, b: torch.cat([each / power(each).sqrt() for each in x.chunk(2, -1)], -1) * w), "neither RMSNorm nor LayerNorm"),
    "all rows together": (Own(lambda x, w, b: x / x.square().mean().sqrt() * w), "depends on other rows"),
    "no norm": (Own(lambda x, w, b: x * w), "it does not normalize"),
    "saturation": (Own(lambda x, w, b: torch.tanh(x) * w), "neither RMSNorm nor LayerNorm"),
    "exponential gain": (Own(lambda x, w, b: x * (power(x) + 1e-6).rsqrt() * w.exp()), "its gain is neither"),
    "bias without centring": (Own(lambda x, w, b: x * (power(x) + 1e-6).rsqrt() * w + b, bias=True), "a bias but does not subtract"),
    "a scaled bias": (Own(lambda x, w, b: centred(x) / (power(centred(x)) + 1e-5).sqrt() * w + 2 * b, bias=True), "its bias is not a parameter"),
    "absolute value": (Own(lambda x, w, b: (x / power(x).sqrt() * w).abs()), "not −f(x)"),
    "noise": (Own(lambda x, w, b: x / power(x).sqrt() * w + torch.randn_like(x)), "different outputs"),
    "another shape": (Own(lambda x, w, b: (x / power(x).sqrt() * w)[..., :4]), "it maps"),
    "a tuple": (Own(lambda x, w, b: (x, x)), "returns a tuple"),
    "an error": (Own(lambda x, w, b: x @ x), "cannot be called"),
    "not a number": (Own(lambda x, w, b: x * float("nan")), "not finite"),
    "one gain": (omninorm.ScaleNorm(D), "not vectors of one size"),
    "a coordinate less": (omninorm.CRMSNorm(D), "neither RMSNorm nor LayerNorm"),
    "a matrix": (nn.Linear(D, D), "not vectors of one size"),
    "parts": (nn.Sequential(nn.LayerNorm(D)), "contains other modules"),
    "meta": (nn.LayerNorm(D, device="meta"), "no values"),
    "batches": (nn.BatchNorm1d(D), "cannot be called"),
}  # fmt: skip


@pytest.mark.parametrize("name", NEAR)
def test_near_norm_is_refused_with_the_reason(name: str) -> None:
    module, why = NEAR[name]
    found = identify(module)
    assert isinstance(found, Refusal), found
    assert why in found.reason


def test_identified_module_is_not_called_or_changed() -> None:
    calls = []
    norm = nn.LayerNorm(D)
    norm.register_forward_hook(lambda *args: calls.append(args))
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    assert isinstance(identify(norm.train()), Identity)
    assert calls == []
    assert norm.training
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())


@pytest.mark.slow
def test_norm_classes_of_transformers_are_identified_correctly() -> None:
    """Every class that can be built from a width alone; identified ones match omninorm's formula in float64."""
    import transformers.models

    architectures, identified = set(), 0
    logging.disable(logging.CRITICAL)
    try:
        for info in pkgutil.iter_modules(transformers.models.__path__):
            for cls in _norm_classes(f"transformers.models.{info.name}.modeling_{info.name}"):
                try:
                    module = cls(D)
                except Exception:
                    continue
                found = identify(module)
                if isinstance(found, Identity):
                    _check(module, found)
                    architectures.add(info.name)
                    identified += 1
    finally:
        logging.disable(logging.NOTSET)
    assert len(architectures) >= 60
    assert identified >= 150


def _norm_classes(name: str) -> list[type[nn.Module]]:
    try:
        module = importlib.import_module(name)
    except Exception:  # it needs what is not installed
        return []
    classes = [each for each in vars(module).values() if inspect.isclass(each) and issubclass(each, nn.Module)]
    return [each for each in classes if "Norm" in each.__name__ and each.__module__ == name]


def _check(module: nn.Module, found: Identity) -> None:
    generator = torch.Generator().manual_seed(7)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    x = torch.randn(9, found.width or D, generator=generator) * torch.logspace(-4, 3, 9)[:, None]
    with torch.no_grad():
        expected, got = module.double()(x.double()), apply(found, module, x.double(), found.cast or "fp32")
    # Many compute in float32 inside.
    assert torch.allclose(got, expected.double(), rtol=1e-4, atol=1e-5), type(module)
