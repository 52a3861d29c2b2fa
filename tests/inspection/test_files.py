"""inspect_checkpoint opens every kind of checkpoint, and raises one clear error for each that cannot be read."""

from __future__ import annotations

import json
import os
import struct
import sys

import gguf
import pytest
import torch
from helpers.checkpoints import llama_tensors, save, transformers_model
from safetensors.torch import save_file

from omninorm.errors import MissingExtraError, RunError
from omninorm.inspection import inspect_checkpoint

BAD = "model.layers.2.mlp.up_proj.weight"


def faulty_tensors():
    tensors = llama_tensors()
    tensors[BAD][3, 5] = torch.nan
    return tensors


def failing(path):
    return [each.tensor for each in inspect_checkpoint(path).findings if each.severity == "fail"]


def shards(folder):
    """Two shards and their index."""
    tensors, names = faulty_tensors(), {}
    for number, half in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in half}, folder / file)
        names |= dict.fromkeys(half, file)
    write_index(folder, names)
    return names


def write_index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def write_gguf(path, tensors, quantized=()):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_block_count(4)
    for name, tensor in tensors.items():
        kind = gguf.GGMLQuantizationType.Q8_0 if name in quantized else None
        data = tensor.numpy() if kind is None else gguf.quantize(tensor.numpy(), kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_tensors():
    parts = {"self_attn.o_proj": "attn_output", "mlp.down_proj": "ffn_down", "mlp.up_proj": "ffn_up"}
    parts |= {"input_layernorm": "attn_norm", "model.layers": "blk", "model.embed_tokens": "token_embd"}
    tensors = {}
    for name, tensor in llama_tensors().items():
        for theirs, ours in parts.items():
            name = name.replace(theirs, ours)
        tensors[name] = tensor
    return tensors


def test_file_of_any_name_is_read(tmp_path):
    assert failing(save(faulty_tensors(), tmp_path / "weights")) == [BAD]


def test_shards_are_read_by_folder_by_index_and_without_an_index(tmp_path):
    names = shards(tmp_path)
    assert failing(tmp_path) == failing(tmp_path / "model.safetensors.index.json") == [BAD]
    assert len(inspect_checkpoint(tmp_path).tensors) == len(names)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert failing(tmp_path) == [BAD]


def test_shards_saved_by_transformers_are_read(tmp_path):
    model = transformers_model("Qwen3")
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight *= 100
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    found = [(each.rule, each.tensor) for each in inspect_checkpoint(tmp_path).findings if each.severity == "warn"]
    assert ("depth-outlier", "model.layers.2.self_attn.o_proj.weight") in found
    assert inspect_checkpoint(tmp_path).eps == model.config.rms_norm_eps


def test_run_folder_gives_its_newest_checkpoint(tmp_path):
    config = {"format": 1, "model": {"n_layers": 4, "norm": {"norm_eps": 1e-6}}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for step, tensors in ((9, llama_tensors()), (10, faulty_tensors())):
        folder = tmp_path / "checkpoints" / f"step-{step}"
        folder.mkdir(parents=True)
        save(tensors, folder / "model.safetensors")
        save_file({"moments": torch.full((4, 4), torch.nan)}, folder / "optimizer.safetensors")
    assert failing(tmp_path) == failing(tmp_path / "checkpoints" / "step-10") == [BAD]
    assert failing(tmp_path / "checkpoints" / "step-9") == []
    assert inspect_checkpoint(tmp_path / "checkpoints" / "step-9").eps == 1e-6


def test_quantized_gguf_is_measured_like_its_source(tmp_path):
    tensors = gguf_tensors()
    tensors["blk.2.attn_output.weight"] *= 100
    quantized = [name for name in tensors if "attn_output" in name]
    result = inspect_checkpoint(write_gguf(tmp_path / "model.gguf", tensors, quantized))
    warned = [(each.rule, each.tensor) for each in result.findings if each.severity == "warn"]
    assert warned == [("depth-outlier", "blk.2.attn_output.weight")]
    assert (result.eps, result.format) == (pytest.approx(1e-5), "gguf")
    assert result.totals()["dtypes"] == {"F32": 31, "Q8_0": 4}
    measured = next(each for each in result.tensors if each.name == "blk.1.attn_output.weight")
    want = tensors["blk.1.attn_output.weight"]
    assert measured.rms == pytest.approx(float(want.square().mean().sqrt()), rel=0.01)
    assert measured.shape == tuple(want.shape)
    assert inspect_checkpoint(tmp_path).verdict == result.verdict


def test_nan_in_a_gguf_file_is_found(tmp_path):
    tensors = gguf_tensors()
    tensors["blk.0.ffn_up.weight"][1, 2] = torch.nan
    assert failing(write_gguf(tmp_path / "model.gguf", tensors)) == ["blk.0.ffn_up.weight"]


def test_types_without_float_values_are_counted_but_not_measured(tmp_path):
    tensors = {
        **llama_tensors(),
        "counts": torch.arange(6),
        "flags": torch.ones(3, dtype=torch.bool),
        "packed": torch.zeros(4, 4, dtype=torch.uint8),
        "complex": torch.ones(4, dtype=torch.complex64),
        "small": (torch.randn(8, 8) * 0.1).to(torch.float8_e4m3fn),
        "scalar": torch.tensor(2.0),
        "nothing": torch.zeros(0, 4, dtype=torch.int32),
    }
    result = inspect_checkpoint(save(tensors, tmp_path / "a.safetensors"))
    assert {each.name for each in result.tensors if not each.measured} == {
        "counts",
        "flags",
        "packed",
        "complex",
        "nothing",
    }
    assert [(each.rule, each.tensor) for each in result.findings] == [("empty-tensor", "nothing")]
    found = {each.name: each for each in result.tensors}
    assert found["scalar"].max_abs == 2.0
    assert found["small"].rms == pytest.approx(float(tensors["small"].float().square().mean().sqrt()))
    assert result.totals()["bytes"] == sum(tensor.nbytes for tensor in tensors.values())


def refused(path, *parts, error=RunError):
    with pytest.raises(error) as caught:
        inspect_checkpoint(path)
    for part in parts:
        assert part in str(caught.value)


def test_missing_empty_and_foreign_paths_are_refused(tmp_path):
    refused(tmp_path / "none", "No such file or folder: ", str(tmp_path / "none"))
    refused(tmp_path, "an empty folder")
    (tmp_path / "README.md").write_text("hello")
    refused(tmp_path, "only README.md")
    refused(os.devnull, os.devnull, "neither")


@pytest.mark.parametrize("cut", [0, 3, 8, 100, 5000, -1])
def test_truncated_safetensors_file_is_refused(tmp_path, cut):
    path = save(llama_tensors(), tmp_path / "model.safetensors")
    path.write_bytes(path.read_bytes()[:cut])
    refused(tmp_path, "safetensors", str(path))


def test_file_without_tensors_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    refused(tmp_path, str(tmp_path), "single tensor")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "renamed"])
def test_pickle_is_refused_without_unpickling(tmp_path, name):
    class Trap:
        def __reduce__(self):
            return exec, ("raise SystemExit('unpickled')",)

    torch.save({"trap": Trap()}, tmp_path / name)
    refused(tmp_path / name, str(tmp_path / name), "pickle", "safetensors.torch.save_file")
    if name != "renamed":
        refused(tmp_path, "pickle", name)


