"""Sinks: further places for a watched run's numbers and alarms. TensorBoard, Weights & Biases, MLflow, or your own."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from omninorm.errors import ConfigError, MissingExtraError
from omninorm.record.signals import SIGNALS
from omninorm.watch.alarm import Alarm
from omninorm.watch.history import Facts, Sample

NAMESPACE = "omninorm"


class Sink(Protocol):
    """What `watch(…, sinks=[…])` takes. One that raises, for a disk or a network that failed, is told of once and left
    out from then on; the training goes on."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """The numbers of a sampled step, by names such as "loss" and "stream_rms/blocks.3"."""

    def alarm(self, alarm: Alarm) -> None:
        """An alarm, when it is raised."""

    def close(self) -> None:
        """The run has ended."""


class TensorBoard:
    """Scalars and, under TEXT, alarms.

    A folder that holds a run's events already is continued: what they say of the first logged step and later is void.

    Args:
        target: a folder, or a `torch.utils.tensorboard.SummaryWriter` (or one like it), which you close yourself.

    Raises:
        MissingExtraError: a folder is given and tensorboard is not installed.
        ConfigError: neither a folder nor a writer.

    Example:
        ``watch(model, optimizer, folder="runs/mine", sinks=[TensorBoard("runs/mine")])``
    """

    def __init__(self, target: str | Path | Any) -> None:
        self._folder: Path | None = None
        self._writer: Any = None
        if isinstance(target, (str, Path)):
            self._folder = Path(target)
            self._make = load("torch.utils.tensorboard", "TensorBoard", "tensorboard").SummaryWriter
        elif hasattr(target, "add_scalar") and hasattr(target, "add_text"):
            self._writer = target
        else:
            remedy = "pass a path or a torch.utils.tensorboard.SummaryWriter"
            raise ConfigError("TensorBoard needs a folder or a writer", type(target).__name__, remedy)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        writer = self._open(step)
        # TensorBoard gathers charts by what stands before the first slash.
        tagged = {name if "/" in name else f"run/{name}": value for name, value in numbers.items()}
        if type(writer).__module__.startswith("torch."):
            # A single event: add_scalar takes 0.3 ms a number, and a deep model has hundreds.
            summary = importlib.import_module("tensorboard.compat.proto.summary_pb2").Summary
            values = [summary.Value(tag=tag, simple_value=value) for tag, value in tagged.items()]
            writer.file_writer.add_summary(summary(value=values), step)
            return
        for tag, value in tagged.items():
            writer.add_scalar(tag, value, step)

    def alarm(self, alarm: Alarm) -> None:
        self._open(alarm.step).add_text(f"alarms/{alarm.rule}", sentence(alarm), alarm.step)

    def close(self) -> None:
        if self._writer is None:
            return
        self._writer.flush()
        if self._folder is not None:
            writer, self._writer = self._writer, None
            writer.close()

    def _open(self, step: int) -> Any:
        """Only now, so that a run that never logs leaves no file."""
        if self._writer is None:
            # A kill loses the last ten seconds, not two minutes.
            self._writer = self._make(str(self._folder), purge_step=step, flush_secs=10)
        return self._writer


class WandB:
    """Weights & Biases: charts "omninorm/…" over "omninorm/step", alarms in the run's summary; "fail" also alerts.

    Steps are a metric of their own, so that they do not collide with those of your `wandb.log`.

    Args:
        run: what `wandb.init` returned; None for the run that is active when the first numbers come. You finish it.

    Raises:
        MissingExtraError: wandb is not installed.
    """

    def __init__(self, run: Any = None) -> None:
        self._wandb = load("wandb", "WandB", "wandb")
        self._given = run
        self._run: Any = None

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        named = {f"{NAMESPACE}/{name}": value for name, value in numbers.items()}
        self._find().log({f"{NAMESPACE}/step": step, **named})

    def alarm(self, alarm: Alarm) -> None:
        run = self._find()
        run.summary[f"{NAMESPACE}/alarm/{alarm.rule}"] = sentence(alarm)
        if alarm.severity == "fail":
            level = self._wandb.AlertLevel.ERROR
            # It would otherwise drop an alarm within a minute of one of the same rule.
            run.alert(f"{NAMESPACE}: {alarm.rule}", sentence(alarm), level=level, wait_duration=0)

    def close(self) -> None:
        """Nothing: the run is yours."""

    def _find(self) -> Any:
        if self._run is None:
            self._run = self._given if self._given is not None else self._wandb.run
            if self._run is None:
                remedy = "call wandb.init() before the training, or pass its run"
                raise ConfigError("the sink WandB needs an active run", "none", remedy)
            self._run.define_metric(f"{NAMESPACE}/*", step_metric=f"{NAMESPACE}/step")
        return self._run


class MLflow:
    """MLflow: metrics "omninorm/…" of the run that is active when the first numbers come; each rule's latest alarm as
    the tag "omninorm.<rule>", and all of them in the artifact "omninorm/alarms.txt".

    Raises:
        MissingExtraError: mlflow is not installed; mlflow-skinny is enough.
    """

    MOST_METRICS = 1000  # a call, and the lengths of a name and of a tag: MLflow's limits
    LONGEST_NAME = 250
    LONGEST_TAG = 5000

    def __init__(self) -> None:
        self._mlflow = load("mlflow", "MLflow", "mlflow-skinny")
        self._run_id: str | None = None
        self._alarms: list[str] = []

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        named = iter([(self._name(f"{NAMESPACE}/{name}"), value) for name, value in numbers.items()])
        while part := dict(islice(named, self.MOST_METRICS)):
            self._mlflow.log_metrics(part, step=step, run_id=self._find())

    def alarm(self, alarm: Alarm) -> None:
        text = sentence(alarm)
        self._alarms.append(text)
        client = self._mlflow.MlflowClient()
        client.set_tag(self._find(), self._name(f"{NAMESPACE}.{alarm.rule}"), text[: self.LONGEST_TAG])
        client.log_text(self._find(), "\n".join(self._alarms) + "\n", f"{NAMESPACE}/alarms.txt")

    def close(self) -> None:
        """Nothing: the run is yours."""

    def _find(self) -> str:
        if self._run_id is None:
            run = self._mlflow.active_run()
            if run is None:
                # log_metrics would begin one by itself, which nobody asked for and nobody ends.
                remedy = "call mlflow.start_run() before the training"
                raise ConfigError("the sink MLflow needs an active run", "none", remedy)
            self._run_id = str(run.info.run_id)
        return self._run_id

    def _name(self, name: str) -> str:
        """A name as MLflow allows it; of one that is too long the end, where the layer stands."""
        allowed = re.sub(r"[^A-Za-z0-9_\-. /:]", "_", name)
        return allowed if len(allowed) <= self.LONGEST_NAME else f"{NAMESPACE}/{allowed[-self.LONGEST_NAME + 20 :]}"


def sentence(alarm: Alarm) -> str:
    """An alarm as text."""
    where = f", {alarm.layer}" if alarm.layer else ""
    return f"{alarm.severity} at step {alarm.step}{where}: {alarm.evidence} {alarm.remedy}"


def load(module: str, sink: str, package: str) -> Any:
    """An optional package's module.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        remedy = f"install it with pip install {package}"
        raise MissingExtraError(f"the sink {sink} needs the package {package}", "no such package", remedy) from error


def flatten(sample: Sample, facts: Facts) -> dict[str, float]:
    """A sample as numbers by name, "stream_rms/blocks.3": what dashboards take."""
    layers = {"block": facts.blocks, "norm": [norm.name for norm in facts.norms], "group": facts.groups, "run": [""]}
    return {
        f"{name}/{layer}" if layer else name: value
        for name, values in sample.signals.items()
        for layer, value in zip(layers[SIGNALS[name].axis], values, strict=True)
        if value is not None
    }
