"""`omninorm inspect`: the verdict first, one JSON document, exit codes."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

BLOCKS = 4


@pytest.fixture
def weights():
    tensors = {"model.embed_tokens.weight": torch.randn(50, 64) * 0.02, "model.norm.weight": torch.ones(64)}
    for block in range(BLOCKS):
        tensors[f"model.layers.{block}.self_attn.o_proj.weight"] = torch.randn(64, 64) * 0.02
        tensors[f"model.layers.{block}.input_layernorm.weight"] = torch.ones(64)
    return tensors


@pytest.fixture
def inspect(command, tmp_path):
    def call(tensors, *options):
        save_file(tensors, tmp_path / "model.safetensors")
        return command("inspect", tmp_path, *options)

    return call


def test_healthy_checkpoint_prints_its_verdict_blocks_and_totals(inspect, weights):
    code, out, err = inspect(weights)
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert lines[0] == "Healthy: no problems in 10 tensors with 19,904 parameters."
    assert [line.split()[0] for line in lines[-2 - BLOCKS : -2]] == ["0", "1", "2", "3"]
    assert lines[-1] == "10 tensors, 5 norms, 19,904 parameters, 0.1 MB (F32 10)"


def test_warning_exits_with_0_and_failure_with_1(inspect, weights):
    weights["model.layers.1.input_layernorm.weight"][4] = 30.0
    code, out, _ = inspect(weights)
    assert (code, out.splitlines()[0].startswith("1 finding in 10 tensors")) == (0, True)
    assert "WARN  gain-drift  model.layers.1.input_layernorm.weight" in out
    weights["model.layers.3.self_attn.o_proj.weight"][0, 1] = torch.nan
    code, out, err = inspect(weights)
    assert (code, err) == (1, "")
    assert out.index("FAIL  non-finite  model.layers.3.self_attn.o_proj.weight") < out.index("WARN  gain-drift")


def test_norms_option_shows_every_gain(inspect, weights):
    weights["model.layers.1.input_layernorm.weight"][:3] = torch.tensor([0.0, -0.5, 3.0])
    code, out, _ = inspect(weights, "--norms")
    assert code == 0
    table = out.split("norms\n")[1].split("\n\n")[0]
    rows = {name: values for name, *values in (line.split() for line in table.splitlines()[1:])}
    assert list(rows) == [
        "model.norm.weight",
        *(f"model.layers.{block}.input_layernorm.weight" for block in range(BLOCKS)),
    ]
    assert rows["model.layers.1.input_layernorm.weight"] == ["64", "0", "1", "3", "1.6%"]
    assert rows["model.norm.weight"] == ["64", "1", "1", "1", "0.0%"]


def test_json_option_prints_one_strict_document(inspect, weights):
    weights["model.layers.3.self_attn.o_proj.weight"][:] = torch.nan
    code, out, err = inspect(weights, "--json")

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    record = json.loads(out, parse_constant=refuse)
    assert (code, err, record["failed"]) == (1, "", True)
    assert [each["rule"] for each in record["findings"]] == ["non-finite"]
    assert set(record["findings"][0]) == {
        "severity",
        "rule",
        "tensor",
        "layer",
        "evidence",
        "remedy",
        "magnitude",
        "others",
    }
    assert len(record["tensors"]) == record["totals"]["tensors"] == 10
    assert [each["block"] for each in record["blocks"]] == list(range(BLOCKS))
    faulty = next(each for each in record["tensors"] if each["nan"])
    assert (faulty["name"], faulty["rms"], faulty["first_bad"]) == (
        "model.layers.3.self_attn.o_proj.weight",
        "nan",
        [0, 0],
    )


def test_top_option_limits_findings_and_names_the_rest(inspect, weights):
    for block in range(BLOCKS):
        weights[f"model.layers.{block}.self_attn.o_proj.weight"][block] = 0.0
    weights["model.norm.weight"][0] = 30.0
    weights["model.embed_tokens.weight"][:, 0] = 0.0
    code, out, _ = inspect(weights, "--top", 1)
    assert (code, out.count("WARN")) == (0, 1)
    assert "… and 2 more: pass --top 3" in out
    assert "model.layers.0.self_attn.o_proj.weight and 3 more of the same role" in inspect(weights)[1]
    assert inspect(weights, "--top", -1).code == 2


def test_control_characters_in_names_are_escaped(inspect, weights):
    evil = "model.layers.2.\x1b]0;owned\x07\r\n\x9b31m.weight"
    weights[evil] = torch.full((8, 8), torch.nan)
    code, out, _ = inspect(weights)
    assert code == 1
    assert "model.layers.2.␛]0;owned␇␍␊�31m.weight" in out
    assert not set("\x1b\x07\r\x9b") & set(out)
    record = inspect(weights, "--json").out
    assert record.isascii()
    assert not set("\x1b\x07\r\x9b") & set(record)
    assert json.loads(record)["findings"][0]["tensor"] == evil


def test_bad_input_exits_with_2(command, tmp_path):
    code, out, err = command("inspect", tmp_path / "none")
    assert (code, out) == (2, "")
    assert err.startswith("omninorm: ")
    assert err.count("\n") == 1
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    code, _, err = command("inspect", tmp_path)
    assert code == 2
    assert "pytorch_model.bin" in err


def test_run_folder_is_inspected(command, small, tmp_path):
    run = tmp_path / "run"
    assert command("train", *small, "--out", run).code == 0
    code, out, _ = command("inspect", run, "--json")
    record = json.loads(out)
    assert (code, record["totals"]["norm_eps"], record["failed"]) == (0, 1e-6, False)
    assert [each for each in record["findings"] if each["severity"] != "note"] == []
    (block,) = record["blocks"]
    assert block["stack"] == "blocks"
    assert min(block["attention_out"], block["feed_forward_out"], block["gain_median"]) > 0
    (checkpoint,) = (run / "checkpoints").glob("step-4")
    assert len(load_file(checkpoint / "model.safetensors")) == record["totals"]["tensors"]
