"""residual-missing and norm-missing: blocks without their input, or without one of their norms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.histories import Signals, facts, first, give_samples, last, layers, numbers_in
from helpers.tiny_runs import TinyBlock, TinyGPT, named, of_rule, train_tiny, transformers_model
from torch import Tensor, nn

from omninorm.monitor import History, NormFacts
from omninorm.monitor.rules.norm_missing import NormMissing
from omninorm.monitor.rules.residual_missing import ResidualMissing

pytestmark = pytest.mark.usefixtures("words")
COUNT = 6


# residual-missing on histories ----------------------------------------------------------------------------------------


def turned(angle: float, others: float = 0.15, at: int = 2, size: float = 1.0, change: float = 1.4) -> Signals:
    """Signals of 6 blocks, of which one turns the stream and returns `size` times its RMS."""
    rms = [size if place >= at else 1.0 for place in range(COUNT)]
    return {
        "angle": layers(others, angle, at, COUNT), "stream_rms": rms, "branch_ratio": layers(0.5, change, at, COUNT),
    }  # fmt: skip


def judge(signals: Signals) -> list[tuple[str, str | None]]:
    return last(ResidualMissing(), [signals] * 5, History(facts=facts(COUNT)))


@pytest.mark.parametrize("angle", [0.36, 0.5, 0.64])
def test_block_orthogonal_to_its_input_is_reported(angle: float) -> None:
    assert judge(turned(angle)) == [("warn", "blocks.2")]


@pytest.mark.parametrize(("angle", "others"), [(0.34, 0.15), (0.66, 0.15), (0.5, 0.26), (0.4, 0.21)])
def test_small_angles_and_turning_siblings_are_silent(angle: float, others: float) -> None:
    assert judge(turned(angle, others)) == []


@pytest.mark.parametrize("at", [0, COUNT - 1])
def test_first_and_last_block_are_not_judged(at: int) -> None:
    assert judge(turned(0.5, at=at)) == []


def test_large_branch_keeps_its_input_and_is_silent() -> None:
    """The output is 30 times the input and almost orthogonal, but contains it: 30² = 1 + 29.98²."""
    assert judge(turned(0.49, size=30.0, change=(30.0**2 - 1.0) ** 0.5)) == []
    assert judge(turned(0.49, size=30.0, change=(30.0**2 + 1.0) ** 0.5)) == [("warn", "blocks.2")]


def test_three_samples_over_twenty_steps() -> None:
    reports = give_samples(ResidualMissing(), [turned(0.5)] * 5, History(facts=facts(COUNT)))
    assert first(reports) == 3
    assert numbers_in(reports[-1][0].evidence) == [90, 27]


@pytest.mark.parametrize(
    ("angles", "size", "expected"),
    [
        ([0.5, 0.5, 0.15], 1.0, ["blocks.1"]), ([0.15, 0.5, 0.15], 4.9, ["blocks.1"]), ([0.5, 0.5, 0.15], 5.1, []),
        ([0.15, 0.5, 0.26], 1.0, []), ([0.15, 0.15, 0.5], 1.0, []), ([0.5, 0.15, 0.15], 1.0, []),
    ],
)  # fmt: skip
def test_the_second_of_three_blocks_is_compared_with_the_last(
    angles: list[float], size: float, expected: list[str]
) -> None:
    """The output is `size` times the input and orthogonal to it: |y − x|² = 1 + size²."""
    change = [(1.0 + size**2) ** 0.5] * 3
    signals: Signals = {"angle": angles, "stream_rms": [1.0, size, size], "branch_ratio": change}
    reports = give_samples(ResidualMissing(), [signals] * 5, History(facts=facts(3)))
    assert [alarm.layer for alarm in reports[-1]] == expected


@pytest.mark.parametrize(
    ("changes", "no_residual", "angle", "alarms"),
    [
        ({}, True, 0.5, 1), ({}, False, 0.5, 0), ({}, True, 0.2, 0),
        ({"attentions": (None,) * COUNT}, True, 0.5, 0), ({"attentions": ()}, True, 0.5, 0),
    ],
)  # fmt: skip
def test_whole_stack_needs_the_graph_the_angles_and_attention(
    changes: dict[str, Any], no_residual: bool, angle: float, alarms: int
) -> None:
    history = History(facts=facts(COUNT, **changes), no_residual=no_residual)
    reports = give_samples(ResidualMissing(), [{"angle": [angle] * COUNT}], history)
    assert len(reports[0]) == alarms


def test_block_without_its_input_in_the_graph_is_reported_at_the_first_sample() -> None:
    history = History(facts=facts(COUNT), without_input=(0, 5))
    reports = give_samples(ResidualMissing(), [{"angle": [0.5] * COUNT}], history)
    assert [alarm.layer for alarm in reports[0]] == ["blocks.0", "blocks.5"]


# norm-missing on histories --------------------------------------------------------------------------------------------


def norms(counts: list[int], inside: str = "norm") -> tuple[NormFacts, ...]:
    return tuple(
        NormFacts(f"blocks.{block}.{inside}{at}", "LayerNorm", 1e-6, block)
        for block, count in enumerate(counts)
        for at in range(count)
    )


def judge_norms(
    counts: list[int], alike: tuple[int, ...] = (), inside: str = "norm", **changes: Any
) -> list[tuple[str, str | None]]:
    blocks = len(counts)
    known = facts(blocks, norms=norms(counts, inside), alike=alike or (0,) * blocks, **changes)
    signals = {"stream_rms": [1.0] * blocks, "norm_rms": [1.0] * sum(counts)}
    return last(NormMissing(), [signals], History(facts=known))


@pytest.mark.parametrize("fewer", [0, 1])
def test_one_block_with_fewer_norms_is_reported_at_once(fewer: int) -> None:
    assert judge_norms([2, 2, fewer, 2]) == [("warn", "blocks.2")]
    assert judge_norms([2] * 8 + [fewer] * 2 + [2]) == [("warn", "blocks.8"), ("warn", "blocks.9")]


@pytest.mark.parametrize(
    "counts",
    [
        [2] * 6,
        [1, 2, 2, 2, 2],
        [2, 2, 2, 2, 1],
        [2, 1, 2],
        [0, 2, 2],
        [2, 0, 0],
        [2, 0],
        [2, 1, 2, 1, 2],
        [1, 1, 2, 1, 1],
        [0] * 5,
    ],
)
def test_equal_counts_ends_small_stacks_and_patterns_are_silent(counts: list[int]) -> None:
    assert judge_norms(counts) == []


def test_block_without_any_norm_is_reported_between_two_others() -> None:
    assert judge_norms([2, 0, 2]) == [("warn", "blocks.1")]
    assert judge_norms([2, 0, 2], alike=(0, 0, 1)) == []


def test_blocks_are_compared_within_their_kind_and_chain() -> None:
    assert judge_norms([2, 2, 1, 2, 2, 2], alike=(0, 0, 1, 0, 0, 0)) == []
    assert judge_norms([2, 2, 2, 1, 2, 2, 2, 2], chains=((0, 1, 2, 3), (4, 5, 6, 7))) == []
    assert judge_norms([2, 2, 1, 2, 3, 3, 3, 3], chains=((0, 1, 2, 3), (4, 5, 6, 7))) == [("warn", "blocks.2")]


def test_norms_of_queries_and_keys_do_not_count() -> None:
    assert judge_norms([2, 2, 0, 2, 2], inside="attention.norm") == []


def test_norm_that_does_not_run_counts_as_missing_from_the_third_sample() -> None:
    known = facts(5, norms=norms([2] * 5), alike=(0,) * 5)
    signals: Signals = {"stream_rms": [1.0] * 5, "norm_rms": [*[1.0] * 5, None, *[1.0] * 4]}
    reports = give_samples(NormMissing(), [signals] * 3, History(facts=known))
    assert first(reports) == 2
    assert numbers_in(reports[2][0].evidence) == [1, 4, 2]


def test_skipped_blocks_are_not_compared() -> None:
    known = facts(5, norms=norms([2] * 5), alike=(0,) * 5)
    signals: Signals = {"stream_rms": [1.0, 1.0, None, 1.0, 1.0], "norm_rms": [*[1.0] * 4, None, None, *[1.0] * 4]}
    assert last(NormMissing(), [signals] * 4, History(facts=known)) == []


# Real runs ------------------------------------------------------------------------------------------------------------


class Bare(TinyBlock):
    """A block that returns its branch without its input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) - x


