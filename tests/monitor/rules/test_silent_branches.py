"""branch-silent and gain-drift: sublayers that fall silent or stay weak, gains that are set to 0 or become small."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from helpers.histories import Signals, facts, first, give_samples, last, layers, numbers_in
from helpers.tiny_runs import TinyGPT, named, of_rule, train_tiny
from torch import Tensor, nn

from omninorm.monitor import History, Sample
from omninorm.monitor.rules.branch_silent import BranchSilent
from omninorm.monitor.rules.gain_drift import GainDrift

pytestmark = pytest.mark.usefixtures("words")


def parts(value: float, other: float | None = None) -> Signals:
    return {"feed_forward_ratio": layers(0.3, value), "attention_ratio": layers(0.3 if other is None else other)}


def test_part_that_falls_tenfold_fails_after_ten_steps() -> None:
    reports = give_samples(BranchSilent(), [*[parts(0.4)] * 4, *[parts(0.04)] * 4])
    assert first(reports) == 6
    (alarm,) = reports[6]
    assert (alarm.severity, alarm.layer) == ("fail", "blocks.2.feed_forward")
    assert numbers_in(alarm.evidence) == [0.04, 10, 0.4]
    for below in (0.041, 0.051):  # less than 10-fold; not small
        assert first(give_samples(BranchSilent(), [*[parts(0.4)] * 4, *[parts(below)] * 4])) is None
    assert first(give_samples(BranchSilent(), [*[parts(0.6)] * 4, *[parts(0.051)] * 4])) is None


def test_part_that_falls_because_the_stream_before_it_grows_is_not_to_blame() -> None:
    """The square of the stream's growth must reach the fall: then it is most of the reason."""
    for growth, explains in ((9.0, True), (3.0, False)):
        before, after = ({**parts(value), "stream_rms": layers(size)} for value, size in ((0.4, 1.0), (0.04, growth)))
        (alarm,) = give_samples(BranchSilent(), [*[before] * 4, *[after] * 3])[-1]
        assert (f"The residual stream before it has grown {growth:g}-fold" in alarm.evidence) == explains
        assert ("in the blocks before blocks.2.feed_forward" in alarm.remedy) == explains


def test_part_that_falls_with_all_others_is_not_named() -> None:
    """The stream has grown, so every branch is smaller relative to it."""
    everywhere = [{"feed_forward_ratio": [0.4] * 4}] * 4 + [{"feed_forward_ratio": [0.04] * 4}] * 4
    assert first(give_samples(BranchSilent(), everywhere)) is None


def test_part_that_recovers_is_no_longer_reported() -> None:
    reports = give_samples(BranchSilent(), [*[parts(0.4)] * 4, *[parts(0.01)] * 4, *[parts(0.3)] * 2])
    assert [bool(alarms) for alarms in reports][-4:] == [True, True, False, False]


def test_weak_part_is_a_warning_only_if_the_others_contribute_more() -> None:
    assert last(BranchSilent(), [parts(0.009)] * 8) == [("warn", "blocks.2.feed_forward")]
    assert last(BranchSilent(), [{"feed_forward_ratio": layers(0.08, 0.009)}] * 8) == [], "others at 9 times"
    assert last(BranchSilent(), [parts(0.011)] * 8) == []


def test_branches_that_begin_near_zero_and_grow_raise_no_alarm() -> None:
    growing = [parts(1e-4 * 1.3**count) for count in range(16)]
    assert first(give_samples(BranchSilent(), growing)) is None
    slow = [parts(1e-3 * 1.02**count) for count in range(16)]
    assert first(give_samples(BranchSilent(), slow)) is not None


def test_gains_that_fall_tenfold_between_samples_fail_at_once() -> None:
    for factor, expected in ((0.099, [("fail", "blocks.2.norm")]), (0.101, [])):
        assert last(BranchSilent(), [{"gain_max": layers(1.0)}] * 2 + [{"gain_max": layers(1.0, factor)}]) == expected
    zero = [{"gain_max": layers(1.0)}, *[{"gain_max": layers(1.0, 0.0)}] * 2]
    reports = give_samples(BranchSilent(), zero)
    assert [len(alarms) for alarms in reports] == [0, 1, 1]
    assert reports[1][0].evidence.startswith(
        "Gains set to 0: the largest gain of blocks.2.norm fell from 1 to 0 by step 10"
    )
    assert last(BranchSilent(), [*zero, {"gain_max": layers(1.0, 0.2)}]) == [], "they have grown again"
    assert last(BranchSilent(), [{"gain_max": [1.0] * 4}, {"gain_max": [0.01] * 4}]) == [], "all norms alike"


