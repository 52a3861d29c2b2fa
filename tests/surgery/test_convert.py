"""convert and undo on folders: the new one loads in plain transformers, the old one is untouched, bad ones are refused."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf
from helpers import surgery_models as subjects
from safetensors.torch import load_file, save_file

from omninorm.errors import ConfigError, OmninormError, RunError
from omninorm.surgery.convert import convert, undo

KINDS = {
    "gpt2": hf.GPT2LMHeadModel,
    "llama": hf.LlamaForCausalLM,
    "opt": hf.OPTForCausalLM,
    "vit": hf.ViTForImageClassification,
}


def save(folder: Path, name: str = "llama", dtype: torch.dtype = torch.float32, **settings) -> dict[str, bytes]:
    """Writes a random model and a tokenizer's file; returns the folder's bytes."""
    subjects.build(name, dtype).save_pretrained(folder, **settings)
    (folder / "tokenizer.json").write_text("{}")
    return content(folder)


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
    [("llama", "fold"), ("gpt2", "fold"), ("gpt2", "center"), ("opt", "center"), ("vit", "center")],
)
def test_the_new_folder_computes_the_same_in_transformers_and_is_undone_bit_for_bit(
    tmp_path: Path, name: str, operation: str
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


def test_shards_and_bfloat16(tmp_path: Path) -> None:
    save(tmp_path / "in", "llama", torch.bfloat16, max_shard_size="20KB")
    assert (tmp_path / "in" / "model.safetensors.index.json").exists()
    done = convert(tmp_path / "in", tmp_path / "out", "fold")
    assert done.error <= 1e-10
    assert {value.dtype for value in tensors(tmp_path / "out").values()} == {torch.bfloat16}
    undo(tmp_path / "out", tmp_path / "back")
    one, other = tensors(tmp_path / "in"), tensors(tmp_path / "back")
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    save(tmp_path / "in")
    assert convert(tmp_path / "in", None, "fold").changed
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_what_was_not_kept_or_has_changed_can_not_be_undone(tmp_path: Path) -> None:
    save(tmp_path / "in")
    convert(tmp_path / "in", tmp_path / "out", "fold", keep_delta=False)
    with pytest.raises(RunError, match=r"no surgery_delta\.safetensors"):
        undo(tmp_path / "out", tmp_path / "back")
    convert(tmp_path / "in", tmp_path / "kept", "fold")
    weights = load_file(tmp_path / "kept" / "model.safetensors")
    weights["model.embed_tokens.weight"][0, 0] += 1
    save_file(weights, tmp_path / "kept" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunError, match=r"others in model\.embed_tokens\.weight"):
        undo(tmp_path / "kept", tmp_path / "back")
    with pytest.raises(RunError, match=r"a converted folder has surgery\.json"):
        undo(tmp_path / "in", tmp_path / "back")
    assert not (tmp_path / "back").exists()


class Harmful:
    """Unpickled, it would end the tests."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('unpickled')",)


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_tensors_become_safetensors(tmp_path: Path, shards: int, zipped: bool) -> None:
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
        case "a cut pickle":
            torch.save(load_file(weights), folder / "pytorch_model.bin")
            content = (folder / "pytorch_model.bin").read_bytes()
            (folder / "pytorch_model.bin").write_bytes(content[: len(content) // 2])
            weights.unlink()
        case "pickled under another name":
            weights.rename(folder / "weights.pt")
        case "cut":
            weights.write_bytes(weights.read_bytes()[:5000])
        case "no header":
            weights.write_bytes(b"\xff" * 40)
        case "a link outside":
            shutil.move(weights, folder.parent / "elsewhere.safetensors")
            weights.symlink_to(folder.parent / "elsewhere.safetensors")
        case "a missing shard":
            index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        case "a shard with an endless name":
            index = {"weight_map": {"a": "m" * 5000}}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        case "no type":
            (folder / "config.json").write_text(json.dumps({**config, "model_type": []}))
        case "twice":
            shutil.copyfile(weights, folder / "model-2.safetensors")
            index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        case "a missing tensor":
            found = load_file(weights)
            del found["model.norm.weight"]
            save_file(found, weights, metadata={"format": "pt"})
        case "a strange tensor":
            save_file({**load_file(weights), "strange": torch.zeros(3)}, weights, metadata={"format": "pt"})
        case "a strange class":
            (folder / "config.json").write_text(json.dumps({**config, "architectures": ["Strange"]}))
        case "code of its own":
            (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "x.Y"}}))
        case "quantized":
            (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"bits": 4}}))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("no config", "must hold config.json"), ("no JSON", "must be JSON"), ("pickled", "must hold tensors by name"),
        ("pickled code", "must hold tensors by name"), ("a pickled list", "pytorch_model.bin, a list"), ("a pickled number", "with 'step'"),
        ("a cut pickle", "must hold tensors by name"), ("pickled under another name", "only weights.pt, which is pickled"),
        ("cut", "must be a whole"), ("no header", "whole safetensors file"), ("a link outside", "must lie in its folder"),
        ("a missing shard", "every shard"), ("a shard with an endless name", "every shard"), ("no type", "download it again"), ("twice", "must stand once"), ("a missing tensor", "missing keys: model.norm.weight"),
        ("a strange tensor", "unexpected keys: strange"), ("a strange class", "one of transformers' classes"),
        ("code of its own", "one of transformers' classes"), ("quantized", "quantized ones"),
    ],
)  # fmt: skip
def test_bad_folders_are_refused_and_nothing_is_left(tmp_path: Path, how: str, said: str) -> None:
    save(tmp_path / "in")
    damage(tmp_path / "in", how)
    before = content(tmp_path / "in")
    with pytest.raises(OmninormError) as caught:
        convert(tmp_path / "in", tmp_path / "out", "fold")
    assert said in str(caught.value)
    assert content(tmp_path / "in") == before
    assert {path.name for path in tmp_path.iterdir()} <= {"in", "elsewhere.safetensors"}