def test_missing_shard_is_named(tmp_path):
    shards(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    refused(tmp_path, "model-00002-of-00002.safetensors")
    os.mkfifo(tmp_path / "model-00002-of-00002.safetensors")  # opening it would block
    refused(tmp_path, "model-00002-of-00002.safetensors")


def test_missing_shard_without_an_index_is_named(tmp_path):
    for number in (1, 3):
        save_file({f"part{number}": torch.randn(4, 4)}, tmp_path / f"model-{number:05d}-of-00003.safetensors")
    refused(tmp_path, "model-00002-of-00003.safetensors")


def test_tensor_missing_from_its_shard_is_named(tmp_path):
    write_index(tmp_path, {**shards(tmp_path), "lost.weight": "model-00001-of-00002.safetensors"})
    refused(tmp_path, "'lost.weight'", "index.json")


def test_tensor_missing_from_the_index_is_a_finding(tmp_path):
    names = shards(tmp_path)
    del names["model.norm.weight"]
    write_index(tmp_path, names)
    (finding,) = [each for each in inspect_checkpoint(tmp_path).findings if each.rule == "files"]
    assert "1 of the tensors in its files: model.norm.weight" in finding.evidence


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "..", ".", "", "a/b.safetensors", "a\0b", 7, None, ["x"]]
)
def test_index_that_names_files_elsewhere_is_refused(tmp_path, name):
    save(llama_tensors(), tmp_path / "outside.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    write_index(folder, {"model.norm.weight": name})
    refused(folder, "weight_map", repr(name)[:5])


@pytest.mark.parametrize("text", ["", "{", "[]", '{"weight_map": []}', '{"weight_map": {}}', "\xff", "[" * 100_000])
def test_damaged_index_is_refused(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_bytes(text.encode("latin-1"))
    refused(tmp_path, "model.safetensors.index.json")


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"rms_norm_eps": "x", "model": 3, "text_config": [], "num_hidden_layers": null}']
)
def test_damaged_config_is_only_a_finding(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    result = inspect_checkpoint(save(faulty_tensors(), tmp_path / "model.safetensors"))
    assert [each.tensor for each in result.findings if each.severity == "fail"] == [BAD]
    assert ["files"] * (len(text) < 5) == [each.rule for each in result.findings if each.rule == "files"]


def test_tensor_in_two_files_is_refused(tmp_path):
    for name in ("a", "b"):
        save_file({"same": torch.randn(4, 4)}, tmp_path / f"{name}.safetensors")
    refused(tmp_path, "'same'", "a.safetensors", "b.safetensors")


@pytest.mark.parametrize("cut", [2, 10, 24, 60, 150, 400, -64])
def test_truncated_gguf_file_is_refused(tmp_path, cut):
    path = write_gguf(tmp_path / "model.gguf", gguf_tensors())
    path.write_bytes(path.read_bytes()[:cut])
    refused(path, "GGUF", str(path))


def test_folder_with_several_gguf_models_is_refused(tmp_path):
    for name in ("a", "b"):
        write_gguf(tmp_path / f"{name}.gguf", {"x": torch.ones(4, 32)})
    refused(tmp_path, "2 (a.gguf, b.gguf)")


def test_split_gguf_model_is_read_and_a_missing_part_named(tmp_path):
    for number in (1, 2):
        write_gguf(tmp_path / f"m-{number:05d}-of-00002.gguf", {f"blk.{number - 1}.x.weight": torch.randn(4, 32)})
    assert len(inspect_checkpoint(tmp_path).tensors) == 2
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    refused(tmp_path, "m-00002-of-00002.gguf")


@pytest.mark.parametrize(("package", "file"), [("gguf", "model.gguf"), ("safetensors", "model.safetensors")])
def test_missing_package_is_named_with_its_extra(tmp_path, monkeypatch, package, file):
    write_gguf(tmp_path / "model.gguf", gguf_tensors())
    save(llama_tensors(), tmp_path / "model.safetensors")
    monkeypatch.setitem(sys.modules, package, None)
    refused(tmp_path / file, package, "[interop]", error=MissingExtraError)
