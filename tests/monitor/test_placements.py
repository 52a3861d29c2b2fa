"""Placements measured from data flow: where norms are, relative to the additions to the stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.watched_models import WIDTH, Attention, FeedForward, adamw, train_watched
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from omninorm.monitor import Facts, History, watch
from omninorm.monitor.rules.depth import has_no_norm
from omninorm.monitor.rules.no_norm import NoNorm


class Flow(nn.Module):
    """A block whose forward is somebody's formula of x, attention a, feed-forward f and four norms."""

    def __init__(self, formula: Callable[..., Tensor], norm: Callable[[], nn.Module] | None) -> None:
        super().__init__()
        self.a, self.f, self.formula = Attention(), FeedForward(), formula
        self.norms = nn.ModuleList() if norm is None else nn.ModuleList(norm() for _ in range(4))
        self.gain = nn.Parameter(torch.full((WIDTH,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.formula(self, x, self.a, self.f, *self.norms)


class Model(nn.Module):
    def __init__(self, formula: Callable[..., Tensor], norm: Callable[[], nn.Module] | None = None) -> None:
        super().__init__()
        self.embedding = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Flow(formula, norm) for _ in range(3))
        self.around: Callable[[nn.Module, Tensor], Tensor] = lambda block, x: block(x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        for block in self.blocks:
            x = self.around(block, x)
        return x


def pre(b: Flow, x: Tensor, a: Any, f: Any, n1: Any, n2: Any, *_: Any) -> Tensor:
    x = x + a(n1(x))
    return x + f(n2(x))


def post(b: Flow, x: Tensor, a: Any, f: Any, n1: Any, n2: Any, *_: Any) -> Tensor:
    x = n1(x + a(x))
    return n2(f(x) + x)


def sandwich(b: Flow, x: Tensor, a: Any, f: Any, n1: Any, n2: Any, n3: Any, n4: Any) -> Tensor:
    x = x + n2(a(n1(x)))
    return x + n4(f(n3(x)))


def reordered(b: Flow, x: Tensor, a: Any, f: Any, n1: Any, n2: Any, *_: Any) -> Tensor:
    x = x + n1(a(x))
    return x + n2(f(x))


def both(b: Flow, x: Tensor, a: Any, f: Any, n1: Any, n2: Any, n3: Any, n4: Any) -> Tensor:
    x = n2(x + a(n1(x)))
    return n4(x + f(n3(x)))


def parallel(b: Flow, x: Tensor, a: Any, f: Any, n1: Any, *_: Any) -> Tensor:
    y = n1(x)
    return x + a(y) + f(y)


def parallel_two_norms(b: Flow, x: Tensor, a: Any, f: Any, n1: Any, n2: Any, *_: Any) -> Tensor:
    return f(n1(x)) + a(n2(x)) + x


def on_the_stream(b: Flow, x: Tensor, a: Any, f: Any, n1: Any, n2: Any, *_: Any) -> Tensor:
    x = n1(x + a(x))
    return x + f(x)


def inside(b: Flow, x: Tensor, a: Any, f: Any, n1: Any, *_: Any) -> Tensor:
    return x + f(n1(a(x)))


def streams(b: Flow, x: Tensor, a: Any, f: Any, n1: Any, *_: Any) -> Tensor:
    y = n1(x)
    return x * y.sigmoid() + a(y)


def scaled(b: Flow, x: Tensor, a: Any, f: Any, n1: Any, n2: Any, n3: Any, n4: Any) -> Tensor:
    """A sandwich with layer scale, a scaled stream, dropout, another dtype and shape in between."""
    x = 0.9 * x + F.dropout(n2(a(n1(x))), 0.1) * b.gain
    x = x.flatten(0, 1).unflatten(0, x.shape[:2])
    return (x.double() + n4(f(n3(x))).double() / 2).to(x.dtype)


FLOWS: dict[str, tuple[Callable[..., Tensor], str | None]] = {
    "pre": (pre, "pre"),
    "post": (post, "post"),
    "sandwich": (sandwich, "sandwich"),
    "reordered": (reordered, "reordered"),
    "both": (both, "both"),
    "parallel": (parallel, "pre"),
    "parallel, two norms": (parallel_two_norms, "pre"),
    "on the stream": (on_the_stream, None),
    "inside": (inside, None),
    "streams": (streams, None),
    "scaled": (scaled, "sandwich"),
}


class Written(nn.Module):
    """RMSNorm in Python, without a module of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


def train_one(model: nn.Module) -> History:
    torch.manual_seed(0)
    x = torch.randn(2, 5, WIDTH)
    return train_watched(model, adamw(model), 1, lambda m, s: m(x).square().mean()).history


@pytest.mark.parametrize("norm", [lambda: nn.LayerNorm(WIDTH), Written])
@pytest.mark.parametrize("name", FLOWS)
def test_placement_follows_the_data(name: str, norm: Callable[[], nn.Module]) -> None:
    formula, placement = FLOWS[name]
    history = train_one(Model(formula, norm))
    assert history.placement == placement
    assert bool(history.placement_reason) == (placement is None)


@pytest.mark.parametrize("name", ["on the stream", "inside", "streams"])
def test_reason_names_what_is_in_the_way(name: str) -> None:
    words = {"on the stream": "on the stream itself", "inside": "neither read the stream", "streams": "several streams"}
    assert words[name] in train_one(Model(FLOWS[name][0], Written)).placement_reason


@pytest.mark.parametrize("name", ["pre", "post", "sandwich", "reordered", "both"])
@pytest.mark.parametrize("kind", ["frozen", "checkpoint", "reentrant checkpoint"])
def test_placement_is_measured_without_a_graph(name: str, kind: str) -> None:
    formula, placement = FLOWS[name]
    model = Model(formula, Written)
    if kind == "frozen":
        model.requires_grad_(False)
        model.blocks[-1].a.out.weight.requires_grad_(True)
    else:
        model.around = lambda block, x: checkpoint(block, x, use_reentrant=kind.startswith("reentrant"))
    assert train_one(model).placement == placement


def test_blocks_that_differ_are_counted() -> None:
    model = Model(pre, Written)
    for block, formula in zip(model.blocks, (pre, post, sandwich), strict=True):
        block.formula = formula
    history = train_one(model)
    assert history.placement is None
    assert history.placement_reason == "the blocks differ: 1 × pre, 1 × post, 1 × sandwich"


# Functional norms -----------------------------------------------------------------------------------------------------


def functional(norm: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def formula(b: Flow, x: Tensor, a: Any, f: Any) -> Tensor:
        x = x + a(norm(x))
        return x + f(norm(x))

    return formula


FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], str | None]] = {
    "F.rms_norm": (lambda x: F.rms_norm(x, (WIDTH,)), "pre"),
    "F.layer_norm": (lambda x: F.layer_norm(x, (WIDTH,)), "pre"),
    "torch.rms_norm": (lambda x: torch.rms_norm(x, (WIDTH,)), "pre"),
    "F.normalize": (lambda x: F.normalize(x, dim=-1) * WIDTH**0.5, "pre"),
    "rsqrt": (lambda x: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6), None),
    "x.rsqrt": (lambda x: x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt(), None),
    "sqrt": (lambda x: x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt(), None),
    "norm": (lambda x: x / x.norm(dim=-1, keepdim=True), None),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functional_norms_are_seen(name: str) -> None:
    norm, placement = FUNCTIONS[name]
    history = train_one(Model(functional(norm)))
    assert history.placement == placement
    assert not has_no_norm(history)
    if placement is None:
        assert "their own code" in history.placement_reason


def test_model_without_norms_is_still_recognized() -> None:
    history = train_one(Model(functional(lambda x: x * 2.0)))
    assert history.placement == "none"
    assert has_no_norm(history)


def test_norm_of_queries_alone_is_no_norm_of_the_stream() -> None:
    def formula(b: Flow, x: Tensor, a: Any, f: Any) -> Tensor:
        heads = x.unflatten(-1, (4, -1))
        return x + a(x) + f(F.rms_norm(heads, (heads.shape[-1],)).flatten(-2))

    assert train_one(Model(formula)).placement == "none"


def test_functions_are_restored() -> None:
    before = [F.rms_norm, F.layer_norm, F.normalize, torch.rms_norm, torch.rsqrt, torch.sqrt]
    own = [name in vars(Tensor) for name in ("rsqrt", "sqrt", "norm")]
    with watch(Model(functional(FUNCTIONS["F.rms_norm"][0])), rules=[]):
        assert F.rms_norm is not before[0]
        with watch(Model(pre, Written), rules=[]):
            pass
        assert F.rms_norm is not before[0]
    assert before == [F.rms_norm, F.layer_norm, F.normalize, torch.rms_norm, torch.rsqrt, torch.sqrt]
    assert own == [name in vars(Tensor) for name in ("rsqrt", "sqrt", "norm")]
    with watch(Model(pre, Written), rules=[]):
        assert F.rms_norm is before[0]  # every block has norm modules, so nothing is intercepted


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", ["pre", "sandwich", "reordered", "F.rms_norm"])
def test_compiled_model_has_the_same_placement(name: str) -> None:
    torch.compiler.reset()
    model = Model(FLOWS[name][0], Written) if name in FLOWS else Model(functional(FUNCTIONS[name][0]))
    compiled = torch.compile(model, backend="aot_eager")
    assert train_one(compiled).placement == {"F.rms_norm": "pre"}.get(name, name)


def test_unlocated_norm_suppresses_no_norm() -> None:
    """An explosion in a model with norms in its own code has another cause than missing norms."""
    facts = Facts(blocks=tuple(f"b.{at}" for at in range(4)), chains=((0, 1, 2, 3),))
    from omninorm.monitor import Sample

    sample = Sample(1, {"stream_rms": [1.0, 10.0, 100.0, 1000.0]})
    for reason, alarms in (("", 1), ("the blocks normalize in their own code", 0)):
        history = History(facts=facts, placement_reason=reason)
        assert len(list(NoNorm().on_sample(history, sample))) == alarms


# Blocks that drop their input --------------------------------------------------------------------------------------------


def branches(b: Flow, x: Tensor, a: Any, f: Any, n1: Any, n2: Any, *_: Any) -> Tensor:
    y = a(n1(x))
    return y + f(n2(y))


def dropped_first(b: Flow, x: Tensor, a: Any, f: Any, n1: Any, n2: Any, *_: Any) -> Tensor:
    y = a(n1(x))
    return f(n2(y))


def dropped_last(b: Flow, x: Tensor, a: Any, f: Any, n1: Any, n2: Any, *_: Any) -> Tensor:
    return f(n2(x + a(n1(x))))


def subtracted(b: Flow, x: Tensor, a: Any, f: Any, n1: Any, n2: Any, *_: Any) -> Tensor:
    return pre(b, x, a, f, n1, n2) - x


def normed(b: Flow, x: Tensor, a: Any, f: Any, n1: Any, n2: Any, *_: Any) -> Tensor:
    return F.dropout(0.5 * n1(a(x)), 0.1) + n2(f(x)) * b.gain


def routed(b: Flow, x: Tensor, a: Any, f: Any, n1: Any, n2: Any, *_: Any) -> Tensor:
    """A mixture of experts: rows of one are added to rows of zeros, weighted by a gate."""
    y = f(n2(a(n1(x)))).flatten(0, 1)
    rows = torch.arange(0, len(y), 2)
    chosen = y[rows].clamp(-9, 9) * y[rows].softmax(-1).amax(-1, keepdim=True)
    return torch.zeros_like(y).index_add(0, rows, chosen).unflatten(0, x.shape[:2])


def gated(b: Flow, x: Tensor, a: Any, f: Any, n1: Any, n2: Any, *_: Any) -> Tensor:
    return a(n1(x)) * x.sigmoid()


def halved(b: Flow, x: Tensor, a: Any, f: Any, n1: Any, n2: Any, *_: Any) -> Tensor:
    return torch.sub(pre(b, x, a, f, n1, n2), x, alpha=0.5)


def added_twice(b: Flow, x: Tensor, a: Any, f: Any, n1: Any, n2: Any, *_: Any) -> Tensor:
    return x + pre(b, x, a, f, n1, n2) - x


def scaled_back(b: Flow, x: Tensor, a: Any, f: Any, n1: Any, n2: Any, *_: Any) -> Tensor:
    return pre(b, x, a, f, n1, n2) - 0.5 * x


def negated(b: Flow, x: Tensor, a: Any, f: Any, n1: Any, n2: Any, *_: Any) -> Tensor:
    return a(n1(x)) - x


def activated(b: Flow, x: Tensor, a: Any, f: Any, n1: Any, n2: Any, *_: Any) -> Tensor:
    return F.gelu(pre(b, x, a, f, n1, n2))


def mixed(at: int, formula: Callable[..., Tensor], others: Callable[..., Tensor] = pre, count: int = 4) -> Model:
    """A model of which one block has another formula."""
    model = Model(others, lambda: nn.LayerNorm(WIDTH))
    model.blocks = nn.ModuleList(
        Flow(formula if place == at else others, lambda: nn.LayerNorm(WIDTH)) for place in range(count)
    )
    return model


@pytest.mark.parametrize("at", [0, 2, 3])
@pytest.mark.parametrize("formula", [branches, dropped_first, dropped_last, subtracted, normed, routed])
def test_block_that_drops_its_input_is_found_in_the_graph(formula: Callable[..., Tensor], at: int) -> None:
    assert train_one(mixed(at, formula)).without_input == (at,)


@pytest.mark.parametrize("others", [post, sandwich, scaled])
def test_block_that_drops_its_input_is_found_among_other_placements(others: Callable[..., Tensor]) -> None:
    assert train_one(mixed(1, branches, others)).without_input == (1,)


@pytest.mark.parametrize(
    "formula",
    [
        pre,
        post,
        both,
        on_the_stream,
        inside,
        streams,
        scaled,
        halved,
        added_twice,
        scaled_back,
        negated,
        activated,
        gated,
    ],
)
def test_block_that_may_add_its_input_is_not_found(formula: Callable[..., Tensor]) -> None:
    assert train_one(mixed(1, formula)).without_input == ()


@pytest.mark.parametrize("count", [2, 3])
def test_most_of_the_other_blocks_must_add_their_input(count: int) -> None:
    assert train_one(mixed(1, branches, count=count)).without_input == (1,)
    assert train_one(mixed(1, pre, branches, 3)).without_input == ()
    assert train_one(mixed(0, branches, count=1)).without_input == ()


class Layers(nn.Module):
    """Two layers with or without their input, and without attention."""

    def __init__(self, residual: bool, third: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.residual = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(3 * WIDTH, WIDTH), residual
        self.norm, self.third = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH) if third else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.third(self.second(F.gelu(self.first(self.norm(x)))))
        return x + y if self.residual else y


class OtherLayers(Layers):
    """The same layers in another class."""


@pytest.mark.parametrize(("odd", "found"), [(OtherLayers(False), (2,)), (Layers(False, third=True), ())])
def test_layers_without_their_input_are_legitimate_if_they_are_of_another_kind(
    odd: nn.Module, found: tuple[int, ...]
) -> None:
    model = mixed(1, pre)
    model.blocks = nn.ModuleList([Layers(True), Layers(True), odd, Layers(True)])
    assert train_one(model).without_input == found


def test_input_that_is_added_after_the_block_is_not_missing() -> None:
    model = mixed(1, branches)
    model.around = lambda block, x: x + block(x) if block is model.blocks[1] else block(x)
    assert train_one(model).without_input == ()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_block_that_adds_its_input_is_not_found(reentrant: bool) -> None:
    model = mixed(1, pre)
    model.around = lambda block, x: (
        checkpoint(block, x, use_reentrant=reentrant) if block is model.blocks[1] else block(x)
    )
    assert train_one(model).without_input == ()
