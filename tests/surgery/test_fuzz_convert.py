"""Damaged folders: convert and undo read them or raise OmninormError, within limits of time and memory, offline."""

from __future__ import annotations

import json
import shutil
import socket
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import torch
import transformers as hf
from helpers.mutations import bounded, cases, mutated_bytes, mutated_json, refuses_or_reads
from helpers.surgery_models import draw_vectors
from safetensors.torch import load_file, save_file

from omninorm.errors import ConfigError, OmninormError, RunError
from omninorm.surgery.build import _check_counts, _check_planned
from omninorm.surgery.convert import convert, undo
from omninorm.surgery.weight_files import PickledFile


def build() -> hf.PreTrainedModel:
    sizes = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 11,
    }
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, num_key_value_heads=1, max_position_embeddings=16))
    draw_vectors(model)
    return model


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in one file."""
    folder = tmp_path_factory.mktemp("source") / "in"
    build().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def converted(source: Path) -> Path:
    """The same, folded."""
    convert(source, source.parent / "out", "fold")
    return source.parent / "out"


def folded(folder: Path) -> None:
    """Fold without writing; fail if a limit was reached, which code that catches every exception would hide."""
    try:
        convert(folder, None, "fold")
    except OmninormError as error:
        cause: BaseException | None = error
        while cause is not None:
            assert not isinstance(cause, MemoryError), cause
            assert not any(limit in str(cause) for limit in ("took longer than", "allocate")), cause
            cause = cause.__cause__ or cause.__context__
        raise


def undone(folder: Path) -> None:
    try:
        undo(folder, folder.parent / "back")
    finally:
        shutil.rmtree(folder.parent / "back", ignore_errors=True)


def copy(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target))


def fuzz(read: Any, folder: Path, name: str, count: int, mutate: Any) -> int:
    """Damage one file of the folder; return how many of the cases were refused."""
    refused = 0
    for case in range(count):
        damaged = mutate(case)
        (folder / name).write_bytes(damaged)
        with bounded(len(damaged)):
            refused += not refuses_or_reads(read, folder)
    return refused


def test_damaged_config_files_are_read_or_refused(source: Path, tmp_path: Path) -> None:
    folder, good = copy(source, tmp_path / "in"), json.loads((source / "config.json").read_text())
    count = cases(20)
    assert count / 5 < fuzz(folded, folder, "config.json", count, lambda case: mutated_json(good, case)) < count


def test_damaged_weights_are_read_or_refused(source: Path, tmp_path: Path) -> None:
    folder, good = copy(source, tmp_path / "in"), (source / "model.safetensors").read_bytes()
    size = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + size])

    def mutate(case: int) -> bytes:
        if case % 2:
            return mutated_bytes(good, case)
        text = mutated_json(header, case)
        return len(text).to_bytes(8, "little") + text + good[8 + size :]

    count = cases(20)
    assert count / 5 < fuzz(folded, folder, "model.safetensors", count, mutate) < count


def test_damaged_indices_are_read_or_refused(source: Path, tmp_path: Path) -> None:
    folder = copy(source, tmp_path / "in")
    index = {
        "metadata": {"total_size": 100},
        "weight_map": dict.fromkeys(load_file(folder / "model.safetensors"), "model.safetensors"),
    }
    count = cases(20)
    name = "model.safetensors.index.json"
    assert count / 10 < fuzz(folded, folder, name, count, lambda case: mutated_json(index, case)) < count


@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_pickles_are_read_or_refused(source: Path, tmp_path: Path, zipped: bool) -> None:
    folder = copy(source, tmp_path / "in")
    name = "pytorch_model.bin"
    torch.save(load_file(folder / "model.safetensors"), folder / name, _use_new_zipfile_serialization=zipped)
    (folder / "model.safetensors").unlink()
    assert refuses_or_reads(folded, folder), "the intact file"
    # Addresses are part of the bytes, so no two runs damage them alike.
    good, count = (folder / name).read_bytes(), cases(20)
    assert count / 5 < fuzz(folded, folder, name, count, lambda case: mutated_bytes(good, case))


def test_damaged_proofs_are_read_or_refused(converted: Path, tmp_path: Path) -> None:
    folder, good = copy(converted, tmp_path / "out"), json.loads((converted / "surgery.json").read_text())
    count = cases(40)
    assert count / 10 < fuzz(undone, folder, "surgery.json", count, lambda case: mutated_json(good, case)) < count


def test_damaged_saved_weights_are_refused(converted: Path, tmp_path: Path) -> None:
    """But for damage to the file's order or padding, an undo that succeeds restores the hashes from before."""
    folder, good = copy(converted, tmp_path / "out"), (converted / "surgery_delta.safetensors").read_bytes()
    assert refuses_or_reads(undone, folder), "the intact file"
    count = cases(40)
    assert fuzz(undone, folder, "surgery_delta.safetensors", count, lambda case: mutated_bytes(good, case)) > count / 2


