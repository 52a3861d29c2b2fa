"""convert and undo: the new folder loads in plain transformers, the old one is untouched, bad ones are refused."""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from helpers import surgery_models as subjects
from safetensors.torch import load_file, save_file

from omninorm.cli import main
from omninorm.errors import ConfigError, OmninormError, RunError
from omninorm.surgery import rotate
from omninorm.surgery.convert import convert, undo
from omninorm.surgery.streamed_map import _COLUMNS

KINDS = {
    "gemma": hf.GemmaForCausalLM,
    "gpt2": hf.GPT2LMHeadModel,
    "qwen3": hf.Qwen3ForCausalLM,
    "llama": hf.LlamaForCausalLM,
    "opt": hf.OPTForCausalLM,
    "vit": hf.ViTForImageClassification,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folders with a random model and a tokenizer's file, each made once."""

    @functools.cache
    def make(name: str, dtype: torch.dtype, shards: str) -> Path:
        folder = tmp_path_factory.mktemp("saved") / "in"
        subjects.build(name, dtype).save_pretrained(folder, max_shard_size=shards)
        (folder / "tokenizer.json").write_text("{}")
        return folder

    return make


@pytest.fixture
def save(saved: Callable[..., Path]) -> Callable[..., dict[str, bytes]]:
    """Copies such a folder to another place; returns its bytes."""

    def copy(
        folder: Path, name: str = "llama", dtype: torch.dtype = torch.float32, shards: str = "1GB"
    ) -> dict[str, bytes]:
        shutil.copytree(saved(name, dtype, shards), folder)
        return content(folder)

    return copy


@pytest.fixture(scope="module")
def converted(saved: Callable[..., Path]) -> Path:
    """A Llama that was folded once; only to be copied."""
    source = saved("llama", torch.float32, "1GB")
    convert(source, source.parent / "out", "fold")
    return source.parent / "out"


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in folder.glob("model*.safetensors") for name, value in load_file(path).items()}


def logits(folder: Path, name: str) -> torch.Tensor:
    model = KINDS[name].from_pretrained(folder).eval()
    (probe,) = subjects.inputs(name)
    with torch.no_grad():
        return (
            model(**{key: value.to(model.dtype) for key, value in probe.items()})
            if isinstance(probe, dict)
            else model(probe)
        ).logits


@pytest.mark.parametrize(
    ("name", "operation"),
    [
        ("llama", "fold"),
        ("gpt2", "fold"),
        ("gpt2", "center"),
        ("opt", "center"),
        ("vit", "center"),
        ("gpt2", "fold+center"),
        ("vit", "fold+center"),
        ("llama", "fold+center"),
        ("llama", "rotate"),
        ("qwen3", "rotate"),
        ("gemma", "rotate"),
        ("gpt2", "rotate"),
    ],
)
def test_converted_folder_gives_the_same_logits_and_is_undone_bit_for_bit(
    save: Any, tmp_path: Path, name: str, operation: str
) -> None:
    before = save(tmp_path / "in", name)
    done = convert(tmp_path / "in", tmp_path / "out", operation)
    assert done.changed
    assert done.error <= 1e-10
    assert done.rounded <= 1e-5
    assert content(tmp_path / "in") == before, "the original is only read"
    expected, got = logits(tmp_path / "in", name), logits(tmp_path / "out", name)
    assert float((expected - got).abs().max()) <= 1e-4
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    proof = json.loads((tmp_path / "out" / "surgery.json").read_text())
    assert proof["error"] == done.error
    assert proof["before_sha256"] != proof["after_sha256"]
    assert proof["changed_tensors"]

    undo(tmp_path / "out", tmp_path / "back")
    one, other = tensors(tmp_path / "in"), tensors(tmp_path / "back")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads(before["config.json"])
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == sorted(before)


def test_folded_and_centered_checkpoint_has_unit_gains_and_zero_mean_writers(save: Any, tmp_path: Path) -> None:
    save(tmp_path / "in", "gpt2")
    done = convert(tmp_path / "in", tmp_path / "out", "fold+center")
    assert done.error <= 1e-10
    weights = tensors(tmp_path / "out")
    assert torch.equal(weights["transformer.h.0.ln_1.weight"], torch.ones(weights["transformer.wte.weight"].shape[1]))
    assert not weights["transformer.h.0.ln_1.bias"].any()
    assert weights["transformer.wte.weight"].mean(1).abs().max() <= 1e-6
    assert weights["transformer.h.0.attn.c_proj.weight"].mean(1).abs().max() <= 1e-6
    assert "into transformer.h.0.attn.c_attn; LayerNorm that equals RMSNorm" in done.changed["transformer.h.0.ln_1"]


