"""Sinks: what TensorBoard logs, and failing sinks, which do not end training."""

import builtins
import math
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from omninorm.errors import ConfigError, MissingExtraError
from omninorm.monitor import Alarm, watch
from omninorm.monitor.sinks import TensorBoard, sentence

ALARM = Alarm(7, "fail", "layer-jump", "blocks.2", "Its stream is 40 × the one before.", "Lower the rate.", "ours")


class Broken:
    """Fails at its second sample, as a disk does that runs full."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def log(self, step, numbers) -> None:
        self.calls.append(f"log {step}")
        if step > 1:
            raise OSError(28, "No space left on device")

    def alarm(self, alarm) -> None:
        self.calls.append("alarm")

    def close(self) -> None:
        self.calls.append("close")


def train(sinks, steps=6, every=2, faulty_at=None) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with watch(model, optimizer, every=every, sinks=sinks) as watched:
        for step in range(1, steps + 1):
            x = torch.randn(16, 4) * (math.nan if step == faulty_at else 1.0)
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            watched.step(loss)
    return [parameter.detach() for parameter in model.parameters()]


def read(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()


# TensorBoard ----------------------------------------------------------------------------------------------------------


def test_tensorboard_logs_every_number_of_a_sample(tmp_path: Path) -> None:
    class Copy:
        samples: dict[int, dict[str, float]] = {}  # noqa: RUF012

        def log(self, step, numbers) -> None:
            self.samples[step] = dict(numbers)

        def alarm(self, alarm) -> None: ...
        def close(self) -> None: ...

    copy = Copy()
    train([TensorBoard(tmp_path), copy])
    events = read(tmp_path)
    assert sorted(copy.samples) == [1, 2, 4, 6]
    expected = {name if "/" in name else f"run/{name}" for name in copy.samples[2]}
    assert {"run/loss", "run/lr", "run/grad_norm", "norm_rms/1", "gain_max/1"} <= expected
    assert set(events.Tags()["scalars"]) == expected
    losses = {event.step: event.value for event in events.Scalars("run/loss")}
    assert losses == pytest.approx({step: sample["loss"] for step, sample in copy.samples.items()})


def test_tensorboard_logs_alarms_as_text(tmp_path: Path) -> None:
    train([TensorBoard(tmp_path)], faulty_at=3)
    events = read(tmp_path)
    (tag,) = [tag for tag in events.Tags()["tensors"] if "nonfinite" in tag]
    (event,) = events.Tensors(tag)
    assert event.step in (3, 4)
    assert b"The first NaN of the run" in event.tensor_proto.string_val[0]


def test_tensorboard_replaces_steps_that_a_resumed_run_repeats(tmp_path: Path) -> None:
    first = TensorBoard(tmp_path)
    for step in (1, 10, 20, 30):
        first.log(step, {"loss": 1.0})
    first.close()
    again = TensorBoard(tmp_path)
    again.log(20, {"loss": 2.0})
    again.close()
    assert [(event.step, event.value) for event in read(tmp_path).Scalars("run/loss")] == [
        (1, 1.0),
        (10, 1.0),
        (20, 2.0),
    ]


def test_tensorboard_does_not_close_a_given_writer(tmp_path: Path) -> None:
    writer = SummaryWriter(str(tmp_path))
    sink = TensorBoard(writer)
    sink.log(1, {"loss": 3.0, "stream_rms/a <b> & 'c'": 2.0})
    sink.alarm(ALARM)
    sink.close()
    writer.add_scalar("mine", 1.0, 2)
    writer.close()
    assert set(read(tmp_path).Tags()["scalars"]) == {"run/loss", "stream_rms/a <b> & 'c'", "mine"}


def test_tensorboard_accepts_any_writer_with_the_same_methods() -> None:
    class Writer:
        def __init__(self) -> None:
            self.said: list[object] = []

        def add_scalar(self, tag, value, step) -> None:
            self.said.append((tag, value, step))

        def add_text(self, tag, text, step) -> None:
            self.said.append((tag, text, step))

        def flush(self) -> None:
            self.said.append("flush")

    writer = Writer()
    sink = TensorBoard(writer)
    sink.log(3, {"loss": 1.5})
    sink.alarm(ALARM)
    sink.close()
    assert writer.said == [("run/loss", 1.5, 3), ("alarms/layer-jump", sentence(ALARM), 7), "flush"]


def test_tensorboard_without_logs_creates_no_file(tmp_path: Path) -> None:
    TensorBoard(tmp_path / "new").close()
    assert not (tmp_path / "new").exists()


def test_tensorboard_refuses_other_targets() -> None:
    with pytest.raises(ConfigError, match=r"folder or a writer, got int"):
        TensorBoard(3)


def test_missing_package_is_an_error_with_its_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("tensorboard"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    for name in [name for name in sys.modules if name.startswith(("tensorboard", "torch.utils.tensorboard"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=r"TensorBoard needs the package tensorboard.*pip install tensorboard"):
        TensorBoard(tmp_path)


# Failures -------------------------------------------------------------------------------------------------------------


def test_failing_sink_warns_once_and_training_continues() -> None:
    broken = Broken()
    with pytest.warns(UserWarning, match="Broken failed.*OSError.*No space left") as warned:
        weights = train([broken], faulty_at=5)
    assert len([w for w in warned if "Broken" in str(w.message)]) == 1
    assert broken.calls == ["log 1", "log 2"]
    assert all(torch.equal(a, b) or a.isnan().any() for a, b in zip(weights, train([], faulty_at=5), strict=True))


def test_sink_that_cannot_open_does_not_end_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(UserWarning, match="TensorBoard failed"):
        weights = train([TensorBoard(tmp_path / "file")])
    assert all(torch.equal(a, b) for a, b in zip(weights, train([]), strict=True))


def test_failing_sink_does_not_affect_others() -> None:
    class Good(Broken):
        def log(self, step, numbers) -> None:
            self.calls.append(f"log {step}")

    good = Good()
    with pytest.warns(UserWarning, match="Broken"):
        train([Broken(), good])
    assert good.calls == ["log 1", "log 2", "log 4", "log 6", "close"]


def test_interrupt_in_a_sink_is_raised() -> None:
    class Slow(Broken):
        def log(self, step, numbers) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train([Slow()])


def test_alarm_is_formatted_as_text() -> None:
    assert sentence(ALARM) == "fail at step 7, blocks.2: Its stream is 40 × the one before. Lower the rate."
    assert sentence(Alarm(2, "warn", "loss-spike", None, "A spike.", "Wait.")) == "warn at step 2: A spike. Wait."
