"""Verdicts on targets, tables and the figure, from synthetic results."""

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


def verdict_of(name: str, measured: dict) -> dict:
    (found,) = [each for each in judge(measured) if each["name"] == name]
    return found


FORWARD = "RMSNorm forward / clone, fp32"


def test_without_measurements_no_target_passes() -> None:
    verdicts = judge(result())
    assert len(verdicts) == len(TARGETS) + 2
    assert {each["verdict"] for each in verdicts} == {UNKNOWN}
    assert len({each["name"] for each in verdicts}) == len(verdicts)


def test_the_worst_size_decides_the_verdict() -> None:
    sizes = [(576, 0.9), (1024, 1.05), (4096, 1.0)]
    measured = result(*(measurement(cases.RMS_FORWARD, {"clone": ratio}, width=width) for width, ratio in sizes))
    found = verdict_of(FORWARD, measured)
    assert (found["verdict"], found["worst"], found["median"], found["sizes"]) == (PASS, 1.05, 1.0, 3)

    measured["measurements"].append(measurement(cases.RMS_FORWARD, {"clone": 1.06}, width=2048, rows=2048, threads=2))
    found = verdict_of(FORWARD, measured)
    assert (found["verdict"], found["worst"], found["at"]) == (FAIL, 1.06, "fp32 2048×2048, 2t")
    assert found["missed"] == ["fp32 2048×2048, 2t: 1.06"]


@pytest.mark.parametrize(
    "place",
    [{"rows": 511}, {"width": 575}, {"width": 4097}, {"allocator": "default"}, {"dtype": "bf16"}],
    ids=str,
)
def test_measurements_outside_a_limits_conditions_do_not_count(place) -> None:
    measured = result(measurement(cases.RMS_FORWARD, {"clone": 0.5}, **place))
    assert verdict_of(FORWARD, measured)["verdict"] == UNKNOWN


def test_a_target_with_a_missing_dtype_can_fail_but_not_pass() -> None:
    name = "add_rms_norm / torch.add, fp32/bf16"
    good, bad = (measurement(cases.ADD_RMS_FORWARD, {"torch.add": ratio}) for ratio in (1.2, 1.5))
    found = verdict_of(name, result(good))
    assert (found["verdict"], found["missing"], found["worst"]) == (UNKNOWN, ["bf16"], 1.2)
    assert verdict_of(name, result(bad))["verdict"] == FAIL


def test_a_speed_target_is_a_lower_limit() -> None:
    name = "Thinker speed / nn.RMSNorm, fp32"
    fast = measurement(models.THINKER_TRAINING, {"torch.nn": 1 / 1.05}, rows=2048, width=512)
    slow = measurement(models.THINKER_TRAINING, {"torch.nn": 1 / 1.02}, rows=2048, width=512, threads=2)
    assert verdict_of(name, result(fast))["verdict"] == PASS
    found = verdict_of(name, result(fast, slow))
    assert (found["verdict"], found["worst"]) == (FAIL, pytest.approx(1.02))


@pytest.mark.parametrize(("norm", "limit"), [(memory.RMS_KEPT, 4.0), (memory.LAYER_KEPT, 8.0)])
def test_kept_bytes_above_the_limit_fail(norm: str, limit: float) -> None:
    name = f"{norm}: bytes per row kept beyond x"
    for value, verdict in ((limit, PASS), (limit + 1, FAIL)):
        entry = {"norm": norm, "dtype": "bf16", "rows": 512, "width": 576, "bytes": {OURS: value}}
        assert verdict_of(name, result(kept=(entry,)))["verdict"] == verdict


def test_losses_are_against_peers_and_alternatives_but_not_clone() -> None:
    ratios = {"clone": 1.5, "torch.nn": 1.01, "torch.nn.LayerNorm": 1.2, "transformers Llama": 0.3}
    losses = find_losses(result(measurement(cases.RMS_FORWARD, ratios)))
    assert [(each["against"], each["ratio"]) for each in losses] == [("torch.nn", 1.01), ("torch.nn.LayerNorm", 1.2)]


def complete_result() -> dict:
    measured = result(
        measurement(cases.RMS_FORWARD, {"clone": 1.3, "torch.nn": 1.25}),
        measurement(cases.RMS_FORWARD, {"clone": 1.0, "torch.nn": 0.2}, width=4096),
        measurement(cases.RMS_FORWARD, {"clone": 1.0, "torch.nn": 0.2}, allocator="default"),
        {**measurement(models.THINKER_TRAINING, {"torch.nn": 0.9}), "norm_share": {OURS: 0.0123}},
    )
    add_event(measured, {"event": "skipped", "what": "a peer", "why": "it is not there"})
    return {**measured, "targets": judge(measured), "losses": find_losses(measured)}


def test_a_result_read_from_json_is_printed_completely(capsys) -> None:
    measured = complete_result()
    read = json.loads(to_json(measured))
    assert read == measured
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
    assert all(each["name"] in table for each in measured["targets"]), "no name is cut at 80 columns"
    assert table.count(UNKNOWN) >= 18


def test_the_figure_has_the_measured_lines_and_marks_empty_panels(tmp_path) -> None:
    measured = {**complete_result(), "settings": {"threads": [1], "rows": [512]}}
    lines = lines_of(measured, cases.RMS_FORWARD, "fp32", 1, 512)
    assert lines[OURS] == [(1024, 4.0), (4096, 4.0)]
    assert lines["clone"] == [(1024, pytest.approx(5.2)), (4096, 4.0)]
    assert lines_of(measured, cases.RMS_FORWARD, "bf16", 1, 512) == {}
    draw(tmp_path / "bench.png", measured)
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
