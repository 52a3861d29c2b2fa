"""Monitoring compiled models: the same values as in eager mode, in one graph that is compiled once."""

import copy
import io
import math
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omninorm import NormConfig, Thinker, ThinkerConfig
from omninorm.monitor import Watch, watch

pytestmark = [  # warnings from Dynamo itself
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning"),
]

BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
TOKENS = 64


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch.compiler.reset()


def thinker() -> Thinker:
    torch.manual_seed(0)
    return Thinker(ThinkerConfig(d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=TOKENS))


def known(values: Sequence[float | None]) -> list[float]:
    """Replace missing values by NaN."""
    return [math.nan if value is None else value for value in values]


def train(model: nn.Module, steps: int, every: int, evaluate: bool = False) -> Watch:
    """Train a model, compiled or not, on the same tokens at every step."""
    torch.manual_seed(1)
    tokens = torch.randint(0, 256, (3, TOKENS + 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with watch(model, optimizer, every=every, rules=[]) as watched:
        for _ in range(steps):
            loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if evaluate:
                with torch.no_grad():
                    model(torch.zeros_like(tokens[:, 1:]))
            watched.step(loss)
    return watched


@pytest.mark.slow
@pytest.mark.parametrize(
    ("placement", "backend"),
    [
        *((placement, "aot_eager") for placement in ("pre", "post", "keel", "sandwich", "reordered")),
        ("post", "inductor"),
    ],
)
def test_placement_is_measured_in_a_graph(placement: str, backend: str) -> None:
    torch.manual_seed(0)
    config = ThinkerConfig(d_model=16, n_layers=3, n_heads=2, max_seq_len=TOKENS, norm=NormConfig("rmsnorm", placement))
    model = Thinker(config)
    eager = train(copy.deepcopy(model), 1, every=1)
    compiled = train(torch.compile(model, backend=backend), 1, every=1)
    assert compiled.history.placement == eager.history.placement
    assert eager.history.placement == {"keel": "both"}.get(placement, placement)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_model_has_the_same_signals_in_one_graph(backend: str) -> None:
    eager = train(thinker(), 5, every=2)
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = train(torch.compile(thinker(), fullgraph=True, backend=backend), 5, every=2)
    assert [sample.step for sample in compiled.history.samples] == [1, 2, 4]
    for expected, found in zip(eager.history.samples, compiled.history.samples, strict=True):
        assert found.signals.keys() == expected.signals.keys()
        for name, values in expected.signals.items():
            assert known(found.signals[name]) == pytest.approx(known(values), rel=2e-3, abs=1e-6, nan_ok=True), name
    assert compiled.history.dtype == "float32"


@pytest.mark.slow
def test_evaluation_is_not_counted() -> None:
    plain = train(torch.compile(thinker(), backend="aot_eager"), 3, every=1)
    evaluated = train(torch.compile(thinker(), backend="aot_eager"), 3, every=1, evaluate=True)
    for expected, found in zip(plain.history.samples, evaluated.history.samples, strict=True):
        assert found.signals == expected.signals


@pytest.mark.slow
def test_compiled_model_works_after_its_watch() -> None:
    attention = F.scaled_dot_product_attention
    model = torch.compile(thinker(), backend="aot_eager")
    first = train(model, 2, every=1)
    assert F.scaled_dot_product_attention is attention
    events = len(first.record)
    tokens = torch.zeros(3, TOKENS, dtype=torch.int64)
    model(tokens).sum().backward()
    assert len(first.record) == events
    model.zero_grad()
    second = train(model, 2, every=1)
    fresh_one = train(copy.deepcopy(model._orig_mod), 1, every=1)
    assert second.history.samples[-1].signals.keys() == fresh_one.history.samples[-1].signals.keys()


@pytest.mark.slow
def test_copy_of_a_compiled_model_is_not_monitored() -> None:
    model = thinker()
    model.compile(backend="aot_eager")
    tokens = torch.zeros(2, TOKENS, dtype=torch.long)
    with watch(model, every=1, rules=[]) as watched:
        file = io.BytesIO()
        torch.save(model, file)
        twin = copy.deepcopy(model)
        assert not twin._forward_hooks
        model(tokens).square().mean().backward()
        model.eval()
        twin(tokens)  # with a graph, which would be taken for the model's own
        watched.step(1.0)
    assert file.tell() > 0
    assert watched.history.samples[0].signals["logz"] is not None


@pytest.mark.slow
def test_nan_inside_a_graph_is_located() -> None:
    model = thinker()
    with torch.no_grad():
        model.blocks[1].feed_forward.down.weight[0, 0] = torch.nan
    watched = train(torch.compile(model, fullgraph=True, backend="aot_eager"), 3, every=10)
    found = watched.history.nonfinite
    assert found is not None
    assert (found.step, found.phase, found.layer, found.value) == (1, "forward", "blocks.1.feed_forward", "nan")


@pytest.mark.slow
def test_other_norms_and_in_place_operations_are_measured_in_a_graph() -> None:
    """torch.nn's own layers, compiled by `Module.compile`."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
            self.embedding = nn.Embedding(256, 32)
            self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.layers(self.embedding(tokens)) @ self.embedding.weight.T

    torch.manual_seed(0)
    eager = Model()
    compiled = copy.deepcopy(eager)
    compiled.compile(backend="aot_eager")
    expected, found = train(eager, 2, every=1).history.samples[-1], train(compiled, 2, every=1).history.samples[-1]
    # Dynamo sees neither our mode nor a hook inside of nn.MultiheadAttention, and a copy of every norm's gradient was too dear.
    missing = expected.signals.keys() - found.signals.keys()
    assert missing <= {"noise_scale", "attention_logit", "attention_entropy"}
    for name, values in found.signals.items():
        assert known(values) == pytest.approx(known(expected.signals[name]), rel=2e-3, abs=1e-6, nan_ok=True), name


@pytest.mark.slow
def test_separately_compiled_blocks_share_a_graph() -> None:
    """More blocks than Dynamo would recompile for: numbers of their own in the graph would end in an error."""
    torch.manual_seed(0)
    model = Thinker(ThinkerConfig(d_model=16, n_layers=10, n_heads=2, max_seq_len=TOKENS))
    eager = train(copy.deepcopy(model), 2, every=1).history.samples[-1]
    for block in model.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        found = train(model, 2, every=1).history.samples[-1]
    assert found.signals.keys() == eager.signals.keys()
    for name, values in found.signals.items():
        assert known(values) == pytest.approx(known(eager.signals[name]), rel=2e-3, abs=1e-6, nan_ok=True), name


@pytest.mark.slow
def test_compiled_function_inside_eager_attention_is_measured() -> None:
    attend = torch.compile(
        lambda q, k: F.scaled_dot_product_attention(q, k, k).unflatten(-1, (2, -1)).flatten(-2),
        fullgraph=True,
        backend="aot_eager",
    )

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.attention = nn.RMSNorm(16), nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])

        def forward(self, x: Tensor) -> Tensor:
            q, k = (f(self.norm(x)).unflatten(-1, (4, 4)).transpose(1, 2) for f in self.attention)
            return x + attend(q, k).transpose(1, 2).flatten(2)

    model = nn.Sequential(nn.Embedding(256, 16), nn.Sequential(Block(), Block()), nn.Linear(16, 256))
    assert [sample.step for sample in train(model, 3, every=2).history.samples] == [1, 2]


def test_two_compiled_models_are_watched_at_once_and_released() -> None:
    attention, softmax = F.scaled_dot_product_attention, torch.softmax
    first, second = watch(thinker(), every=1).open(), watch(thinker(), every=1).open()
    assert F.scaled_dot_product_attention is not attention
    first.close()
    second.close()
    assert F.scaled_dot_product_attention is attention
    assert torch.softmax is softmax
    assert "softmax" not in Tensor.__dict__
