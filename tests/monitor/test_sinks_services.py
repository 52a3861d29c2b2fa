"""Sinks for services, with the real packages but without a network: wandb offline, mlflow in a local folder."""

import math
from pathlib import Path

import pytest

from omninorm.errors import ConfigError
from omninorm.monitor import Alarm
from omninorm.monitor.sinks import MLflow, WandB

FAIL = Alarm(7, "fail", "layer-jump", "blocks.2", "Its stream is 40 × the one before.", "Lower the rate.", "ours")
WARN = Alarm(9, "warn", "loss-spike", None, "A spike.", "Wait.", "ours")

pytestmark = pytest.mark.slow  # importing wandb and mlflow takes long


# Weights & Biases -----------------------------------------------------------------------------------------------------


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_DIR", str(tmp_path)), ("WANDB_SILENT", "true")):
        monkeypatch.setenv(name, value)
    import wandb

    return wandb


def test_wandb_logs_numbers_over_a_separate_step(wandb) -> None:
    run = wandb.init(project="test")
    try:
        sink = WandB()
        run.log({"mine": 1.0}, step=5)
        for step in (1, 2, 4):
            sink.log(step, {"loss": 1.0 / step, "stream_rms/blocks.3": math.inf})
        run.log({"mine": 2.0}, step=9, commit=True)
        sink.alarm(FAIL)
        sink.alarm(WARN)
        sink.close()
        summary = dict(run.summary)
    finally:
        run.finish()
    assert summary["omninorm/step"] == 4
    assert summary["omninorm/loss"] == 0.25
    assert summary["omninorm/stream_rms/blocks.3"] == math.inf
    assert summary["mine"] == 2.0
    assert summary["omninorm/alarm/layer-jump"].startswith("fail at step 7, blocks.2: Its stream")
    assert summary["omninorm/alarm/loss-spike"].startswith("warn at step 9: A spike")


def test_wandb_alerts_only_for_failures(wandb, monkeypatch: pytest.MonkeyPatch) -> None:
    run = wandb.init(project="test")
    try:
        alerts = []
        monkeypatch.setattr(run, "alert", lambda title, text, **settings: alerts.append((title, settings)))
        sink = WandB(run)
        sink.alarm(WARN)
        sink.alarm(FAIL)
    finally:
        run.finish()
    assert alerts == [("omninorm: layer-jump", {"level": wandb.AlertLevel.ERROR, "wait_duration": 0})]


def test_wandb_needs_an_active_run(wandb) -> None:
    with pytest.raises(ConfigError, match="WandB needs an active run"):
        WandB().log(1, {"loss": 1.0})


# MLflow ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name in ("MLFLOW_ALLOW_FILE_STORE", "MLFLOW_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, "true")
    import mlflow

    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri((tmp_path / "runs").as_uri())
    yield mlflow
    mlflow.set_tracking_uri(before)


def test_mlflow_splits_numbers_over_several_calls(mlflow) -> None:
    sink = MLflow()
    with mlflow.start_run() as run:
        numbers = {f"stream_rms/blocks.{index}": float(index) for index in range(1500)}
        sink.log(10, {"loss": 0.5, **numbers})
        sink.log(20, {"loss": 0.25})
        sink.close()
    client = mlflow.MlflowClient()
    metrics = client.get_run(run.info.run_id).data.metrics
    assert metrics == {"omninorm/loss": 0.25} | {f"omninorm/{name}": value for name, value in numbers.items()}
    history = client.get_metric_history(run.info.run_id, "omninorm/loss")
    assert [(metric.step, metric.value) for metric in history] == [(10, 0.5), (20, 0.25)]


def test_mlflow_names_are_restricted_to_allowed_characters(mlflow) -> None:
    with mlflow.start_run() as run:
        MLflow().log(1, {"stream_rms/<b>größe</b>": 1.0, f"norm_rms/{'deep.' * 100}norm": 2.0})
    metrics = mlflow.MlflowClient().get_run(run.info.run_id).data.metrics
    short, long = sorted(metrics, key=len)
    assert short == "omninorm/stream_rms/_b_gr__e_/b_"
    assert len(long) <= 250
    assert long.startswith("omninorm/")
    assert long.endswith(".deep.norm")


def test_mlflow_logs_alarms_as_tags_and_text(mlflow) -> None:
    with mlflow.start_run() as run:
        sink = MLflow()
        sink.alarm(FAIL)
        sink.alarm(WARN)
    tags = mlflow.MlflowClient().get_run(run.info.run_id).data.tags
    assert tags["omninorm.layer-jump"].startswith("fail at step 7, blocks.2")
    text = (Path(run.info.artifact_uri.removeprefix("file://")) / "omninorm" / "alarms.txt").read_text()
    assert [line.split(":")[0] for line in text.splitlines()] == ["fail at step 7, blocks.2", "warn at step 9"]


def test_mlflow_does_not_start_a_run(mlflow) -> None:
    with pytest.raises(ConfigError, match="MLflow needs an active run"):
        MLflow().log(1, {"loss": 1.0})
    assert mlflow.active_run() is None
