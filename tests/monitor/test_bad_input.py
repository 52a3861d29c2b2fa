"""Wrong arguments, failing sinks and disks, and exceptions: one readable message, and training continues."""

from __future__ import annotations

import gc
import json
import logging
import math
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.waiting import PATIENCE
from helpers.watched_models import Decoder, adamw, tokens_of, train_watched
from torch import nn

from omninorm.errors import ConfigError, InputError, RunError
from omninorm.monitor import Alarm, Rule, watch
from omninorm.record import RECORD_FILE
from omninorm.record.jsonl import read_history


def test_model_without_norms_and_blocks_records_reasons() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watched = train_watched(model, optimizer, 3, lambda m, s: m(torch.ones(5, 4)).square().mean())
    assert set(watched.history.samples[-1].signals) == {"grad_norm", "weight_rms", "update_ratio"}
    (seen,) = [event for event in watched.record if event["kind"] == "seen"]
    assert "stack of blocks" in seen["not_seen"]["stream_rms"]
    assert "norm" in seen["not_seen"]["norm_rms"]
    assert all(reason for reason in seen["not_seen"].values())


@pytest.mark.parametrize("model", [nn.Sequential(), nn.ReLU()], ids=["empty", "without parameters"])
def test_model_without_parameters_is_refused(model: nn.Module) -> None:
    with pytest.raises(ConfigError, match="no parameters"):
        watch(model).open()


@pytest.mark.parametrize("model", ["a name", None, [nn.Linear(1, 1)]])
def test_object_that_is_no_module_is_refused(model: Any) -> None:
    with pytest.raises(ConfigError, match=r"must be a torch\.nn\.Module"):
        watch(model)


def test_parameters_without_values_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"'0.weight' is lazy"):
        watch(nn.Sequential(nn.LazyLinear(3))).open()
    with pytest.raises(ConfigError, match=r"'weight' is on the meta device"):
        watch(nn.Linear(2, 2, device="meta")).open()
    model = nn.Sequential(nn.LazyLinear(3))
    model(torch.ones(2, 2))
    assert len(train_watched(model, None, 1, lambda m, s: m(torch.ones(2, 2)).mean()).history.samples) == 1


@pytest.mark.parametrize(
    "options", [{"every": 0}, {"every": 1.5}, {"every": True}, {"step": -1}, {"optimizer": "Adam"}, {"optimizer": [3]}]
)
def test_arguments_of_the_wrong_type_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        watch(Decoder(), **options)


def test_model_can_have_one_open_watch() -> None:
    model = Decoder()
    watched = watch(model, rules=[])
    with watched:
        with pytest.raises(ConfigError, match="already being watched"), watched:
            pass
        with pytest.raises(ConfigError, match="already being watched"):
            watch(model).open()
        with pytest.raises(ConfigError, match="already being watched"):
            watch(nn.DataParallel(model)).open()
        watched.step(1.0)  # still works
    with pytest.raises(RunError, match="already been closed"), watched:
        pass
    with watch(model, rules=[]) as again:
        again.step(1.0)
    assert len(again.history.steps) == 1


def test_watch_that_failed_to_open_can_be_replaced(tmp_path: Path) -> None:
    model = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(ConfigError):
        watch(model).open()
    model(torch.ones(1, 2))
    with watch(model, rules=[]) as watched:
        watched.step(1.0)


@pytest.mark.parametrize("loss", [1j, [1.0], "1", True, torch.tensor(1j), torch.tensor([])])
def test_invalid_losses_are_refused_and_the_watch_continues(loss: Any) -> None:
    with watch(Decoder(), every=1, rules=[]) as watched:
        with pytest.raises(InputError, match="loss must be"):
            watched.step(loss)
        watched.step(1.0)
    assert [step.loss for step in watched.history.steps] == [1.0]


def test_step_of_a_closed_watch_is_refused() -> None:
    watched = watch(Decoder(), rules=[])
    with pytest.raises(RunError, match="not open"):
        watched.step(1.0)
    watched.flush()
    watched.close()
    watched.open()
    watched.close()
    watched.close()
    with pytest.raises(RunError, match="not open"):
        watched.step(1.0)


