"""The table of measurements that chooses the back end of norms on GPUs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from omninorm.errors import ConfigError
from omninorm.kernels import measured

H100, A100 = "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-40GB"
FASTER = {
    "device": "NVIDIA H100*", "operator": "rms_norm", "dtype": "bfloat16", "width": 4096, "rows": 4096,
    "backend": "triton", "run": "gpu-h100.json",
}  # fmt: skip


def table(tmp_path: Path, *entries: dict[str, Any]) -> Path:
    path = tmp_path / "measured.json"
    path.write_text(json.dumps({"default": "torch", "measurements": list(entries)}))
    return path


def choose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *entries: dict[str, Any], **changes: Any
) -> measured.Choice:
    monkeypatch.setattr(measured, "MEASUREMENTS", measured.read_table(table(tmp_path, *entries))[1])
    asked = {"operator": "rms_norm", "device": H100, "dtype": "bfloat16", "width": 5000, "compiled": False} | changes
    return measured.search(**asked)


def test_table_of_the_package_is_valid_and_its_default_is_torch() -> None:
    default, measurements = measured.read_table()
    assert default == "torch"
    assert all(each.run for each in measurements)


def test_measurement_names_the_faster_back_end_and_its_run(tmp_path, monkeypatch) -> None:
    choice = choose(tmp_path, monkeypatch, FASTER)
    assert choice.backend == "triton"
    assert choice.reason == "measured on NVIDIA H100 80GB HBM3 at width 4096 and 4096 rows (gpu-h100.json)"


@pytest.mark.parametrize(
    "changes",
    [{"device": A100}, {"operator": "layer_norm"}, {"dtype": "float32"}, {"width": 4095}, {"compiled": True}],
    ids=lambda changes: next(iter(changes)),
)
def test_what_was_not_measured_gets_the_default(tmp_path, monkeypatch, changes: dict[str, Any]) -> None:
    choice = choose(tmp_path, monkeypatch, FASTER, **changes)
    assert choice.backend == "torch"
    assert "no measurement" in choice.reason


def test_nearest_smaller_width_counts(tmp_path, monkeypatch) -> None:
    entries = FASTER, FASTER | {"width": 8192, "backend": "torch"}
    assert choose(tmp_path, monkeypatch, *entries, width=8191).backend == "triton"
    assert choose(tmp_path, monkeypatch, *entries, width=8192).backend == "torch"


def test_choice_does_not_depend_on_the_number_of_rows(tmp_path, monkeypatch) -> None:
    """Otherwise a row's bits would depend on its batch. One number of rows at which torch is faster decides."""
    assert choose(tmp_path, monkeypatch, FASTER, FASTER | {"rows": 1}).backend == "triton"
    assert choose(tmp_path, monkeypatch, FASTER, FASTER | {"rows": 1, "backend": "torch"}).backend == "torch"


def test_compiled_measurements_count_for_compiled_graphs_only(tmp_path, monkeypatch) -> None:
    compiled = FASTER | {"compiled": True}
    assert choose(tmp_path, monkeypatch, compiled, compiled=True).backend == "triton"
    assert choose(tmp_path, monkeypatch, compiled).backend == "torch"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("backend", "fastest"), ("operator", "add_rms_norm"), ("dtype", "bf16"), ("width", 0), ("rows", "4096"),
        ("run", ""), ("compiled", 1), ("device", None), ("speed", 3.0),
    ],
)  # fmt: skip
def test_invalid_measurement_is_refused_with_its_field(tmp_path, name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"measured.json must hold valid measurements, got {name}="):
        measured.read_table(table(tmp_path, FASTER | {name: value}))


def test_missing_field_is_refused(tmp_path) -> None:
    with pytest.raises(ConfigError, match="got run=None"):
        measured.read_table(table(tmp_path, {name: FASTER[name] for name in FASTER if name != "run"}))


def test_default_must_be_a_back_end_of_gpus(tmp_path) -> None:
    path = tmp_path / "measured.json"
    path.write_text('{"default": "cpu", "measurements": []}')
    with pytest.raises(ConfigError, match="default='cpu'"):
        measured.read_table(path)


def test_devices_that_are_no_cuda_devices_are_named_by_their_type() -> None:
    assert measured.device_name(torch.device("mps")) == "mps"
