"""Verdicts, losses, tables and the figure, from results made by hand."""

from __future__ import annotations

import json

import pytest
from helpers.bench_results import measurement, result

from omninorm.bench import cases, memory, models
from omninorm.bench.figure import draw, lines_of
from omninorm.bench.files import to_json
from omninorm.bench.process import add_event
from omninorm.bench.tables import show
from omninorm.bench.targets import FAIL, PASS, TARGETS, UNKNOWN, find_losses, judge
from omninorm.cli.console import console
from omninorm.timing import OURS


def verdict_of(name: str, told: dict) -> dict:
    (found,) = [each for each in judge(told) if each["name"] == name]
    return found


FORWARD = "RMSNorm forward / clone, fp32"


def test_nothing_measured_passes_nothing() -> None:
    verdicts = judge(result())
    assert len(verdicts) == len(TARGETS) + 2
    assert {each["verdict"] for each in verdicts} == {UNKNOWN}
    assert len({each["name"] for each in verdicts}) == len(verdicts)


def test_the_worst_size_decides_and_the_median_stands_beside_it() -> None:
    sizes = [(576, 0.9), (1024, 1.05), (4096, 1.0)]
    told = result(*(measurement(cases.RMS_FORWARD, {"clone": ratio}, width=width) for width, ratio in sizes))
    found = verdict_of(FORWARD, told)
    assert (found["verdict"], found["worst"], found["median"], found["sizes"]) == (PASS, 1.05, 1.0, 3)

    told["measurements"].append(measurement(cases.RMS_FORWARD, {"clone": 1.06}, width=2048, rows=2048, threads=2))
    found = verdict_of(FORWARD, told)
    assert (found["verdict"], found["worst"], found["at"]) == (FAIL, 1.06, "fp32 2048×2048, 2t")
    assert found["missed"] == ["fp32 2048×2048, 2t: 1.06"]


@pytest.mark.parametrize(
    "place",
    [{"rows": 511}, {"width": 575}, {"width": 4097}, {"allocator": "default"}, {"dtype": "bf16"}],
    ids=str,
)
def test_what_a_limit_does_not_hold_for_does_not_count(place) -> None:
    told = result(measurement(cases.RMS_FORWARD, {"clone": 0.5}, **place))
    assert verdict_of(FORWARD, told)["verdict"] == UNKNOWN


def test_a_missing_dtype_keeps_a_target_from_passing_but_not_from_failing() -> None:
    name = "add_rms_norm / torch.add, fp32/bf16"
    good, bad = (measurement(cases.ADD_RMS_FORWARD, {"torch.add": ratio}) for ratio in (1.2, 1.5))
    found = verdict_of(name, result(good))
    assert (found["verdict"], found["missing"], found["worst"]) == (UNKNOWN, ["bf16"], 1.2)
    assert verdict_of(name, result(bad))["verdict"] == FAIL


def test_a_speed_target_wants_the_other_to_be_slower() -> None:
    name = "Thinker speed / nn.RMSNorm, fp32"
    fast = measurement(models.THINKER_TRAINING, {"torch.nn": 1 / 1.05}, rows=2048, width=512)
    slow = measurement(models.THINKER_TRAINING, {"torch.nn": 1 / 1.02}, rows=2048, width=512, threads=2)
    assert verdict_of(name, result(fast))["verdict"] == PASS
    found = verdict_of(name, result(fast, slow))
    assert (found["verdict"], found["worst"]) == (FAIL, pytest.approx(1.02))


@pytest.mark.parametrize(("norm", "limit"), [(memory.RMS_KEPT, 4.0), (memory.LAYER_KEPT, 8.0)])
def test_bytes_kept_have_limits(norm: str, limit: float) -> None:
    name = f"{norm}: bytes per row kept beyond x"
    for value, verdict in ((limit, PASS), (limit + 1, FAIL)):
        entry = {"norm": norm, "dtype": "bf16", "rows": 512, "width": 576, "bytes": {OURS: value}}
        assert verdict_of(name, result(kept=(entry,)))["verdict"] == verdict


def test_losses_are_to_peers_and_alternatives_and_not_to_the_memory_limit() -> None:
    ratios = {"clone": 1.5, "torch.nn": 1.01, "torch.nn.LayerNorm": 1.2, "transformers Llama": 0.3}
    losses = find_losses(result(measurement(cases.RMS_FORWARD, ratios)))
    assert [(each["against"], each["ratio"]) for each in losses] == [("torch.nn", 1.01), ("torch.nn.LayerNorm", 1.2)]


def told_of_all() -> dict:
    told = result(
        measurement(cases.RMS_FORWARD, {"clone": 1.3, "torch.nn": 1.25}),
        measurement(cases.RMS_FORWARD, {"clone": 1.0, "torch.nn": 0.2}, width=4096),
        measurement(cases.RMS_FORWARD, {"clone": 1.0, "torch.nn": 0.2}, allocator="default"),
        {**measurement(models.THINKER_TRAINING, {"torch.nn": 0.9}), "norm_share": {OURS: 0.0123}},
    )
    add_event(told, {"event": "skipped", "what": "a peer", "why": "it is not there"})
    return {**told, "targets": judge(told), "losses": find_losses(told)}


def test_everything_is_shown_from_the_written_result_alone(capsys) -> None:
    told = told_of_all()
    read = json.loads(to_json(told))
    assert read == told
    show(console(), read)
    out = capsys.readouterr().out
    for line in (
        "RMSNorm forward, fp32, 1t, against torch.nn: 512×1024 (1.25)",
        "RMSNorm forward, fp32, 1t, default malloc",
        "Missed RMSNorm forward / clone, fp32 ≤ 1.05 at fp32 512×1024, 1t: 1.30",
        "Skipped a peer: it is not there",
        "Norms' share of a Thinker training step in fp32, 1 thread: omninorm 1.2%",
        "20 targets: 1 FAIL",
    ):
        assert line in out
    table = out[out.index("Targets:") :]
    assert all(each["name"] in table for each in told["targets"]), "no name is cut at 80 columns"
    assert table.count(UNKNOWN) >= 18


def test_the_figure_draws_what_was_measured_and_says_what_was_not(tmp_path) -> None:
    told = {**told_of_all(), "settings": {"threads": [1], "rows": [512]}}
    lines = lines_of(told, cases.RMS_FORWARD, "fp32", 1, 512)
    assert lines[OURS] == [(1024, 4.0), (4096, 4.0)]
    assert lines["clone"] == [(1024, pytest.approx(5.2)), (4096, 4.0)]
    assert lines_of(told, cases.RMS_FORWARD, "bf16", 1, 512) == {}
    draw(tmp_path / "bench.png", told)
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