def test_fold_and_center_of_a_model_without_layernorm_folds_and_reports_why_nothing_is_centered(
    save: Any, tmp_path: Path
) -> None:
    save(tmp_path / "in", "llama")
    done = convert(tmp_path / "in", None, "fold+center")
    assert done.changed == convert(tmp_path / "in", None, "fold").changed
    assert "no LayerNorm" in done.refused["LlamaForCausalLM"]


@pytest.mark.parametrize("operation", ["fold", "center"])
def test_a_norm_whose_reader_has_no_bias_is_refused_with_the_names_of_both(
    save: Any, tmp_path: Path, operation: str
) -> None:
    save(tmp_path / "in", "gpt2")
    refused = convert(tmp_path / "in", None, operation).refused
    assert refused["transformer.ln_f"] == (
        "its β is not zero, and lm_head, which consumes its output, has no bias to take it"
    )


def test_sharded_bfloat16_model_is_converted_and_undone(save: Any, tmp_path: Path) -> None:
    save(tmp_path / "in", "llama", torch.bfloat16, shards="20KB")
    assert (tmp_path / "in" / "model.safetensors.index.json").exists()
    done = convert(tmp_path / "in", tmp_path / "out", "fold")
    assert done.error <= 1e-10
    assert {value.dtype for value in tensors(tmp_path / "out").values()} == {torch.bfloat16}
    undo(tmp_path / "out", tmp_path / "back")
    one, other = tensors(tmp_path / "in"), tensors(tmp_path / "back")
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("kind", ["hadamard", "random"])
@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_checkpoint_is_rotated_as_a_model_in_memory_is(save: Any, tmp_path: Path, name: str, kind: str) -> None:
    """Gemma's head is tied and its gain varies, so the head becomes a tensor of its own."""
    save(tmp_path / "in", name, torch.bfloat16, shards="20KB")
    done = convert(tmp_path / "in", tmp_path / "out", "rotate", kind=kind)
    assert done.refused == {}
    assert done.error <= 1e-12
    model = KINDS[name].from_pretrained(tmp_path / "in", dtype=torch.bfloat16)
    changed = rotate(model, kind=kind).changed
    assert changed == done.changed
    written, expected = tensors(tmp_path / "out"), model.state_dict()
    assert written.keys() == expected.keys()
    for key, value in expected.items():
        # Both are rounded once, from float64 values that may differ in their last bits.
        apart = (written[key].float() - value.float()).abs()
        assert float((apart > 0).float().mean()) <= 1e-3, key
        assert torch.all(apart <= value.float().abs() * 2**-7), key
    assert json.loads((tmp_path / "out" / "surgery.json").read_text())["rotation"] == kind


def test_checkpoint_with_layer_norms_keeps_its_stream_and_rotates_its_heads(save: Any, tmp_path: Path) -> None:
    """Its class has LayerNorm, which subtracts the mean of a rotated stream too."""
    save(tmp_path / "in", "gpt2")
    done = convert(tmp_path / "in", None, "rotate")
    assert [name.split(" (")[0] for name in done.refused] == ["residual stream"]
    assert set(done.changed) == {
        f"transformer.h.{block}.attn.{own}" for block in (0, 1) for own in ("c_attn", "c_attn.bias", "c_proj")
    }


def test_unknown_rotation_is_refused(save: Any, tmp_path: Path) -> None:
    save(tmp_path / "in")
    with pytest.raises(ConfigError, match="hadamard, random"):
        convert(tmp_path / "in", None, "rotate", kind="givens")


def test_dry_run_writes_nothing(save: Any, tmp_path: Path) -> None:
    save(tmp_path / "in")
    assert convert(tmp_path / "in", None, "fold").changed
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_undo_without_saved_weights_or_after_changes_is_refused(save: Any, converted: Path, tmp_path: Path) -> None:
    save(tmp_path / "in")
    shutil.copytree(converted, tmp_path / "out")
    (tmp_path / "out" / "surgery_delta.safetensors").unlink()
    with pytest.raises(RunError, match=r"surgery_delta\.safetensors.* is missing"):
        undo(tmp_path / "out", tmp_path / "back")
    shutil.copytree(converted, tmp_path / "kept")
    weights = load_file(tmp_path / "kept" / "model.safetensors")
    weights["model.embed_tokens.weight"][0, 0] += 1
    save_file(weights, tmp_path / "kept" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunError, match=r"Cannot undo: model\.embed_tokens\.weight"):
        undo(tmp_path / "kept", tmp_path / "back")
    with pytest.raises(RunError, match=r"surgery\.json"):
        undo(tmp_path / "in", tmp_path / "back")
    assert not (tmp_path / "back").exists()


