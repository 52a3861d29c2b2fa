"""Damaged checkpoints: compare_weights compares them or raises OmninormError, within limits of time and memory."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from helpers.mutations import bounded, cases, mutated_bytes, mutated_json, refuses_or_reads
from helpers.tiny_files import gguf_file, hugging_face
from safetensors.torch import load_file, save, save_file

from omninorm.inspection import compare_weights


def compared(a: Path, b: Path) -> None:
    """Everything that the command line makes of a comparison."""
    json.dumps(compare_weights(a, b).to_record(), allow_nan=False)


def whole_folder(path: Path) -> Path:
    """A Llama folder in one file."""
    path.mkdir()
    hugging_face(path, tokenizer=False)
    tensors = {name: value for file in path.glob("model-*.safetensors") for name, value in load_file(file).items()}
    for file in (*path.glob("model-*.safetensors"), path / "model.safetensors.index.json"):
        file.unlink()
    save_file(tensors, path / "model.safetensors")
    return path


def test_damaged_gguf_files_are_compared_or_refused(tmp_path: Path) -> None:
    folder = whole_folder(tmp_path / "a")
    good, refused = gguf_file(tmp_path / "good.gguf").read_bytes(), 0
    path = tmp_path / "damaged.gguf"
    for case in range(cases(60)):
        path.write_bytes(mutated_bytes(good, case))
        with bounded(len(good)):
            refused += not refuses_or_reads(compared, folder, path)
    assert 5 < refused < cases(60)


def test_damaged_safetensors_files_are_compared_or_refused(tmp_path: Path) -> None:
    folder, other = whole_folder(tmp_path / "a"), whole_folder(tmp_path / "b")
    good, refused = save(load_file(other / "model.safetensors")), 0
    size = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + size])
    for case in range(cases(60)):
        text = mutated_json(header, case)
        damaged = len(text).to_bytes(8, "little") + text + good[8 + size :] if case % 2 else mutated_bytes(good, case)
        (other / "model.safetensors").write_bytes(damaged)
        with bounded(len(damaged)):
            refused += not refuses_or_reads(compared, folder, other)
    assert 5 < refused < cases(60)


def test_damaged_settings_are_compared_or_refused(tmp_path: Path) -> None:
    folder, other = whole_folder(tmp_path / "a"), whole_folder(tmp_path / "b")
    config = json.loads((other / "config.json").read_text()) | {"quantization": {"group_size": 32, "bits": 4}}
    compared_count = 0
    for case in range(cases(60)):
        (other / "config.json").write_bytes(mutated_json(config, case))
        with bounded((other / "config.json").stat().st_size):
            compared_count += refuses_or_reads(compared, folder, other)
    assert compared_count > cases(60) / 2


def test_quantized_parts_that_do_not_fit_are_not_compared(tmp_path: Path) -> None:
    tensors = {
        "a.weight": torch.ones(4, 3, dtype=torch.uint32),
        "a.scales": torch.ones(4, 7),
        "b.weight": torch.ones(2, 2),
    }
    for number, biases in enumerate((torch.ones(4, 7), torch.ones(3, 7), torch.ones(()))):
        path = tmp_path / f"{number}.safetensors"
        save_file({**tensors, "a.biases": biases}, path)
        found = compare_weights(path, path)
        assert ("a.weight", "it is stored as U32") in {(each.role, each.reason) for each in found.not_compared}
