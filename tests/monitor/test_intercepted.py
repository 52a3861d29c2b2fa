"""Functions that a watch has replaced can be pickled, scripted and traced as before."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omninorm.monitor import watch

WIDTH = 8
FUNCTIONS: dict[str, Callable[[], Any]] = {
    "F.softmax": lambda: F.softmax,
    "torch.softmax": lambda: torch.softmax,
    "Tensor.softmax": lambda: Tensor.softmax,
    "attention": lambda: F.scaled_dot_product_attention,
    "F.rms_norm": lambda: F.rms_norm,
    "F.normalize": lambda: F.normalize,
    "torch.sqrt": lambda: torch.sqrt,
    "Tensor.norm": lambda: Tensor.norm,
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.down = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attention(F.normalize(F.rms_norm(x, [8]), dim=-1)).unsqueeze(1).chunk(3, -1)
        x = x + F.scaled_dot_product_attention(q, k, v).squeeze(1)
        return x + self.down(F.softmax(x, -1) + torch.softmax(x, -1) + x.softmax(-1))


class Model(nn.Module):
    """Has blocks without norm modules, so that functional norms are intercepted too."""

    def __init__(self) -> None:
        super().__init__()
        self.act: Any = None
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("name", FUNCTIONS)
def test_model_that_holds_a_replaced_function_can_be_saved(name: str) -> None:
    before = FUNCTIONS[name]()
    model, file = Model(), io.BytesIO()
    with watch(model, every=1, rules=[]):
        during = FUNCTIONS[name]()
        model.act = during
        torch.save(model, file)
        assert pickle.loads(pickle.dumps(during)) is during
        assert during.__name__ == before.__name__
    file.seek(0)
    assert torch.load(file, weights_only=False).act is before


@pytest.mark.parametrize("name", ["F.softmax", "torch.softmax", "attention"])
def test_model_that_held_a_function_before_the_watch_can_be_saved(name: str) -> None:
    model = Model()
    model.act = FUNCTIONS[name]()
    with watch(model, every=1, rules=[]):
        assert pickle.loads(pickle.dumps(model.act)) in (model.act, FUNCTIONS[name]())


def test_softmax_of_torch_nn_functional_is_still_heard() -> None:
    class Explicit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.attention, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.attention(self.norm(x))[:, None].chunk(3, -1)
            return x + self.out((F.softmax(q @ k.mT, dim=-1) @ v)[:, 0])

    model = nn.Sequential(nn.Linear(3, 8), nn.Sequential(Explicit(), Explicit()), nn.Linear(8, 1))
    with watch(model, every=1, rules=[]) as watched:
        y = model(torch.ones(4, 5, 3)).mean()
        y.backward()
        watched.step(y)
    assert watched.history.samples[0].signals["attention_entropy"][0] is not None


class Functions(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(x, x, x) + F.softmax(x, -1) + torch.softmax(x, -1) + x.softmax(-1)
        return y + F.rms_norm(x, [8]) + F.normalize(x, dim=-1) + torch.sqrt(x.abs())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("how", ["script", "trace", "export"])
def test_other_models_are_exported_as_without_a_watch(how: str) -> None:
    def export(model: nn.Module, x: Tensor) -> tuple[list[str], Tensor]:
        if how == "export":
            program = torch.export.export(model, (x,))
            return [str(node.target) for node in program.graph.nodes], program.module()(x)
        made = torch.jit.script(model) if how == "script" else torch.jit.trace(model, x)
        return [node.kind() for node in made.graph.nodes()], made(x)

    x = torch.rand(2, 4, 8)
    expected = export(Functions(), x)
    with watch(Model(), every=1, rules=[]):
        found = export(Functions(), x)
    assert found[0] == expected[0]
    assert torch.equal(found[1], expected[1])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_watched_model_is_traced_as_without_a_watch() -> None:
    model, x = Model(), torch.rand(2, 4, 8)
    expected = str(torch.jit.trace(model, x).inlined_graph)
    with watch(model, every=1, rules=[]):
        found = str(torch.jit.trace(model, x).inlined_graph)
    assert found.count("aten::") == expected.count("aten::")