# One by one -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "named"),
    [
        ("hidden_size", 10**18, "LlamaForCausalLM"), ("hidden_size", 10**9, "model.embed_tokens.weight"),
        ("vocab_size", 10**18, "LlamaForCausalLM"), ("intermediate_size", 10**12, "mlp.down_proj.weight"),
        ("num_hidden_layers", 10**5, "number of layers"), ("num_hidden_layers", 10**10, "num_hidden_layers"),
        ("num_hidden_layers", 10**23, "num_hidden_layers"), ("num_attention_heads", 10**18, "num_attention_heads"),
        ("num_labels", 10**9, "num_labels"), ("architectures", [["LlamaForCausalLM"]], "LlamaForCausalLM"),
        ("architectures", "ß" * 10_000, "architectures"), ("model_type", {"a": 1}, "model_type"),
        ("hidden_act", "ß" * 10_000, "LlamaForCausalLM"),
    ],
)  # fmt: skip
def test_sizes_and_types_that_do_not_fit_the_weights_are_refused_before_allocation(
    source: Path, tmp_path: Path, name: str, value: object, named: str
) -> None:
    folder = copy(source, tmp_path / "in")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {name: value}))
    with bounded(0), pytest.raises(OmninormError) as error:
        folded(folder)
    assert named in str(error.value)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [("num_hidden_layers", 2097153, "2097153"), ("num_labels", 10**23, "1" + "0" * 23), ("depths", [1, 2**30], "1073741824"),
     ("n_head", 10**400, "401 digits"), ("num_experts", 1e300, "1e+300"), ("n_routed_experts", 2**21, "2097152")],
)  # fmt: skip
def test_count_that_no_model_has_is_refused_with_its_exact_value(
    source: Path, tmp_path: Path, name: str, value: object, shown: str
) -> None:
    folder = copy(source, tmp_path / "in")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {name: value}))
    with pytest.raises(ConfigError) as error:
        folded(folder)
    assert name in error.value.invariant
    assert shown in str(error.value.received)
    assert error.value.remedy == "check this setting"


@pytest.mark.parametrize(
    "name",
    ["attn_block_size", "lm_head_flops", "block_size", "label_smoothing_steps", "num_gpu_blocks", "head_start_tokens",
     "layer_hash", "group_size", "max_depth", "experts_trained_tokens", "level_of_noise"],
)  # fmt: skip
def test_large_numbers_that_count_nothing_are_no_fault(name: str) -> None:
    _check_counts({name: 2**31, "nested": [{name: 10**18}]}, "")


def test_size_larger_than_an_old_pickle_is_refused_before_allocation(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(77)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    file, good = PickledFile(tmp_path / "old.bin"), (tmp_path / "old.bin").read_bytes()
    assert torch.equal(file.tensor("w"), torch.ones(77))
    assert good.count(b"KM") == 2, "77 as the elements of the storage, and as the size of the tensor"
    file.path.write_bytes(good.replace(b"KM", b"J" + (2**31 - 1).to_bytes(4, "little")))
    with bounded(len(good)), pytest.raises(RunError, match="a size in it is larger than the file"):
        file.entries()


def test_large_unknown_settings_do_not_keep_a_model_from_being_folded(source: Path, tmp_path: Path) -> None:
    folder = copy(source, tmp_path / "in")
    config = json.loads((folder / "config.json").read_text()) | {"attn_block_size": 2097152, "lm_head_flops": 10**9}
    (folder / "config.json").write_text(json.dumps(config))
    folded(folder)


@pytest.mark.parametrize(("memory", "refused"), [(2**20, True), (2**40, False), (None, True)])
def test_tables_may_take_a_quarter_of_the_memory_and_a_gigabyte_on_any_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: int | None, refused: bool
) -> None:
    """GPT-Neo has a causal mask per layer, of a byte per pair of positions."""
    config = hf.GPTNeoConfig(
        vocab_size=11, hidden_size=8, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]],
        max_position_embeddings=16384, architectures=["GPTNeoForCausalLM"],
    )  # fmt: skip
    monkeypatch.setattr("omninorm.surgery.build.memory_limit", lambda: memory)
    with torch.device("meta"):
        planned = hf.GPTNeoForCausalLM(config)
    tables = sum(each.numel() * each.element_size() for each in planned.buffers())
    assert 2**29 <= tables < 2**30, "of which the limit was 2**28"
    checkpoint = SimpleNamespace(names=lambda: list(planned.state_dict()), files={})
    _check_planned(hf.GPTNeoForCausalLM, config, checkpoint, lambda _: None)
    config.max_position_embeddings = 32768
    with pytest.raises(ConfigError, match=r"2\.15 GB") if refused else nullcontext():
        _check_planned(hf.GPTNeoForCausalLM, config, checkpoint, lambda _: None)