def test_modules_may_be_deleted_and_replaced() -> None:
    model = Decoder(blocks=3)
    optimizer = adamw(model)
    with watch(model, optimizer, every=1, rules=[]) as watched:
        for step in range(1, 7):
            if step == 3:
                del model.blocks[2]
            if step == 4:
                model.blocks[1].feed_forward = nn.Sequential(nn.Linear(16, 16))
            if step == 5:
                model.final_norm = nn.Identity()
            loss = tokens_of(model, step)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            watched.step(loss)
    assert len(watched.history.samples) == 6
    rms = [list(sample.signals["stream_rms"]) for sample in watched.history.samples]
    assert all(v is not None for v in rms[1])
    assert rms[2][2] is None
    assert rms[5][0] is not None


def test_exception_in_the_loop_closes_the_record(tmp_path: Path) -> None:
    model = Decoder()
    with pytest.raises(KeyError), watch(model, adamw(model), every=2, folder=tmp_path, rules=[]) as watched:  # noqa: PT012
        for step in range(1, 4):
            loss = tokens_of(model, step)
            loss.backward()
            watched.step(loss)
        raise KeyError("data")
    events = read_history(tmp_path / RECORD_FILE)
    assert events[-1] == {"kind": "end", "step": 3, "reason": "KeyError: 'data'"}
    assert [event["step"] for event in events if event["kind"] == "steps"] == [1, 2, 3]
    assert watched.record == events
    page = watched.report(tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<html" in page


class AlwaysAlarms(Rule):
    name = "always"

    def on_step(self, history: Any, step: Any) -> list[Alarm]:
        return [Alarm(step.step, "fail", "always", history.facts.blocks[0], "it is so.", "Nothing.")]


def test_report_is_written_for_a_run_in_memory(tmp_path: Path) -> None:
    watched = watch(Decoder(), rules=[])
    with pytest.raises(RunError, match="not been opened"):
        watched.report(tmp_path / "page.html")
    with watched:
        watched.step(3.25)
        assert "3.25" in watched.report(tmp_path / "page.html").read_text(encoding="utf-8")  # the run goes on
        watched.step(2.25)
    assert "2.25" in watched.report(tmp_path / "page.html").read_text(encoding="utf-8")


def test_module_names_with_markup_and_escapes_are_escaped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bad = "<script>alert(1)</script>\x1b[31m\u202e&\n"
    model = nn.Module()
    model.add_module(bad, Decoder().blocks)
    model.forward = lambda x: [x := block(x) for block in getattr(model, bad)][-1]  # type: ignore[assignment]
    with (
        caplog.at_level(logging.WARNING, "omninorm.watch"),
        watch(model, every=1, folder=tmp_path, rules=[AlwaysAlarms()]) as watched,
    ):
        model(torch.randn(1, 3, 16)).mean().backward()
        watched.step(1.0)
    assert watched.history.facts.blocks == (f"{bad}.0", f"{bad}.1")
    assert watched.alarms[0].layer == f"{bad}.0"
    text = "".join(record.getMessage() for record in caplog.records)
    assert "script" in text
    assert "\x1b" not in text
    assert "\n" not in text
    events = read_history(tmp_path / RECORD_FILE)
    assert events[0]["blocks"] == [f"{bad}.0", f"{bad}.1"]
    page = watched.report(tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page


def test_folder_that_is_a_file_warns_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    model = Decoder()
    with pytest.warns(UserWarning, match="stopped recording, training continues") as warned:
        watched = train_watched(model, adamw(model), 3, folder=tmp_path / "file")
    assert len(warned) == 1
    assert (tmp_path / "file").read_text() == "mine"
    assert len(watched.history.samples) == 3
    assert watched.record[-1]["kind"] == "end"


def test_resume_continues_the_record_of_the_folder(tmp_path: Path) -> None:
    model = Decoder()
    train_watched(model, adamw(model), 5, folder=tmp_path, every=2)
    before = (tmp_path / RECORD_FILE).read_bytes()
    with open(tmp_path / RECORD_FILE, "a", encoding="utf-8") as file:
        file.write('{"kind": "sample", "st')  # killed while it wrote
    watched = train_watched(model, adamw(model), 3, folder=tmp_path, every=2, step=4)
    assert (tmp_path / RECORD_FILE).read_bytes().startswith(before), "nothing that was recorded may be lost"
    assert [step.step for step in watched.history.steps] == [5, 6, 7]
    assert [sample.step for sample in watched.history.samples] == [6]
    kinds = [(event["kind"], event["step"]) for event in read_history(tmp_path / RECORD_FILE)]
    at = kinds.index(("resume", 4))
    assert kinds[at - 1] == ("end", 5)
    assert kinds[at + 1] == ("watch", 4)
    assert kinds[-1] == ("end", 7)


def test_internal_error_warns_once_and_training_continues(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it happens: at a block, in attention, at a norm, in backward, at the optimizer."""
    from omninorm.layers import LayerNorm
    from omninorm.monitor.probes import attention, block, gradients, norm, optimizer

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise ArithmeticError("internal")

    places = [
        (block.BlockProbe, "see"),
        (block.BlockProbe, "measure"),
        (block.BlockProbe, "see_gradient"),
        (attention.AttentionProbe, "see"),
        (attention, "_add"),
        (norm.NormProbe, "measure_examples"),
        (norm, "_measure"),
        (gradients.Gradients, "norms"),
        (optimizer.OptimizerWatch, "_measure_adam"),
        (optimizer.OptimizerWatch, "_measure_updates"),
    ]
    for make in (None, lambda: LayerNorm(16)):
        for owner, name in places:
            model = Decoder(make)
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, fails)
                with pytest.warns(UserWarning, match="could not measure.*internal") as warned:
                    watched = train_watched(model, adamw(model), 3)
            assert len(warned) == 1, (owner, name)
            assert len(watched.history.steps) == 3


class Broken:
    """A sink whose service is away."""

    def log(self, step: int, numbers: Any) -> None:
        raise ConnectionError("away")

    def alarm(self, alarm: Alarm) -> None:
        raise ConnectionError("away")

    def close(self) -> None:
        raise ConnectionError("away")


def test_failing_sink_does_not_end_training() -> None:
    model = Decoder()
    with pytest.warns(UserWarning, match="Broken failed.*ConnectionError: away") as warned:
        watched = train_watched(model, adamw(model), 3, sinks=[Broken()], rules=[AlwaysAlarms()])
    assert len(warned) == 1
    assert len(watched.history.samples) == 3
    assert watched.record[-1]["kind"] == "end"


def test_events_of_a_run_with_a_folder_are_not_kept_in_memory(tmp_path: Path) -> None:
    """The events are in the file; they need not be in memory, too."""
    model = nn.Linear(2, 2)
    gc.collect()
    gc.freeze()
    with watch(model, every=1, folder=tmp_path, rules=[]) as watched:
        for _ in range(40):
            watched.step(1.0)
        held = sum(
            1 for item in gc.get_objects() if type(item) is dict and item.get("kind") == "sample" and "step" in item
        )
        gc.unfreeze()
        assert held == 0
        assert sum(event["kind"] == "sample" for event in watched.record) == 40


# Disks and kills ------------------------------------------------------------------------------------------------------


def test_full_disk_warns_once_and_training_continues(tmp_path: Path) -> None:
    """A limit of 20 kB on files stands for a full disk; the record then ends with a complete line."""
    model, limits = Decoder(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.warns(UserWarning, match="stopped recording") as warned:
            watched = train_watched(model, adamw(model), 30, folder=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(warned) == 1
    assert len(watched.history.samples) == 30
    assert sum(event["kind"] == "sample" for event in watched.record) == 30
    content = (tmp_path / RECORD_FILE).read_bytes()
    assert 10_000 < len(content) <= 20_000
    assert content.endswith(b"\n")
    assert all(json.loads(line)["step"] >= 0 for line in content.splitlines())


KILLED = """
import os, signal, sys
from helpers.watched_models import Decoder, adamw, tokens_of
from omninorm.monitor import watch

model = Decoder()
optimizer = adamw(model)
with watch(model, optimizer, every=2, folder=sys.argv[1], rules=[]) as watched:
    for step in range(1, 10):
        loss = tokens_of(model, step)
        loss.backward()
        optimizer.step()
        watched.step(loss)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_killed_run_leaves_a_readable_record(tmp_path: Path) -> None:
    """Every event is in the file as soon as it is recorded, so a kill at any time loses none."""
    search_path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": search_path}
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    killed = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    events = read_history(tmp_path / RECORD_FILE)
    assert [event["step"] for event in events if event["kind"] == "sample"] == [1, 2, 4, 6, 8]
    assert "end" not in {event["kind"] for event in events}
    resumed = train_watched(Decoder(), None, 1, folder=tmp_path, step=8)
    assert resumed.history.steps[-1].step == 9
    assert math.isfinite(resumed.history.steps[-1].loss)
