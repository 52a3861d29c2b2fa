"""read_frames: a record as pandas DataFrames."""

from __future__ import annotations

import math
import sys

import pytest
from helpers import synthetic_run as synthetic

from omninorm.errors import MissingExtraError
from omninorm.report import read_frames, read_run


def test_frames_hold_the_steps_samples_and_alarms_of_the_record(tmp_path):
    folder = synthetic.run(tmp_path, blocks=3, samples=6, every=5, scene="logits", kinds="both")
    story, frames = read_run(folder), read_frames(folder)
    steps, samples, alarms = frames["steps"], frames["samples"], frames["alarms"]
    assert list(steps.columns) == ["step", "loss", "grad_norm", "lr", "bits_per_byte"]
    assert len(steps) == 31
    assert steps.set_index("step").loc[7, "loss"] == story.series["loss"].values[6]
    assert math.isnan(steps.set_index("step").loc[7, "bits_per_byte"])
    assert list(samples.columns) == ["step", "signal", "layer", "value"]
    assert len(samples) == sum(len(values) for column in story.columns for values in column.signals.values())
    chosen = samples[(samples.signal == "angle") & (samples.layer == "blocks.1") & (samples.step == 10)]
    assert chosen.value.tolist() == [story.columns[1].signals["angle"][1]]
    assert samples[(samples.signal == "mean_share")].value.isna().any()
    assert set(samples[samples.signal == "logz"].layer) == {"run"}
    assert alarms.rule.tolist() == [alarm.rule for alarm in story.alarms]
    assert alarms.ranks[0] == (0,)


def test_samples_are_thinned_on_request(tmp_path):
    folder = synthetic.run(tmp_path, blocks=1, samples=30, every=1)
    assert read_frames(folder)["samples"].step.nunique() == 30
    few = read_frames(folder, samples=8)["samples"].step
    assert few.nunique() <= 8
    assert {1, 30} <= set(few)


def test_record_without_samples_has_empty_frames(tmp_path):
    frames = read_frames(synthetic.run(tmp_path, samples=2, kinds="train"))
    assert (len(frames["samples"]), len(frames["alarms"])) == (0, 0)
    assert len(frames["steps"]) == 21


def test_missing_pandas_is_an_error_with_a_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingExtraError, match=r"read_frames needs pandas.*pip install"):
        read_frames(tmp_path)
