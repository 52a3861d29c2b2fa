"""eps-share: norms on the residual stream and norms with an unusual ε are reported, small branch outputs are not."""

from __future__ import annotations

import pytest
import torch
from helpers.histories import BLOCKS, Signals, facts, first, give_samples, layers, numbers_in
from helpers.tiny_runs import TinyGPT, named, of_rule, train_tiny, transformers_model
from torch import nn

from omninorm.monitor import Facts, History, NormFacts
from omninorm.monitor.rules.eps_share import EpsShare

pytestmark = pytest.mark.usefixtures("words")


def signals(share: float | None, size: float = 1.0, at: int = 2) -> Signals:
    """Return a share at one norm whose input is `size` times the stream's."""
    shares: list[float | None] = [share if index == at else 1e-4 for index in range(BLOCKS)]
    return {"eps_share": shares, "norm_rms": layers(1.0, size, at), "stream_rms": layers(1.0)}


def with_eps(*values: float | None) -> History:
    norms = tuple(NormFacts(f"blocks.{index}.norm", "RMSNorm", eps, index) for index, eps in enumerate(values))
    return History(facts=facts(norms=norms))


def severities(samples: list[Signals], history: History | None = None) -> list[list[str]]:
    return [[alarm.severity for alarm in alarms] for alarms in give_samples(EpsShare(), samples, history)]


def test_severe_share_on_the_stream_fails_after_three_samples_over_20_steps() -> None:
    assert severities([signals(0.91)] * 5) == [[], [], [], ["fail"], ["fail"]]
    assert severities([signals(0.89)] * 5) == [[]] * 5


def test_half_a_share_on_the_stream_warns_after_50_steps_unless_it_is_falling() -> None:
    assert severities([signals(0.51)] * 8) == [*[[]] * 6, ["warn"], ["warn"]]
    assert severities([signals(0.49)] * 8) == [[]] * 8
    # mean(x²)/ε doubles when the share falls from 0.8 to 2/3.
    assert severities([*[signals(0.8)] * 5, *[signals(0.66)] * 4])[-1] == []
    assert severities([*[signals(0.8)] * 5, *[signals(0.67)] * 4])[-1] == ["warn"]


@pytest.mark.parametrize(("size", "fails"), [(0.51, True), (0.49, False), (0.01, False)])
def test_input_that_is_small_compared_with_the_stream_is_a_branch(size: float, fails: bool) -> None:
    assert severities([signals(0.99, size)] * 9)[-1] == (["fail"] if fails else [])


def test_input_of_the_first_block_follows_from_its_output() -> None:
    for ratio, fails in ((1.1, True), (0.9, False)):  # the block's input is 1/(1 + ratio), the norm's is 0.25
        samples = [{**signals(0.99, 0.25, at=0), "branch_ratio": layers(ratio)}] * 5
        assert bool(severities(samples)[-1]) is fails


def test_norm_outside_the_blocks_is_on_the_stream() -> None:
    history = History(facts=facts(norms=(NormFacts("final", "RMSNorm", 1e-6, None),)))
    assert severities([{"eps_share": [0.95]}] * 5, history)[-1] == ["fail"]
    history = History(facts=Facts(norms=(NormFacts("norm", "RMSNorm", 1e-6, None),)))
    assert severities([{"eps_share": [0.95]}] * 9, history)[-1] == [], "without blocks its place is unknown"


@pytest.mark.parametrize(
    ("eps", "unusual"),
    [((1e-6, 1e-6, 1.0, 1e-6), True), ((1e-6, 1e-6, 1e-4, 1e-6), True), ((1e-6, 1e-6, 9e-5, 1e-6), False),
     ((0.1,) * 4, True), ((1e-3,) * 4, False), ((1e-6, None, None, 1e-6), False)],
)  # fmt: skip
def test_unusual_eps_in_a_branch_fails_at_its_second_severe_sample(eps: tuple[float, ...], unusual: bool) -> None:
    reports = severities([signals(0.99, 0.01)] * 9, with_eps(*eps))
    assert first(reports) == (1 if unusual else None)  # type: ignore[arg-type]


def test_streak_ends_with_a_healthy_sample() -> None:
    assert severities([signals(0.95), signals(0.95), signals(0.1)] * 3) == [[]] * 9


def test_evidence_has_the_eps_and_the_size_of_the_output() -> None:
    norms = (NormFacts("first", "RMSNorm", 0.1, 0), NormFacts("second", "LayerNorm", 0.1, 1))
    history = History(facts=facts(norms=norms))
    alarm, *rest = give_samples(EpsShare(), [{"eps_share": [0.96, 0.05]}] * 4, history)[-1]
    assert (alarm.severity, alarm.layer, rest) == ("fail", "first", [])
    assert alarm.evidence.startswith("Norm's ε too large: in first")
    assert numbers_in(alarm.evidence) == [0.1, 96, 0.2], "√(1 − 0.96)"
    # mean(x²) = 0.1 · (1/0.96 − 1)
    assert numbers_in(alarm.remedy) == pytest.approx([1e-6, 0.0042], rel=0.01)


def test_small_input_with_an_ordinary_eps_asks_for_the_reason() -> None:
    (alarm,) = give_samples(EpsShare(), [signals(0.95)] * 4)[-1]
    assert alarm.remedy.startswith("Find out why the norm's input is so small")
    # 1e-6 · (1/0.95 − 1), and a thousandth of it
    assert numbers_in(alarm.remedy) == pytest.approx([5.3e-8, 5e-11], rel=0.01)


# Real runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "width"), [("Olmo2", 64), ("Olmo2", 256), ("Qwen3Next", 64)])
def test_norms_of_small_branches_raise_no_alarm(kind: str, width: int) -> None:
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    watched, losses = train_tiny(transformers_model(kind, width), lr=1e-3, steps=25)
    largest = max(value for value in watched.history.samples[0].signals["eps_share"] if value is not None)
    assert largest > 0.9, "the inputs are small against ε at first"
    assert losses[-1] < 0.7 * losses[0]
    assert named(of_rule(watched, "eps-share")) == []


def set_eps(model: nn.Module, eps: float, only: str = "") -> nn.Module:
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm) and only in name:
            module.eps = eps
    return model


@pytest.mark.parametrize(
    ("eps", "only", "layer"), [(0.1, "", "h.0.ln_1"), (10.0, "", "h.0.ln_1"), (1.0, "h.2.ln_2", "h.2.ln_2")]
)
def test_wrong_eps_is_reported_with_its_norm(eps: float, only: str, layer: str) -> None:
    torch.manual_seed(0)
    watched, _ = train_tiny(set_eps(TinyGPT(), eps, only), steps=10)
    assert named(watched.alarms)[0] == ("fail", "eps-share", layer)


def test_embeddings_that_are_too_small_are_reported_at_the_first_norm() -> None:
    torch.manual_seed(0)
    model = TinyGPT()
    for table in (model.wte, model.wpe):
        nn.init.normal_(table.weight, std=1e-4)
    watched, _ = train_tiny(model, lr=2e-5, steps=30)
    (alarm,) = of_rule(watched, "eps-share")
    assert (alarm.severity, alarm.layer) == ("fail", "h.0.ln_1")
    assert alarm.remedy.startswith("Find out why the norm's input is so small")