def test_a_target_that_exists_and_a_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "in")
    (tmp_path / "out").mkdir()
    with pytest.raises(RunError, match="must not exist"):
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
    for pieces in (0, 1, 7, 20):
        written, room = 0, pieces
        with pytest.raises(RunError, match="No space left"):
            convert(tmp_path / "in", tmp_path / "out", "fold")
        assert [path.name for path in tmp_path.iterdir()] == ["in"]
    nothing = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: nothing)
    with pytest.raises(RunError, match="must have space"):
        convert(tmp_path / "in", tmp_path / "out", "fold")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_nothing_to_do_is_told(tmp_path: Path) -> None:
    save(tmp_path / "in", "llama")
    with pytest.raises(RunError, match="something to center"):
        convert(tmp_path / "in", tmp_path / "out", "center")
    with pytest.raises(ConfigError, match="one of swap, fold, center"):
        convert(tmp_path / "in", tmp_path / "out", "melt")


def test_broken_headers_never_end_in_another_error(tmp_path: Path) -> None:
    save(tmp_path / "in")
    weights = tmp_path / "in" / "model.safetensors"
    whole, draw, refused = weights.read_bytes(), random.Random(0), 0
    for _ in range(25):
        broken = bytearray(whole)
        for _ in range(3):
            broken[draw.randrange(1200)] = draw.randrange(256)
        weights.write_bytes(broken)
        try:
            convert(tmp_path / "in", None, "fold")
        except OmninormError:
            refused += 1
    assert refused > 15


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "omninorm", "convert", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)


def test_on_the_command_line(tmp_path: Path) -> None:
    save(tmp_path / "in", "gpt2")
    source, target = str(tmp_path / "in"), str(tmp_path / "out")
    dry = run(source, "--center", "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert "transformer.h.0.ln_1: LayerNorm that equals RMSNorm" in dry.stdout
    assert "Nothing was written." in dry.stdout
    done = run(source, target, "--fold", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["error"] <= 1e-10
    back = run(target, str(tmp_path / "back"), "--undo")
    assert "Restored bit for bit." in back.stdout
    for wrong, said in (
        ((source, target, "--fold"), "must not exist"),
        ((source, target), "one of --swap, --fold"),
        ((source, "--fold"), "writes a new folder"),
        ((source, target, "--fold", "--dry-run"), "writes a new folder"),
        ((source, target, "--fold", "--center"), "one of --swap, --fold"),
    ):
        refused = run(*wrong)
        assert refused.returncode == 2
        assert said in refused.stderr
        assert "Traceback" not in refused.stderr


def test_a_swap_changes_no_weight_and_says_which_norms_can_be_replaced(tmp_path: Path) -> None:
    save(tmp_path / "in", "llama", torch.bfloat16, max_shard_size="20KB")
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


def test_names_without_the_base_models_prefix(tmp_path: Path) -> None:
    """As in the GPT-2 that was first published."""
    save(tmp_path / "in", "gpt2")
    weights = {name.removeprefix("transformer."): value for name, value in tensors(tmp_path / "in").items()}
    save_file(weights, tmp_path / "in" / "model.safetensors", metadata={"format": "pt"})
    expected = logits(tmp_path / "in", "gpt2")
    convert(tmp_path / "in", tmp_path / "out", "center")
    assert float((logits(tmp_path / "out", "gpt2") - expected).abs().max()) <= 1e-4


@pytest.mark.slow
def test_memory_is_bounded_by_the_largest_tensor(tmp_path: Path) -> None:
    """Of 0.4 GB, which would be 1.6 GB in float64; what the process ever had, mapped pages included."""
    config = hf.LlamaConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=8, num_attention_heads=8, vocab_size=32000,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in hf.LlamaForCausalLM(config).state_dict().items()}
    weights = {name: torch.rand(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    largest = max(2 * value.numel() for value in weights.values())
    config.save_pretrained(tmp_path / "in")
    save_file(weights, tmp_path / "in" / "model.safetensors", metadata={"format": "pt"})
    script = (
        "import sys; from pathlib import Path; from omninorm.surgery.convert import convert\n"
        "convert(Path(sys.argv[1]), Path(sys.argv[2]), 'fold')\n"
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    command = [sys.executable, "-c", script, tmp_path / "in", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert sum(path.stat().st_size for path in (tmp_path / "in").iterdir()) > 3.9e8
    assert int(done.stdout) * 1024 <= 2 * largest + 500e6


def test_what_can_not_be_proved_is_not_written(tmp_path: Path) -> None:
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
def test_a_damaged_proof_is_refused_before_anything_is_written(tmp_path: Path, damage: dict[str, object]) -> None:
    save(tmp_path / "in")
    convert(tmp_path / "in", tmp_path / "out", "fold")
    path = tmp_path / "out" / "surgery.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    with pytest.raises(RunError, match=r"surgery\.json must be whole"):
        undo(tmp_path / "out", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_character_that_is_half_of_one_comes_through(tmp_path: Path) -> None:
    save(tmp_path / "in")
    path = tmp_path / "in" / "config.json"
    path.write_text(path.read_text().replace("{", '{"note": "\\ud800",', 1))
    convert(tmp_path / "in", tmp_path / "out", "fold")
    undo(tmp_path / "out", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["note"] == "\ud800"
