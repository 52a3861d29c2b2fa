"""Whole Hugging Face folders: loaded in their own dtype, offline, without code and pickles, and only if complete."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.converted import random_model, write_folder
from safetensors.torch import load_file

from omninorm.errors import ConfigError, OmninormError, RunError
from omninorm.surgery.folder import load_transformers


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_the_loaded_model_has_the_weights_of_the_saved_one(family: str, tmp_path: Path) -> None:
    model = random_model(family)
    model.save_pretrained(tmp_path)
    loaded = load_transformers(tmp_path)
    assert type(loaded) is type(model)
    assert not loaded.training
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())


def test_weights_keep_their_dtype(tmp_path: Path) -> None:
    random_model("llama").bfloat16().save_pretrained(tmp_path)
    assert {each.dtype for each in load_transformers(tmp_path).parameters()} == {torch.bfloat16}


def set_config(**settings: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | settings
        (folder / "config.json").write_text(json.dumps(config))

    return change


def drop_tensor(folder: Path) -> None:
    from safetensors.torch import save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def add_tensor(folder: Path) -> None:
    from safetensors.torch import save_file

    tensors = load_file(folder / "model.safetensors") | {"model.layers.1.mlp.other.weight": torch.zeros(2)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def pickle_weights(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


BROKEN: dict[str, tuple[Callable[[Path], object], type[OmninormError], str]] = {
    "missing weight": (drop_tensor, RunError, "missing keys: model.layers.1.mlp.up_proj.weight"),
    "unexpected weight": (add_tensor, RunError, "unexpected keys: model.layers.1.mlp.other.weight"),
    "another size": (
        set_config(intermediate_size=97),
        RunError,
        "mismatched keys: model.layers.0.mlp.down_proj.weight",
    ),
    "too many layers": (set_config(num_hidden_layers=10**7), ConfigError, "must be at most"),
    "own code": (set_config(auto_map={"AutoModel": "code.Model"}), ConfigError, "with code that comes with the model"),
    "unknown class": (set_config(architectures=["Nothing"]), ConfigError, "'Nothing'"),
    "quantized": (set_config(quantization_config={"bits": 4}), ConfigError, "The weights are quantized"),
    "pickled": (pickle_weights, RunError, "must hold safetensors, got pickled weights"),
    "adapter": (lambda folder: (folder / "adapter_config.json").write_text("{}"), RunError, "holds an adapter"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), RunError, "model.safetensors"),
    "no config": (lambda folder: (folder / "config.json").unlink(), RunError, "does not hold config.json"),
}


@pytest.mark.parametrize(("spoil", "kind", "said"), BROKEN.values(), ids=BROKEN)
def test_incomplete_and_unsafe_folders_are_refused(
    spoil: Callable[[Path], object], kind: type[OmninormError], said: str, tmp_path: Path
) -> None:
    folder = write_folder(random_model("llama"), tmp_path / "m")
    spoil(folder)
    with pytest.raises(kind) as caught:
        load_transformers(folder)
    assert said in str(caught.value)


def test_nothing_is_printed_and_the_settings_of_transformers_are_as_before(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers.utils import logging

    random_model("llama").save_pretrained(tmp_path)
    capfd.readouterr()
    before = logging.is_progress_bar_enabled(), logging.get_verbosity()
    load_transformers(tmp_path)
    assert capfd.readouterr() == ("", "")
    assert (logging.is_progress_bar_enabled(), logging.get_verbosity()) == before