class Chained(TinyBlock):
    """A block of two sublayers, neither of which adds its input."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.attn["qkv"](self.ln_1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(y[0], y[1], y[2], is_causal=True)
        branch: Tensor = self.mlp(self.ln_2(self.attn["proj"](y.transpose(1, 2).flatten(2))))
        return branch


class Pair(Chained):
    """A block that returns its branch and the stream, to which other code adds it."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x


def model_of(kind: type[TinyBlock], blocks: int = 6, at: int | None = None) -> TinyGPT:
    torch.manual_seed(0)
    model = TinyGPT(blocks=blocks)
    for index in range(blocks):
        if at in (None, index):
            torch.manual_seed(index)
            block = kind(64)
            block.load_state_dict(model.h[index].state_dict())
            model.h[index] = block
    return model


@pytest.mark.parametrize("kind", [Bare, Chained])
@pytest.mark.parametrize("at", [0, 3, 5])
@pytest.mark.parametrize("every", [5, 50])
def test_block_without_residual_is_named_at_the_first_step(kind: type[TinyBlock], at: int, every: int) -> None:
    watched, _ = train_tiny(model_of(kind, at=at), steps=2, every=every)
    assert named(watched.alarms) == [("warn", "residual-missing", f"h.{at}")]
    assert watched.alarms[0].step == 1


