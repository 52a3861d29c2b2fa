"""`omninorm inspect A --against B`: the verdict first, sentences, exit codes, one JSON document."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.converted import random_model, write_folder, write_gguf


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    model = random_model("gemma")
    return model, write_folder(model, tmp_path_factory.mktemp("gemma"))


def twice(tensors):
    for name in tensors:
        if name.endswith("norm.weight") and "output" not in name:
            tensors[name] = tensors[name] + 1


def test_equal_weights_exit_with_0_and_list_what_was_matched(command, gemma, tmp_path):
    model, folder = gemma
    path = write_gguf(model, tmp_path / "m.gguf", "gemma", kind="Q8_0")
    code, out, err = command("inspect", folder, "--against", path)
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert lines[0] == "No difference that matters: 29 tensors compared."
    assert lines[1].startswith("A: ")
    assert lines[1].endswith("(safetensors)")
    assert lines[2].endswith("(gguf)")
    assert "relative error of rounding or quantization" in out
    assert "blk.*.attn_q.weight" in out
    assert " ".join(out.split()).endswith("Matching of the 29 pairs: name rules: 29; gains with A's 1 added: 7.")


def test_offset_applied_twice_is_named_and_exits_with_1(command, gemma, tmp_path):
    model, folder = gemma
    path = write_gguf(model, tmp_path / "m.gguf", "gemma", twice)
    code, out, err = command("inspect", folder, "--against", path)
    text = " ".join(out.split())
    assert (code, err) == (1, "")
    assert out.startswith("1 difference that matters: 29 tensors compared.")
    assert "DIFFERS shift 6 of 7 norms are exactly 1 higher in B: the +1 offset was applied twice;" in text
    assert "`model.norm.weight` is not." in text


def test_json_option_prints_one_strict_document(command, gemma, tmp_path):
    model, folder = gemma

    def spoil(tensors):
        twice(tensors)
        tensors["blk.0.ffn_up.weight"] = torch.full_like(tensors["blk.0.ffn_up.weight"], torch.nan)

    path = write_gguf(model, tmp_path / "m.gguf", "gemma", spoil, sizes={"eps": 1e-3})

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    code, out, err = command("inspect", folder, "--against", path, "--json")
    record = json.loads(out, parse_constant=refuse)
    assert (code, err, record["matters"]) == (1, "", True)
    assert {each["kind"] for each in record["differences"]} == {"shift", "non-finite", "eps"}
    assert len(record["tensors"]) == 29
    assert record["formats"] == ["safetensors", "gguf"]
    shifted = [each for each in record["tensors"] if each["outcome"] == "shift"]
    assert {each["amount"] for each in shifted} == {1.0}
    assert len(shifted) == 6


def test_top_option_limits_the_sentences(command, gemma, tmp_path):
    model, folder = gemma
    path = write_gguf(model, tmp_path / "m.gguf", "gemma", twice, sizes={"eps": 1e-3})
    code, out, _ = command("inspect", folder, "--against", path, "--top", 1)
    assert (code, out.count("DIFFERS")) == (1, 1)
    assert "… and 1 more: pass --top 2" in out


def test_bad_input_exits_with_2(command, gemma, tmp_path):
    _, folder = gemma
    for other in (tmp_path / "none", tmp_path):
        code, out, err = command("inspect", folder, "--against", other)
        assert (code, out) == (2, "")
        assert err.startswith("omninorm: ")
        assert err.count("\n") == 1
    code, _, err = command("inspect", folder, "--against", folder, "--norms")
    assert code == 2
    assert "--norms and --against cannot be combined" in err


def test_names_of_a_damaged_file_are_escaped(command, gemma, tmp_path):
    model, folder = gemma
    evil = "blk.0.\x1b]0;owned\x07\r\n.weight"
    path = write_gguf(model, tmp_path / "m.gguf", "gemma", lambda tensors: tensors.update({evil: torch.ones(7, 7)}))
    code, out, _ = command("inspect", folder, "--against", path)
    assert code == 1
    assert "missing from A" in out
    assert not set("\x1b\x07\r") & set(out)