def test_large_context_of_a_model_without_position_tables_is_no_fault(source: Path, tmp_path: Path) -> None:
    folder = copy(source, tmp_path / "in")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 10**8}))
    with bounded(0):
        folded(folder)


def test_config_with_infinity_survives_the_way_there_and_back(source: Path, tmp_path: Path) -> None:
    """Mamba-2 writes time_step_limit as [0.0, Infinity]."""
    folder = copy(source, tmp_path / "in")
    config = json.loads((folder / "config.json").read_text()) | {"time_step_limit": [0.0, float("inf")]}
    (folder / "config.json").write_text(json.dumps(config))
    convert(folder, tmp_path / "out", "fold")
    undo(tmp_path / "out", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == config


def unreachable(*_: object, **__: object) -> NoReturn:
    raise AssertionError("the network was used")


@pytest.mark.parametrize(
    ("kind", "architecture", "backbone"),
    [
        ("dpt", "DPTForDepthEstimation", "facebook/dinov2-base"),
        ("upernet", "UperNetForSemanticSegmentation", "microsoft/swin-tiny-patch4-window7-224"),
        ("detr", "DetrForObjectDetection", "microsoft/resnet-50"),
    ],
)
def test_missing_backbone_is_named_without_using_the_network(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, architecture: str, backbone: str
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # as on a user's machine
    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    monkeypatch.setattr(socket.socket, "connect", unreachable)
    folder = copy(source, tmp_path / "in")
    config = {"model_type": kind, "architectures": [architecture], "backbone": backbone, "use_timm_backbone": False}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(RunError, match=f"'{backbone}'"):
        folded(folder)
    assert constants.HF_HUB_OFFLINE is False, "restored"


def test_loop_of_links_and_a_very_deep_folder_are_no_crash(source: Path, tmp_path: Path) -> None:
    folder = copy(source, tmp_path / "in")
    deep = folder
    for _ in range(1000):
        deep = deep / "d"
        deep.mkdir()
    try:
        folded(folder)
    finally:
        while deep != folder:  # pytest could not remove it
            deep.rmdir()
            deep = deep.parent
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("model.safetensors")
    with pytest.raises(RunError, match=r"model\.safetensors"):
        folded(folder)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(RunError, match=r"loop"):
        folded(tmp_path / "loop")


def test_pickled_view_larger_than_its_storage_is_refused(source: Path, tmp_path: Path) -> None:
    folder = copy(source, tmp_path / "in")
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": torch.ones(1).expand(2**40)}, folder / "pytorch_model.bin")
    with bounded(0), pytest.raises(RunError, match=r"'model\.norm\.weight'"):
        folded(folder)


@pytest.mark.parametrize("size", [0, -3, 10**6, True, "224", [4, 4], None])
def test_image_size_that_no_model_takes_is_refused(tmp_path: Path, size: object) -> None:
    """A convolutional network's weights fit any image."""
    config = hf.ConvNextConfig(
        hidden_sizes=[4, 4], depths=[1, 1], num_stages=2, architectures=["ConvNextForImageClassification"]
    )
    hf.ConvNextForImageClassification(config).save_pretrained(tmp_path / "in")
    values = json.loads((tmp_path / "in" / "config.json").read_text()) | {"image_size": size}
    (tmp_path / "in" / "config.json").write_text(json.dumps(values))
    with bounded(0), pytest.raises(OmninormError, match="image_size"):
        folded(tmp_path / "in")


@pytest.mark.parametrize(
    ("prefix", "word"), [("_orig_mod.", "compiled"), ("base_model.model.lora_A.", None), ("x.", "belong to the same")]
)
def test_foreign_names_are_explained(source: Path, tmp_path: Path, prefix: str, word: str | None) -> None:
    folder = copy(source, tmp_path / "in")
    weights = {prefix + name: value for name, value in load_file(folder / "model.safetensors").items()}
    if word is None:
        weights = {name.replace("lora_A.", "") + ".lora_A.weight": value for name, value in weights.items()}
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(RunError, match=word or "adapter"):
        folded(folder)


def test_folder_with_an_adapter_alone_is_explained(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(RunError, match="adapter"):
        folded(tmp_path)