def gains(share: float) -> Signals:
    return {"gain_small": layers(0.0, share)}


def test_small_gains_count_only_if_they_have_become_small() -> None:
    assert last(GainDrift(), [gains(0.0), *[gains(0.6)] * 4]) == [("warn", "blocks.2.norm")]
    assert last(GainDrift(), [gains(1.0)] * 6) == [], "stored as γ − 1, or initialized to 0 on purpose"
    assert last(GainDrift(), [gains(0.4), *[gains(0.5)] * 4]) == []


@pytest.mark.parametrize(
    ("decay", "remedy"),
    [
        (1e-3, "Do not apply weight decay to gains."),
        (0.0, "Look for code that writes to these gains."),
        (None, "Look for code that writes to these gains, and do not apply weight decay to gains."),
    ],
)
def test_remedy_for_small_gains_depends_on_their_decay(decay: float | None, remedy: str) -> None:
    rule, history = GainDrift(), History(facts=facts())
    shares: Sequence[float] = (0.0, 0.6, 0.6, 0.6, 0.6)
    for count, share in enumerate(shares):
        history.samples.append(
            Sample(max(10 * count, 1), gains(share), gain_decay=() if decay is None else [decay] * 4)
        )
        found = list(rule.on_sample(history, history.samples[-1]))
    assert [alarm.remedy for alarm in found] == [remedy]


# Real runs ------------------------------------------------------------------------------------------------------------


def test_gain_that_is_set_to_zero_once_is_reported_at_the_next_sample() -> None:
    def zero(model: TinyGPT, optimizers: object, step: int) -> None:
        if step == 24:
            nn.init.zeros_(model.h[2].ln_2.weight)

    torch.manual_seed(0)
    watched, _ = train_tiny(TinyGPT(), steps=30, before=zero)
    assert named(watched.alarms)[0] == ("fail", "branch-silent", "h.2.ln_2")
    assert watched.alarms[0].step == 25


@pytest.mark.parametrize("part", ["attn.proj", "mlp"])
def test_sublayer_whose_output_fades_is_named(part: str) -> None:
    torch.manual_seed(0)
    model = TinyGPT()
    block = model.h[1]
    module = block.attn["proj"] if part == "attn.proj" else block.mlp[2]
    quiet = [1.0]
    module.register_forward_hook(lambda module, inputs, output: output * quiet[0])

    def fade(model: TinyGPT, optimizers: object, step: int) -> None:
        quiet[0] = 1.0 if step <= 20 else 0.01

    watched, _ = train_tiny(model, steps=40, before=fade)
    alarms = of_rule(watched, "branch-silent")
    assert [(alarm.severity, (alarm.layer or "").rsplit(".", 1)[0]) for alarm in alarms] in (
        [("fail", "h.1.attn")], [("fail", "h.1.mlp")], [("fail", "h.1")],
    )  # fmt: skip
    assert part.split(".")[0] in str(alarms[0].layer)


def test_branches_initialized_to_zero_raise_no_alarm() -> None:
    torch.manual_seed(0)
    model = TinyGPT()
    for block in model.h:
        for layer in (block.attn["proj"], block.mlp[2]):
            nn.init.zeros_(layer.weight)
    watched, losses = train_tiny(model, steps=60)
    assert losses[-1] < 0.6 * losses[0]
    assert named(watched.alarms) == []


class ScaleNorm(nn.Module):
    """One gain, stored as g − 1."""

    def __init__(self) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = nn.functional.normalize(x, dim=-1) * x.shape[-1] ** 0.5 * (self.g + 1)
        return y


def test_one_element_gains_with_an_offset_raise_no_alarm() -> None:
    torch.manual_seed(0)
    model = TinyGPT()
    for block in model.h:
        block.ln_1, block.ln_2 = ScaleNorm(), ScaleNorm()
    watched, _ = train_tiny(model, steps=40)
    assert of_rule(watched, "gain-drift") == []
