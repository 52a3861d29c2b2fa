"""Forward passes that are no training, in a sampled step: inference mode, torch.func, tracing, nested tensors."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from helpers.watched_models import Decoder, some_tokens
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from omninorm.layers import RMSNorm
from omninorm.monitor import Watch, watch

WIDTH = 8


class Listed(nn.Module):
    """A model whose blocks are lists of sublayers, as some of transformers' are."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 1)
        self.blocks = nn.ModuleList(
            nn.ModuleList([nn.LayerNorm(WIDTH), nn.MultiheadAttention(WIDTH, 2), nn.LayerNorm(WIDTH), Feed()])
            for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm1, attention, norm2, feed_forward in self.blocks:  # type: ignore[misc]
            h = norm1(x)
            x = x + attention(h, h, h, need_weights=False)[0]
            x = x + feed_forward(norm2(x))
        return self.head(x)


class Feed(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH))


class OfFunctions(nn.Module):
    """A block without norm modules."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(nn.functional.layer_norm(x, (WIDTH,)))
        return x + self.down(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


def of_functions() -> nn.Module:
    return nn.Sequential(nn.Linear(3, WIDTH), nn.Sequential(*(OfFunctions() for _ in range(3))), nn.Linear(WIDTH, 1))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "nn": lambda: Decoder(lambda: nn.LayerNorm(16)),
    "omninorm": lambda: Decoder(lambda: RMSNorm(16)),
    "list": Listed,
    "functions": of_functions,
}


def inputs(model: nn.Module) -> Tensor:
    torch.manual_seed(1)
    return some_tokens(0) if isinstance(model, Decoder) else torch.randn(4, 5, 3)


def in_inference_mode(model: nn.Module) -> None:
    with torch.inference_mode():
        model(inputs(model))


def func_grad(model: nn.Module) -> None:
    x = inputs(model)
    parameters = {name: each.detach() for name, each in model.named_parameters()}
    torch.func.grad(lambda each: torch.func.functional_call(model, each, (x,)).sum())(parameters)


def func_vmap(model: nn.Module) -> None:
    x = inputs(model)
    parameters = {name: each.detach() for name, each in model.named_parameters()}

    def loss(each: dict[str, Tensor], row: Tensor) -> Tensor:
        return torch.func.functional_call(model, each, (row[None],)).sum()

    torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)


def traced(model: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        torch.jit.trace(model, (inputs(model),), check_trace=False)


def faked(model: nn.Module) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model(mode.from_tensor(inputs(model)))


OTHER = {"inference": in_inference_mode, "grad": func_grad, "vmap": func_vmap, "jit": traced, "fake": faked}


def watched_step(model: nn.Module, other: Callable[[nn.Module], None] | None) -> Watch:
    """Return a watch of one sampled step that began with another forward pass."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")  # vmap of attention
        with watch(model, every=1, rules=[]) as watched:
            if other is not None:
                other(model)
            loss = model(inputs(model)).square().mean()
            loss.backward()
            watched.step(loss)
    return watched


@pytest.mark.parametrize("other", OTHER)
@pytest.mark.parametrize("kind", MODELS)
def test_other_pass_neither_fails_nor_counts(kind: str, other: str) -> None:
    torch.manual_seed(0)
    model = MODELS[kind]()
    expected = watched_step(model, None)
    model.zero_grad()
    found = watched_step(model, OTHER[other])
    assert found.history.samples[-1].signals == expected.history.samples[-1].signals
    assert found.history.placement == expected.history.placement


class Fed(nn.Module):
    """A model whose first block reads the input itself."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.blocks = model[1]

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


def test_model_is_trained_on_features_from_inference_mode() -> None:
    torch.manual_seed(0)
    model = Fed(of_functions())
    with watch(model, every=1, rules=[]) as watched:
        for inference in (False, True):
            with torch.inference_mode(inference):
                x = torch.ones(4, 5, WIDTH) + torch.arange(WIDTH)
            loss = model(x).square().mean()
            loss.backward()
            model.zero_grad()
            watched.step(loss)
    first, second = watched.history.samples
    assert second.signals == first.signals
    assert first.signals["stream_rms"][0] is not None