class Harmful:
    """Unpickled, it would end the tests."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('unpickled')",)


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_tensors_become_safetensors(save: Any, tmp_path: Path, shards: int, zipped: bool) -> None:
    save(tmp_path / "in")
    before, expected = tensors(tmp_path / "in"), logits(tmp_path / "in", "llama")
    (tmp_path / "in" / "model.safetensors").unlink()
    names = sorted(before)
    weight_map = {}
    for shard in range(shards):
        file = "pytorch_model.bin" if shards == 1 else f"pytorch_model-{shard + 1:05}-of-{shards:05}.bin"
        part = {name: before[name] for name in names[shard::shards]}
        torch.save(part, tmp_path / "in" / file, _use_new_zipfile_serialization=zipped)
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (tmp_path / "in" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    done = convert(tmp_path / "in", tmp_path / "out", "fold")
    assert done.error <= 1e-10
    assert not list((tmp_path / "out").glob("*.bin*"))
    assert float((expected - logits(tmp_path / "out", "llama")).abs().max()) <= 1e-4
    undo(tmp_path / "out", tmp_path / "back")
    after = tensors(tmp_path / "back")
    assert after.keys() == before.keys()
    assert all(torch.equal(before[name], after[name]) for name in names)


def damage(folder: Path, how: str) -> None:
    weights = folder / "model.safetensors"
    config = json.loads((folder / "config.json").read_text())
    match how:
        case "no config":
            (folder / "config.json").unlink()
        case "no JSON":
            (folder / "config.json").write_text("{")
        case "pickled":
            weights.rename(folder / "pytorch_model.bin")
        case "pickled code":
            weights.unlink()
            torch.save({"model.norm.weight": torch.ones(3), "more": Harmful()}, folder / "pytorch_model.bin")
        case "a pickled list":
            weights.unlink()
            torch.save([torch.ones(3)], folder / "pytorch_model.bin")
        case "a pickled number":
            weights.unlink()
            torch.save({"model.norm.weight": torch.ones(3), "step": 3}, folder / "pytorch_model.bin")
        case "a truncated pickle":
            torch.save(load_file(weights), folder / "pytorch_model.bin")
            content = (folder / "pytorch_model.bin").read_bytes()
            (folder / "pytorch_model.bin").write_bytes(content[: len(content) // 2])
            weights.unlink()
        case "pickled under another name":
            weights.rename(folder / "weights.pt")
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:5000])
        case "no header":
            weights.write_bytes(b"\xff" * 40)
        case "a link outside":
            shutil.move(weights, folder.parent / "elsewhere.safetensors")
            weights.symlink_to(folder.parent / "elsewhere.safetensors")
        case "a missing shard":
            index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        case "a shard with an overlong name":
            index = {"weight_map": {"a": "m" * 5000}}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        case "no type":
            (folder / "config.json").write_text(json.dumps({**config, "model_type": []}))
        case "a tensor in two files":
            shutil.copyfile(weights, folder / "model-2.safetensors")
            index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        case "a missing tensor":
            found = load_file(weights)
            del found["model.norm.weight"]
            save_file(found, weights, metadata={"format": "pt"})
        case "an unknown tensor":
            save_file({**load_file(weights), "strange": torch.zeros(3)}, weights, metadata={"format": "pt"})
        case "an unknown class":
            (folder / "config.json").write_text(json.dumps({**config, "architectures": ["Strange"]}))
        case "code of its own":
            (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "x.Y"}}))
        case "quantized":
            (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"bits": 4}}))


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ("no config", "config.json"), ("no JSON", "config.json must be JSON"), ("pickled", "pytorch_model.bin"),
        ("pickled code", "pytorch_model.bin"), ("a pickled list", "a list"), ("a pickled number", "'step'"),
        ("a truncated pickle", "pytorch_model.bin"), ("pickled under another name", "weights.pt"),
        ("truncated", "model.safetensors"), ("no header", "model.safetensors"), ("a link outside", "model.safetensors"),
        ("a missing shard", "model-00001-of-00002.safetensors"), ("a shard with an overlong name", "mmm"),
        ("no type", "got []"), ("a tensor in two files", "model-2.safetensors"),
        ("a missing tensor", "missing keys: model.norm.weight"), ("an unknown tensor", "unexpected keys: strange"),
        ("an unknown class", "'Strange'"), ("code of its own", "LlamaForCausalLM"), ("quantized", "quantization_config"),
    ],
)  # fmt: skip
def test_damaged_folder_is_refused_naming_the_part_and_nothing_is_written(
    save: Any, tmp_path: Path, how: str, named: str
) -> None:
    save(tmp_path / "in")
    damage(tmp_path / "in", how)
    before = content(tmp_path / "in")
    with pytest.raises(OmninormError) as caught:
        convert(tmp_path / "in", tmp_path / "out", "fold")
    assert named in str(caught.value)
    assert content(tmp_path / "in") == before
    assert {path.name for path in tmp_path.iterdir()} <= {"in", "elsewhere.safetensors"}


def test_existing_target_and_full_disk_leave_nothing(
    save: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "in")
    (tmp_path / "out").mkdir()
    with pytest.raises(RunError, match=f"{tmp_path / 'out'} already exists"):
        convert(tmp_path / "in", tmp_path / "out", "fold")
    (tmp_path / "out").rmdir()

    written = room = 0

    def full(descriptor: int, content: object) -> None:
        """A disk with room for some pieces."""
        nonlocal written
        written += 1
        if written > room:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("omninorm.surgery.writer.write_all", full)
    for pieces in (0, 7):
        written, room = 0, pieces
        with pytest.raises(RunError, match="No space left"):
            convert(tmp_path / "in", tmp_path / "out", "fold")
        assert [path.name for path in tmp_path.iterdir()] == ["in"]
    nothing = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: nothing)
    with pytest.raises(RunError, match=r"0\.00 GB free"):
        convert(tmp_path / "in", tmp_path / "out", "fold")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_model_without_such_norms_and_unknown_operation_are_refused(save: Any, tmp_path: Path) -> None:
    save(tmp_path / "in", "llama")
    with pytest.raises(
        RunError, match=r"Nothing to center.*it has no LayerNorm, and only a LayerNorm subtracts a mean"
    ):
        convert(tmp_path / "in", tmp_path / "out", "center")
    with pytest.raises(ConfigError, match="got 'melt'"):
        convert(tmp_path / "in", tmp_path / "out", "melt")


def test_command_line_converts_and_undoes_and_refuses_wrong_options(
    save: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main(["convert", *map(str, arguments)])
        return (caught.value.code or 0, *capsys.readouterr())

    save(tmp_path / "in", "gpt2")
    source, target = tmp_path / "in", tmp_path / "out"
    for named in ((), (target,)):
        code, out, err = run(source, *named, "--center", "--dry-run")
        assert code == 0, err
        assert "transformer.h.0.ln_1: LayerNorm that equals RMSNorm" in out
        assert re.search(r"Verified in float64: maximum relative difference [1-9]e-1\d\.", out)
        assert "nothing was written" in out
        assert not target.exists()
    code, out, err = run(source, "--rotate", "random", "--dry-run")
    assert code == 0, err
    assert "Folded and rotated:" in out
    assert "transformer.h.1.attn.c_proj: rotated along dimension 0 with 4 heads" in out
    code, out, err = run(source, target, "--fold", "--json")
    assert code == 0, err
    assert json.loads(out)["error"] <= 1e-10
    code, out, _ = run(target, tmp_path / "back", "--undo")
    assert code == 0
    assert str(tmp_path / "back") in out
    for wrong, words in (
        ((source, target, "--fold"), (str(target), "exists")),
        ((source, target), ("--swap, --fold", "none")),
        ((source, "--fold"), ("new folder", "--dry-run")),
        ((target, tmp_path / "again", "--undo", "--dry-run"), ("--dry-run", "--undo")),
        ((source, target, "--swap", "--center"), ("--swap and --center",)),
        ((source, target, "--rotate", "hadamard", "--fold"), ("--fold and --rotate",)),
        ((source, tmp_path / "new", "--rotate", "givens"), ("hadamard, random", "givens")),
    ):
        code, out, err = run(*wrong)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert all(word in err for word in words), err
    assert not (tmp_path / "again").exists()


def test_swap_lists_replaceable_norms_and_changes_no_weight(save: Any, tmp_path: Path) -> None:
    save(tmp_path / "in", "llama", torch.bfloat16, shards="20KB")
    done = convert(tmp_path / "in", tmp_path / "out", "swap")
    assert len(done.changed) == 5
    assert done.refused == {}
    assert 0 < done.error <= 1e-5, "transformers' norms round to float32 inside"
    one, other = tensors(tmp_path / "in"), tensors(tmp_path / "out")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert not (tmp_path / "out" / "surgery_delta.safetensors").exists()
    undo(tmp_path / "out", tmp_path / "back")
    assert (tmp_path / "back" / "config.json").exists()


def test_names_without_the_base_model_prefix_are_matched(save: Any, tmp_path: Path) -> None:
    """As in the GPT-2 that was first published."""
    save(tmp_path / "in", "gpt2")
    weights = {name.removeprefix("transformer."): value for name, value in tensors(tmp_path / "in").items()}
    save_file(weights, tmp_path / "in" / "model.safetensors", metadata={"format": "pt"})
    expected = logits(tmp_path / "in", "gpt2")
    convert(tmp_path / "in", tmp_path / "out", "center")
    assert float((logits(tmp_path / "out", "gpt2") - expected).abs().max()) <= 1e-4


def peak_of_conversion(folder: Path, operation: str, **sizes: int) -> tuple[int, int]:
    """Return the peak memory of a process that converts a Llama, in bytes with mapped pages, and the size of its largest tensor."""
    config = hf.LlamaConfig(
        num_hidden_layers=8, num_attention_heads=8, architectures=["LlamaForCausalLM"], **sizes
    )  # fmt: skip
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in hf.LlamaForCausalLM(config).state_dict().items()}
    weights = {name: torch.rand(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    config.save_pretrained(folder / "in")
    save_file(weights, folder / "in" / "model.safetensors", metadata={"format": "pt"})
    script = (
        "import sys; from pathlib import Path; from omninorm.surgery.convert import convert\n"
        "convert(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])\n"
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    command = [sys.executable, "-c", script, folder / "in", folder / "out", operation]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout) * 1024, max(2 * value.numel() for value in weights.values())


@pytest.mark.slow
@pytest.mark.parametrize("operation", ["fold", "rotate"])
def test_memory_is_bounded_by_the_largest_tensor(tmp_path: Path, operation: str) -> None:
    """A model of 0.4 GB would take 1.6 GB in float64. The memory of a tiny model, mostly libraries, is subtracted."""
    libraries, _ = peak_of_conversion(
        tmp_path / "tiny", operation, hidden_size=64, intermediate_size=128, vocab_size=100
    )
    peak, largest = peak_of_conversion(tmp_path, operation, hidden_size=1024, intermediate_size=4096, vocab_size=32000)
    assert sum(path.stat().st_size for path in (tmp_path / "in").iterdir()) > 3.9e8
    # Rotated rows: a matrix in the file's dtype, some columns in float64, and what glibc keeps of freed memory, which is
    # up to twice its largest threshold of 32 MiB.
    rotated = 2 * 1024 * 4096 + 8 * _COLUMNS + 2 * 2**25 if operation == "rotate" else 0
    assert peak - libraries <= 2 * largest + rotated


def test_model_with_nan_is_not_written(save: Any, tmp_path: Path) -> None:
    save(tmp_path / "in")
    weights = load_file(tmp_path / "in" / "model.safetensors")
    weights["model.embed_tokens.weight"][:] = float("nan")
    save_file(weights, tmp_path / "in" / "model.safetensors", metadata={"format": "pt"})
    for operation in ("swap", "fold"):
        with pytest.raises(OmninormError, match="NaN"):
            convert(tmp_path / "in", tmp_path / "out", operation)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "damage", [{"changed_tensors": [["a"]]}, {"added": [1]}, {"before_sha256": {"model.norm.weight": None}}]
)
def test_damaged_proof_is_refused_before_anything_is_written(
    converted: Path, tmp_path: Path, damage: dict[str, object]
) -> None:
    shutil.copytree(converted, tmp_path / "out")
    path = tmp_path / "out" / "surgery.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    with pytest.raises(RunError, match=r"surgery\.json is damaged"):
        undo(tmp_path / "out", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_lone_surrogate_in_config_survives(save: Any, tmp_path: Path) -> None:
    save(tmp_path / "in")
    path = tmp_path / "in" / "config.json"
    path.write_text(path.read_text().replace("{", '{"note": "\\ud800",', 1))
    convert(tmp_path / "in", tmp_path / "out", "fold")
    undo(tmp_path / "out", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["note"] == "\ud800"
