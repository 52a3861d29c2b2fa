"""recognize finds the form of norms of any class, and refuses modules that are no norms over features."""

from __future__ import annotations

import random
import threading
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omninorm.layers import recognize as recognition
from omninorm.layers.identify import RefusedError
from omninorm.layers.recognize import Form, recognize

D = 12
Eps = 1e-5


def rms(x: Tensor, dim: int = -1) -> Tensor:
    return x * (x.square().mean(dim, keepdim=True) + Eps).rsqrt()


class Own(nn.Module):
    """A norm with any formula, which is called with the input and the parameters."""

    def __init__(self, formula: Any, *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.formula = formula
        self.own = [f"p{at}" for at in range(len(shapes))]
        for name, shape in zip(self.own, shapes, strict=True):
            self.register_parameter(name, nn.Parameter(torch.ones(shape)))

    def forward(self, x: Tensor) -> Tensor:
        return self.formula(x, *(self.get_parameter(name) for name in self.own))


class ChannelNorm(nn.LayerNorm):
    """As timm writes LayerNorm2d."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class PlusOne(nn.LayerNorm):
    """As Nemotron's LayerNorm1P."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight + 1, self.bias, self.eps)


class GatedNorm(nn.Module):
    """Groups of features and a gate: before the norm as in Mamba 2, or after it as in Qwen3-Next."""

    def __init__(self, groups: int, first: bool, activation: Any = F.silu) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D))
        self.groups, self.first, self.activation, self.eps = groups, first, activation, 1e-6

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        if gate is not None and self.first:
            x = x * self.activation(gate)
        y = x.unflatten(-1, (self.groups, -1))
        y = (y * (y.square().mean(-1, keepdim=True) + self.eps).rsqrt()).flatten(-2) * self.weight
        return y if gate is None or self.first else y * self.activation(gate)


class NeedsGate(GatedNorm):
    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return super().forward(x, gate)


