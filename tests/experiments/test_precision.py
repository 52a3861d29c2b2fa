"""Precisions by device, autocast, and the readings of the loss."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from omninorm.experiments import TrainConfig, build_model, train
from omninorm.experiments import readings as readings_module
from omninorm.experiments.precision import autocast, choose_precision, tensor_cores
from omninorm.experiments.readings import MOST_SKIPPED, Reading, Readings
from omninorm.thinker import ThinkerConfig

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
SHAPE = ThinkerConfig(d_model=16, n_layers=2, n_heads=2, max_seq_len=16)


@pytest.mark.parametrize(("supported", "expected"), [(True, "bfloat16"), (False, "float16")])
def test_auto_is_what_the_gpu_computes_in(monkeypatch: pytest.MonkeyPatch, supported: bool, expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    assert choose_precision("auto", CUDA) == expected
    assert choose_precision("float32", CUDA) == "float32"
    assert choose_precision("auto", CPU) == choose_precision("auto", torch.device("mps")) == "float32"


@pytest.mark.parametrize(("short", "long"), [("fp32", "float32"), ("bf16", "bfloat16"), ("fp16", "float16")])
def test_short_names_are_stored_as_long_ones(short: str, long: str) -> None:
    assert TrainConfig(precision=short) == TrainConfig(precision=long)
    assert TrainConfig.from_dict({"precision": short}).precision == long


def test_autocast_computes_in_the_precision() -> None:
    x = torch.ones(4, 4)
    expected = {"float32": torch.float32, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16, "float16": torch.float16}
    for precision, dtype in expected.items():
        with autocast(precision, CPU):
            assert (x @ x).dtype == dtype


def test_float16_scales_the_loss_and_skips_steps_that_overflow(data, small) -> None:
    """A first scale of 65,536 times a large loss overflows; the scaler skips the step and halves the scale."""
    model = build_model(SHAPE, 0)
    with torch.no_grad():
        model.embedding.weight.mul_(40)
    result = train(model, data, replace(small, precision="float16", steps=12))
    finite = [math.isfinite(norm) for norm in result.grad_norms]
    assert result.status == "finished"
    assert not finite[0]
    assert finite[-1]


def test_a_run_in_float16_resumes_bit_identically_with_its_scale(data, small, tmp_path) -> None:
    from omninorm.experiments import RunFolder

    results = []
    for stop in (None, 3):
        config = replace(small, precision="float16", steps=6, checkpoint_every=1, watch_every=None)
        folder = RunFolder.create(tmp_path / str(stop), {}, {})
        model = build_model(SHAPE, 0)
        with torch.no_grad():
            model.embedding.weight.mul_(40)
        signals = iter([2 if step == stop else None for step in range(1, 7)])
        result = train(model, data, config, run=folder, stopped_by=lambda signals=signals: next(signals))
        if stop:
            assert result.status == "interrupted"
            result = train(build_model(SHAPE, 1), data, config, run=folder)
        folder.close()
        results.append([event.loss for event in result.step_events])
    assert len(results[0]) == 6
    assert results[0] == results[1]


def test_tf32_is_restored_after_training(monkeypatch: pytest.MonkeyPatch) -> None:
    set_to: list[str] = []
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "highest")
    monkeypatch.setattr(torch, "set_float32_matmul_precision", set_to.append)
    for tf32, device in ((False, CUDA), (True, CPU), (True, CUDA)):
        with tensor_cores(tf32, device):
            pass
    assert set_to == ["high", "highest"]


def reading(step: int, loss: float, norm: float) -> Reading:
    return Reading(step, 0.1, 0.0, torch.tensor(loss, dtype=torch.float64), torch.tensor(norm))


def test_late_readings_report_the_step_before() -> None:
    reported: list[int] = []
    readings = Readings(late=True, scaled=False, report=lambda each, seconds: reported.append(each.step))
    assert readings.check_at_once(reading(1, math.nan, 1.0)) is None
    for step in (1, 2, 3):
        assert readings.add(reading(step, 2.0, 1.0)) is None
        assert reported == list(range(1, step))
    assert readings.settle() is None
    assert reported == [1, 2, 3]
    assert readings.add(reading(4, math.nan, 1.0)) is None
    end = readings.add(reading(5, 2.0, 1.0))
    assert end is not None
    assert (end.step, end.status) == (4, "diverged")


@pytest.mark.parametrize(("host", "device"), [(1.0, 5.0), (5.0, 1.0)])
def test_the_time_of_a_step_is_that_of_the_slower_of_host_and_device(
    monkeypatch: pytest.MonkeyPatch, host: float, device: float
) -> None:
    now, idle, done = 0.0, 0.0, {}
    monkeypatch.setattr(readings_module.time, "perf_counter", lambda: now)
    seconds: list[float] = []
    readings = Readings(late=True, scaled=False, report=lambda each, took: seconds.append(took))

    class Slow(Reading):
        def _read(self) -> list[float]:
            nonlocal now
            now = max(now, done[self.step])
            return [1.0, 1.0]

    for step in range(1, 6):
        each = Slow(step, 0.1, now, torch.tensor(1.0), torch.tensor(1.0))
        now += host
        idle = done[step] = max(now if host > device else now - host, idle) + (0.0 if host > device else device)
        readings.add(each)
    readings.settle()
    assert seconds == pytest.approx([max(host, device)] * 5)


def test_a_scaled_run_diverges_only_if_its_loss_does_or_steps_are_skipped_for_long() -> None:
    readings = Readings(late=False, scaled=True, report=lambda each, seconds: None)
    for step in range(1, MOST_SKIPPED + 1):
        assert readings.check_at_once(reading(step, 2.0, math.inf)) is None
        assert readings.add(reading(step, 2.0, math.inf)) is None
    assert readings.check_at_once(reading(99, 2.0, 1.0)) is None
    assert readings.check_at_once(reading(99, 2.0, math.inf)) is not None
    assert readings.check_at_once(reading(99, math.nan, 1.0)) is not None
    assert Readings(False, False, lambda *_: None).check_at_once(reading(1, 2.0, math.inf)) is not None


# torch.compile itself creates an instance of the autograd function.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_run_trains_as_an_eager_one(data, small, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compiled(model, backend="aot_eager"))
    eager = train(build_model(SHAPE, 0), data, small)
    result = train(build_model(SHAPE, 0), data, replace(small, compile=True))
    assert result.losses == pytest.approx(eager.losses, rel=1e-5)
