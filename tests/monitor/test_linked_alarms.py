"""A cause that is found after its symptom: w.alarms, the log, sinks, the record and the page agree."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import nn

from omninorm import watch
from omninorm.monitor import Alarm, History, Rule, Sample, Step
from omninorm.record.alarm import leading
from omninorm.report import judge, read_run, render


class Symptom(Rule):
    """Reports step 3."""

    name, source, symptom = "symptom", "a test", True

    def on_step(self, history: History, step: Step) -> Iterable[Alarm]:
        if step.step == 3:
            yield self.alarm(3, "fail", None, "Loss high: it is 9.", "Look at the batch.")


class Cause(Rule):
    """Reports the sample of a step."""

    name, source, explains = "cause", "a test", ("symptom",)

    def __init__(self, step: int) -> None:
        self.at = step

    def on_sample(self, history: History, sample: Sample) -> Iterable[Alarm]:
        if sample.step == self.at:
            yield self.alarm(self.at, "fail", "0", "Weights jumped: they are 1,000.", "Look at the code.")


class Kept:
    """A sink that keeps the alarms."""

    def __init__(self) -> None:
        self.alarms: list[Alarm] = []

    def log(self, step: int, numbers: object) -> None:
        pass

    def alarm(self, alarm: Alarm) -> None:
        self.alarms.append(alarm)

    def close(self) -> None:
        pass


@pytest.mark.parametrize(("at", "together"), [(5, True), (10, False)])
def test_all_outputs_lead_with_the_cause(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, at: int, together: bool
) -> None:
    """Found in the sample after the symptom, with which it is reported, or one sample later."""
    model, sink = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)), Kept()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    caplog.set_level(logging.WARNING, "omninorm.watch")
    with watch(model, optimizer, every=5, folder=tmp_path, rules=[Cause(at), Symptom()], sinks=[sink]) as watched:
        for _ in range(12):
            loss = model(torch.ones(1, 2)).square().sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            watched.step(loss)
    order = ["cause", "symptom"] if together else ["symptom", "cause"]
    assert [alarm.rule for alarm in watched.alarms] == [alarm.rule for alarm in sink.alarms] == order
    cause, symptom = sorted(watched.alarms, key=lambda alarm: alarm.rule)
    assert symptom.cause == cause.ref
    assert symptom.severity == ("warn" if together else "fail"), "what has been reported is not changed"
    assert leading(watched.alarms) is cause
    text = "Probably a consequence of cause in 0" if together else "It probably explains symptom at step 3."
    assert sum(text in record.message for record in caplog.records) == 1
    story = read_run(tmp_path)
    assert [(alarm.ref, alarm.cause) for alarm in story.alarms] == [(symptom.ref, cause.ref), (cause.ref, None)]
    assert judge(story).sentence.startswith("Failing: Weights jumped")
    assert "1 probable consequence" in render(story)