class AroundANorm(nn.Module):
    """A gain around a norm without one, as in x-transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.LayerNorm(D, elementwise_affine=False)
        self.gamma = nn.Parameter(torch.ones(D))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.gamma


NORMS: dict[str, tuple[nn.Module, Form]] = {
    "LayerNorm": (nn.LayerNorm(D, eps=1e-3), Form(True, gain="weight", bias="bias", eps=1e-3)),
    "RMSNorm": (nn.RMSNorm(D, eps=1e-6), Form(False, gain="weight", eps=1e-6)),
    "without parameters": (nn.RMSNorm(D, eps=1e-6, elementwise_affine=False), Form(False, eps=1e-6)),
    "weightless": (Own(rms), Form(False, eps=Eps)),
    "a name of its own": (Own(lambda x, g: rms(x) * g, (D,)), Form(False, gain="p0", eps=Eps)),
    "stored as γ − 1": (Own(lambda x, g: rms(x) * (1 + g), (D,)), Form(False, gain="p0", offset=1.0, eps=Eps)),
    "a subclass stored as γ − 1": (PlusOne(D), Form(True, gain="weight", offset=1.0, bias="bias", eps=1e-5)),
    "one gain": (Own(lambda x, g: F.normalize(x, dim=-1) * D**0.5 * g, (1,)), Form(False, gain="p0")),
    "one gain stored as γ − 1": (
        Own(lambda x, g: F.normalize(x, dim=-1) * D**0.5 * (g + 1), (1,)),
        Form(False, gain="p0", offset=1.0),
    ),
    "ε outside the root": (Own(lambda x, g: x / (x.square().mean(-1, keepdim=True).sqrt() + Eps) * g, (D,)), Form(False, gain="p0")),
    "a gain that is no parameter": (Own(lambda x, g: rms(x) * g.exp(), (D,)), Form(False, eps=Eps)),
    "channels first": (ChannelNorm(D, eps=1e-6), Form(True, axis=1, gain="weight", bias="bias", eps=1e-6)),
    "channels first, 4-D gain": (Own(lambda x, g: rms(x, 1) * g, (1, D, 1, 1)), Form(False, axis=1, gain="p0", eps=Eps)),
    "channels first, 3-D": (Own(lambda x, g: rms(x, 1) * g, (1, D, 1)), Form(False, axis=1, gain="p0", eps=Eps)),
    "heads": (Own(lambda x, g: rms(x) * g, (4, 3)), Form(False, dims=2, groups=4, gain="p0", eps=Eps)),
    "groups": (GatedNorm(3, True), Form(False, groups=3, gain="weight", eps=1e-6, gate="silu")),
    "gate after": (GatedNorm(1, False), Form(False, gain="weight", eps=1e-6, gate="after")),
    "sigmoid before": (GatedNorm(1, True, torch.sigmoid), Form(False, gain="weight", eps=1e-6, gate="sigmoid")),
    "another gate": (GatedNorm(1, True, torch.tanh), Form(False, gain="weight", eps=1e-6, gate="unknown")),
    "a required gate": (NeedsGate(1, True), Form(False, gain="weight", eps=1e-6, gate="silu")),
    "around a norm": (AroundANorm(), Form(True, gain="gamma", eps=1e-5)),
}  # fmt: skip


@pytest.mark.parametrize("name", NORMS)
def test_form_is_measured(name: str) -> None:
    module, expected = NORMS[name]
    assert recognize(module) == expected


OTHERS = {
    "linear": nn.Linear(D, D),
    "a scale": Own(lambda x, g: x * g, (D,)),
    "saturation": Own(lambda x, g: torch.tanh(x) * g, (D,)),
    "softmax": nn.Softmax(-1),
    "prelu": nn.PReLU(),
    "identity": nn.Identity(),
    "batches": nn.BatchNorm1d(D),
    "whole images": nn.GroupNorm(1, D),
    "all rows": Own(lambda x, g: x / x.square().mean().sqrt() * g, (D,)),
    "absolute value": Own(lambda x, g: (rms(x) * g).abs(), (D,)),
    "largest element": Own(lambda x, g: x / x.abs().amax(-1, keepdim=True) * g, (D,)),
    "interleaved groups": Own(lambda x, g: rms(x.unflatten(-1, (-1, 3)), -2).flatten(-2) * g, (D,)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_modules_are_no_norms(name: str) -> None:
    try:
        assert recognize(OTHERS[name]) is None
    except RefusedError:  # none of the layouts can be passed to it
        assert name == "linear"


def test_module_itself_is_not_called_or_changed() -> None:
    calls: list[Any] = []
    norm = GatedNorm(1, False).train()
    norm.register_buffer("count", torch.zeros(()))
    norm.register_forward_hook(lambda *args: calls.append(args))
    weight = norm.weight
    state = torch.get_rng_state()
    assert recognize(norm) is not None
    assert calls == []
    assert norm.training
    assert norm.weight is weight
    assert torch.equal(norm.weight, torch.ones(D))
    assert torch.equal(torch.get_rng_state(), state)


def test_module_that_cannot_run_here_is_unknown() -> None:
    def forward(x: Tensor, g: Tensor) -> Tensor:
        raise RuntimeError("needs a GPU")

    with pytest.raises(RefusedError):
        recognize(Own(forward, (D,)))


def test_default_device_and_dtype_do_not_matter() -> None:
    module, expected = NORMS["groups"]
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            assert recognize(module) == expected
    finally:
        torch.set_default_dtype(torch.float32)
    assert recognition.unwatched_copy(nn.LayerNorm(3, device="meta")).weight.device.type == "cpu"


def random_states() -> list[Any]:
    return [torch.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state())]


def noisy(x: Tensor, sigma: Tensor) -> Tensor:
    return x + sigma * torch.randn_like(x) * random.random() * numpy.random.rand()


def test_random_states_are_kept() -> None:
    before = random_states()
    assert recognize(Own(noisy, (D,))) is None
    assert random_states() == before


class Counter:
    """An object that a norm and its owner share."""

    def __init__(self) -> None:
        self.calls = 0


class Counting(nn.LayerNorm):
    def __init__(self, shared: Any) -> None:
        super().__init__(D, eps=Eps)
        self.shared, self.act = shared, self.count

    def count(self, x: Tensor) -> Tensor:
        self.shared.calls += 1
        return x

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.act(x))


def test_shared_objects_are_not_changed() -> None:
    shared = Counter()
    norm = Counting(shared)
    form = recognize(norm)
    assert form is not None
    assert form.centered
    assert shared.calls == 0
    norm(torch.zeros(2, D))
    assert shared.calls == 1


class Holding(nn.LayerNorm):
    def __init__(self, held: Any) -> None:
        super().__init__(D, eps=Eps)
        self.held = held

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


@pytest.mark.parametrize("held", [lambda: [nn.Linear(2, 2)], threading.Lock, lambda: [torch.zeros(2**21)]])
def test_module_that_cannot_be_copied_is_refused(held: Any) -> None:
    assert recognize(Holding([torch.zeros(2)])) is not None
    with pytest.raises(RefusedError):
        recognize(Holding(held()))