@pytest.mark.parametrize("lr", [1e-4, 2e-3])
def test_block_without_residual_is_named_without_a_graph(lr: float) -> None:
    """A factor of 1 that depends on the input hides the sum."""
    model = model_of(Chained, at=3)
    block, forward = model.h[3], model.h[3].forward
    block.forward = lambda x: forward(x) * (x - x + 1.0)
    watched, _ = train_tiny(model, lr=lr, steps=30)
    found = of_rule(watched, "residual-missing")
    assert named(found) == [("warn", "residual-missing", "h.3")]
    assert found[0].step == 25


@pytest.mark.parametrize("kind", [Bare, Chained])
def test_stack_without_residuals_is_reported_once(kind: type[TinyBlock]) -> None:
    watched, _ = train_tiny(model_of(kind), steps=15)
    assert [(alarm.step, alarm.layer) for alarm in of_rule(watched, "residual-missing")] == [(1, None)]


def test_residual_between_blocks_is_recognized() -> None:
    """The caller adds the residual: the graph of one block does not show it."""

    class Outside(TinyGPT):
        def forward(self, tokens: Tensor) -> Tensor:
            x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
            for block in self.h:
                y = block(x)
                x = y[0] + y[1] if isinstance(y, tuple) else x + y
            logits: Tensor = self.head(self.ln_f(x))
            return logits

    for kind in (Chained, Pair):
        torch.manual_seed(0)
        model = Outside(blocks=5)
        model.h = nn.ModuleList(kind(64) for _ in range(5))
        watched, _ = train_tiny(model, steps=25)
        assert of_rule(watched, "residual-missing") == []


def test_large_branches_are_not_missing_residuals() -> None:
    torch.manual_seed(0)
    model = TinyGPT(blocks=6)
    with torch.no_grad():
        for name in ("attn.proj", "mlp.2"):
            model.h[3].get_submodule(name).weight.mul_(30.0)
    watched, _ = train_tiny(model, lr=1e-4, steps=30)
    assert of_rule(watched, "residual-missing") == []


@pytest.mark.parametrize("lost", [("ln_1",), ("ln_2",), ("ln_1", "ln_2")])
def test_block_without_norms_is_named(lost: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    model = TinyGPT(blocks=5)
    for name in lost:
        setattr(model.h[2], name, nn.Identity())
    watched, _ = train_tiny(model, steps=15)
    assert [(alarm.step, alarm.layer) for alarm in of_rule(watched, "norm-missing")] == [(1, "h.2")]


def test_first_block_may_lack_a_norm() -> None:
    torch.manual_seed(0)
    model = TinyGPT(blocks=5)
    model.h[0].ln_1 = nn.Identity()
    watched, _ = train_tiny(model, steps=15)
    assert of_rule(watched, "norm-missing") == []


@pytest.mark.parametrize("kind", ["tiny", "Llama", "Olmo2", "Qwen3Next"])
@pytest.mark.parametrize("lr", [1e-4, 5e-3])
def test_healthy_models_are_silent(kind: str, lr: float) -> None:
    if kind != "tiny":
        pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = TinyGPT(blocks=6) if kind == "tiny" else transformers_model(kind, blocks=6)
    watched, _ = train_tiny(model, lr=lr, steps=30)
    rules = ("residual-missing", "norm-missing", "double-softmax")
    assert [alarm for rule in rules for alarm in of_rule(watched, rule)] == []
