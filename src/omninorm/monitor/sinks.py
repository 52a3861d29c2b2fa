"""Sinks: loggers for the numbers and alarms of a run. TensorBoard, Weights & Biases, MLflow, or your own."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from omninorm.errors import ConfigError, MissingExtraError
from omninorm.monitor.history import Facts, Sample
from omninorm.record.alarm import Alarm
from omninorm.record.signals import SIGNALS

NAMESPACE = "omninorm"


class Sink(Protocol):
    """The interface of `watch(…, sinks=[…])`. A sink that raises, for example because of a disk or network error, is
    reported once and disabled; the training continues."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Log the numbers of a sampled step, by names such as "loss" and "stream_rms/blocks.3"."""

    def alarm(self, alarm: Alarm) -> None:
        """Log an alarm when it is raised."""

    def close(self) -> None:
        """Finish, at the end of the run."""


class TensorBoard:
    """TensorBoard: scalars, and alarms under TEXT.

    If the folder has events of a run, it is continued: events from the first logged step on are replaced.

    Args:
        target: a folder, or a `torch.utils.tensorboard.SummaryWriter` (or a compatible object), which you close.

    Raises:
        MissingExtraError: a folder is given and tensorboard is not installed.
        ConfigError: the target is neither a folder nor a writer.

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
        # TensorBoard groups charts by the part before the first slash.
        tagged = {name if "/" in name else f"run/{name}": value for name, value in numbers.items()}
        if type(writer).__module__.startswith("torch."):
            # One event for all numbers: add_scalar takes 0.3 ms per number, and a deep model has hundreds.
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
        """Open the writer on first use, so that a run that never logs leaves no file."""
        if self._writer is None:
            # After a kill, ten seconds are lost instead of two minutes.
            self._writer = self._make(str(self._folder), purge_step=step, flush_secs=10)
        return self._writer


class WandB:
    """Weights & Biases: charts "omninorm/…" over "omninorm/step", alarms in the run's summary; "fail" also alerts.

    Steps are a separate metric, so that they do not collide with those of your `wandb.log`.

    Args:
        run: the run that `wandb.init` returned; None for the run that is active at the first sample. You finish it.

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
            # By default wandb drops an alert within a minute of another with the same title.
            run.alert(f"{NAMESPACE}: {alarm.rule}", sentence(alarm), level=level, wait_duration=0)

    def close(self) -> None:
        """Do nothing: the caller ends the run."""

    def _find(self) -> Any:
        if self._run is None:
            self._run = self._given if self._given is not None else self._wandb.run
            if self._run is None:
                remedy = "Call wandb.init() before training, or pass its run"
                raise ConfigError("The sink WandB needs an active run", "", remedy)
            self._run.define_metric(f"{NAMESPACE}/*", step_metric=f"{NAMESPACE}/step")
        return self._run


class MLflow:
    """MLflow: metrics "omninorm/…" of the run that is active at the first sample; each rule's latest alarm as the tag
    "omninorm.<rule>", and all alarms in the artifact "omninorm/alarms.txt".

    Raises:
        MissingExtraError: mlflow is not installed; mlflow-skinny is enough.
    """

    MOST_METRICS = 1000  # MLflow's limits per call, per name and per tag
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
        """Do nothing: the caller ends the run."""

    def _find(self) -> str:
        if self._run_id is None:
            run = self._mlflow.active_run()
            if run is None:
                # log_metrics would start a run by itself, which nothing would end.
                remedy = "Call mlflow.start_run() before training"
                raise ConfigError("The sink MLflow needs an active run", "", remedy)
            self._run_id = str(run.info.run_id)
        return self._run_id

    def _name(self, name: str) -> str:
        """Return a name that MLflow allows; of a name that is too long, keep the end with the layer."""
        allowed = re.sub(r"[^A-Za-z0-9_\-. /:]", "_", name)
        return allowed if len(allowed) <= self.LONGEST_NAME else f"{NAMESPACE}/{allowed[-self.LONGEST_NAME + 20 :]}"


def sentence(alarm: Alarm) -> str:
    """Format an alarm as text."""
    where = f", {alarm.layer}" if alarm.layer else ""
    return f"{alarm.severity} at step {alarm.step}{where}: {alarm.text}"


def load(module: str, sink: str, package: str) -> Any:
    """Import the module of an optional package.

    Raises:
        MissingExtraError: the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        remedy = f"Install it with pip install {package}"
        raise MissingExtraError(f"The sink {sink} needs the package {package}", "", remedy) from error


def flatten(sample: Sample, facts: Facts) -> dict[str, float]:
    """Flatten a sample to numbers by name, such as "stream_rms/blocks.3"."""
    layers = {"block": facts.blocks, "norm": [norm.name for norm in facts.norms], "group": facts.groups, "run": [""]}
    return {
        f"{name}/{layer}" if layer else name: value
        for name, values in sample.signals.items()
        for layer, value in zip(layers[SIGNALS[name].axis], values, strict=True)
        if value is not None
    }
