"""Damaged checkpoints: inspect_checkpoint reads them or raises OmninormError, within limits of time and memory."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from helpers.mutations import HOSTILE, bounded, cases, mutated_bytes, mutated_json, refuses_or_reads
from safetensors.torch import save, save_file

from omninorm.errors import OmninormError
from omninorm.inspection import inspect_checkpoint

NAMES = [f"model.layers.{block}.{part}.weight" for block in (0, 1) for part in ("mlp.down_proj", "input_layernorm")]
TENSORS = {"model.embed_tokens.weight": torch.ones(6, 4)} | {
    name: torch.ones(4, 4) if "mlp" in name else torch.ones(4) for name in NAMES
}
CONFIG = {
    "model_type": "gemma", "architectures": ["GemmaForCausalLM"], "num_hidden_layers": 2, "hidden_size": 4,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "text_config": {"model_type": "gemma3_text", "n_layer": 2},
    "model": {"norm": {"norm_eps": 1e-6}},
}  # fmt: skip


def inspected(path: Path) -> None:
    """Everything that the command line makes of a checkpoint."""
    json.dumps(inspect_checkpoint(path).to_record(), allow_nan=False)


def write_shards(folder: Path) -> dict[str, Any]:
    weight_map: dict[str, str] = {}
    for number, names in enumerate((list(TENSORS)[::2], list(TENSORS)[1::2]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: TENSORS[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    return {"metadata": {"total_size": 100}, "weight_map": weight_map}


def test_damaged_config_files_are_read_or_refused(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    read = 0
    for case in range(cases(80)):
        (tmp_path / "config.json").write_bytes(mutated_json(CONFIG, case))
        with bounded((tmp_path / "config.json").stat().st_size):
            read += refuses_or_reads(inspected, tmp_path)
    assert read > cases(80) / 2, "the weights can be inspected without a config"


def test_damaged_indices_are_read_or_refused(tmp_path: Path) -> None:
    index, refused = write_shards(tmp_path), 0
    for case in range(cases(80)):
        (tmp_path / "model.safetensors.index.json").write_bytes(mutated_json(index, case))
        with bounded((tmp_path / "model.safetensors.index.json").stat().st_size):
            refused += not refuses_or_reads(inspected, tmp_path)
    assert 10 < refused < cases(80)


def test_damaged_safetensors_files_are_read_or_refused(tmp_path: Path) -> None:
    good, refused = save(TENSORS), 0
    size = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + size])
    for case in range(cases(80)):
        text = mutated_json(header, case)
        damaged = len(text).to_bytes(8, "little") + text + good[8 + size :] if case % 2 else mutated_bytes(good, case)
        (tmp_path / "model.safetensors").write_bytes(damaged)
        with bounded(len(damaged)):
            refused += not refuses_or_reads(inspected, tmp_path)
    assert 10 < refused < cases(80)


def gguf_bytes(folder: Path) -> bytes:
    """A small GGUF file with settings of every type, arrays of numbers and of strings, and a quantized tensor."""
    writer = gguf.GGUFWriter(folder / "good.gguf", "llama")
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_token_list(["a", "b", "c"])
    writer.add_token_scores([0.0, 1.0, 2.0])
    for name in ("blk.0.attn_output.weight", "blk.1.attn_output.weight"):
        data = gguf.quantize(torch.randn(4, 32).numpy(), gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("blk.0.attn_norm.weight", torch.ones(32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return (folder / "good.gguf").read_bytes()


def test_damaged_gguf_files_are_read_or_refused(tmp_path: Path) -> None:
    good, refused = gguf_bytes(tmp_path), 0
    path = tmp_path / "damaged.gguf"
    for case in range(cases(150)):
        path.write_bytes(mutated_bytes(good, case))
        with bounded(len(good)):
            refused += not refuses_or_reads(inspected, path)
    assert 30 < refused < cases(150)


def test_huge_numbers_in_a_gguf_header_are_read_or_refused_at_once(tmp_path: Path) -> None:
    """At any place: counts of tensors and settings, lengths of names and arrays, sizes and offsets."""
    good = gguf_bytes(tmp_path)
    path = tmp_path / "damaged.gguf"
    end, read = good.index(b"blk.0.attn_norm") + 60, 0
    for case in range(cases(150)):
        chance = random.Random(case)
        place, number = chance.randrange(8, end), chance.choice((0, 2**31, 2**63, 2**64 - 1))
        path.write_bytes(good[:place] + number.to_bytes(8, "little") + good[place + 8 :])
        with bounded(len(good)):
            read += refuses_or_reads(inspected, path)
    assert 0 < read < cases(150)


@pytest.mark.parametrize("count", [10**7, 2**60])
@pytest.mark.parametrize("kind", [8, 9], ids=["strings", "arrays"])
def test_huge_array_is_refused_although_the_file_is_long_enough(tmp_path: Path, kind: int, count: int) -> None:
    """The rest of the file is zeros, which can be read as empty strings and arrays."""
    head = struct.pack("<4sIQQQ1sIIQ", b"GGUF", 3, 0, 1, 1, b"a", 9, kind, count)
    path = tmp_path / "damaged.gguf"
    path.write_bytes(head)
    with path.open("r+b") as file:
        file.truncate(2**30)  # sparse: takes no space
    with bounded(2**30), pytest.raises(OmninormError, match=f"{count} items"):
        inspect_checkpoint(path)


@pytest.mark.parametrize("name", [value for value in HOSTILE if isinstance(value, str)])
def test_index_with_a_hostile_file_name_is_refused_in_one_sentence(tmp_path: Path, name: str) -> None:
    index = {"weight_map": {"model.norm.weight": name}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert not refuses_or_reads(inspected, tmp_path)


def test_loop_of_links_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to("model.safetensors")
    for path in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(OmninormError, match=r"model\.safetensors"):
            inspect_checkpoint(path)


def test_json_beyond_its_limit_is_refused_unread(tmp_path: Path) -> None:
    with open(tmp_path / "model.safetensors.index.json", "wb") as file:
        file.truncate(2**30)  # sparse: takes no space
    with bounded(0), pytest.raises(OmninormError, match="1073741824 bytes"):
        inspect_checkpoint(tmp_path)
