"""`omninorm diff`: the sentence first, exit codes, one JSON document, and the page."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from helpers.converted import random_model, write_folder, write_gguf

from omninorm.experiments.tokenizer import BpeTokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model, the same again, one with a changed weight, and one with NaN."""
    model, folder = random_model("llama"), tmp_path_factory.mktemp("folders")

    def change(factor):
        def apply(tensors):
            tensors["model.layers.1.mlp.down_proj.weight"] *= factor

        return apply

    write_folder(model, folder / "a")
    write_folder(model, folder / "b", change(1.5))
    write_folder(model, folder / "nan", change(math.nan))
    write_folder(model, folder / "bf16", dtype=torch.bfloat16, config={"dtype": "bfloat16"})
    return folder


def flat(text):
    return " ".join(text.split())


def test_equal_models_exit_with_0(command, folders):
    code, out, err = command("diff", folders / "a", folders / "a")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "No difference in 45 matched modules."
    assert "Input: random tokens from seed 0, because no --text was given, in float64." in out
    assert lines[-1] == "Counts as rounding: up to 1e-10 for one module, 1e-06 if the classes differ."


def test_a_changed_weight_is_named_and_exits_with_1(command, folders):
    code, out, err = command("diff", folders / "a", folders / "b")
    assert (code, err) == (1, "")
    assert out.splitlines()[:2] == [
        "They first part in model.layers.1.mlp.down_proj: same inputs, outputs differ by 50 % (norm);"
        " before it 25 modules agree exactly.",
        "In model.layers.1.mlp.down_proj, weight differs by 50 %.",
    ]
    assert "model.layers.1.mlp.down_proj 0 0.5 0.5" in flat(out)
    assert "model.layers.1.mlp.up_proj 0 0 0" in flat(out)
    table = [line for line in out.splitlines() if line.startswith("model.layers.")]
    assert len(table) == 12


@pytest.mark.parametrize(("top", "shown"), [(0, 0), (1, 1), (3, 3)])
def test_top_limits_the_modules_and_keeps_the_first_difference(command, folders, top, shown):
    _, out, _ = command("diff", folders / "a", folders / "b", "--top", top)
    table = [line for line in out.splitlines() if line.startswith("model.layers.")]
    assert len(table) == shown
    assert not shown or "model.layers.1.mlp.down_proj" in table[-1]


@pytest.mark.parametrize("dtype", ["float64", "as-is"])
def test_rounding_exits_with_0(command, folders, dtype):
    code, out, _ = command("diff", folders / "a", folders / "bf16", "--dtype", dtype)
    assert code == 0
    assert out.startswith("They differ by no more than rounding in 45 matched modules: ")
    where = "float64" if dtype == "float64" else "the dtypes of their weights"
    assert f"in {where}." in out
    rows = [line.split() for line in out.splitlines() if line.startswith(("model.", "the model itself "))]
    sizes = [float(row[-1]) for row in rows if row[-1] != "–"]
    assert sizes == sorted(sizes, reverse=True), "the largest differences come first"


def test_json_prints_one_strict_document_even_with_nan(command, folders):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    code, out, err = command("diff", folders / "a", folders / "nan", "--json")
    record = json.loads(out, parse_constant=refuse)
    assert (code, err, record["kind"]) == (1, "", "different")
    assert record["culprits"][0]["a"] == "model.layers.1.mlp.down_proj"
    assert record["culprits"][0]["nonfinite"] == "b"
    assert (record["class_a"], len(record["modules"])) == ("LlamaForCausalLM", 45)


def test_the_page_is_written_next_to_the_output(command, folders, tmp_path):
    page = tmp_path / "page.html"
    code, out, _ = command("diff", folders / "a", folders / "b", "--html", page)
    assert (code, out.splitlines()[-1]) == (1, f"Page: {page}")
    text = page.read_text()
    assert "They first part in model.layers.1.mlp.down_proj" in text
    assert text.startswith("<!doctype html>")


@pytest.mark.parametrize("fault", [False, True])
def test_a_folder_is_compared_with_its_conversion_to_gguf(command, folders, tmp_path, fault):
    def forget_the_order_of_rows(tensors):
        weight = tensors["blk.1.attn_k.weight"]
        tensors["blk.1.attn_k.weight"] = weight.roll(1, 0)

    path = write_gguf(random_model("llama"), tmp_path / "m.gguf", "llama", forget_the_order_of_rows if fault else None)
    code, out, _ = command("diff", folders / "a", path)
    assert code == int(fault)
    if fault:
        assert out.startswith("They first part in model.layers.1.self_attn.k_proj (blocks.1.attention.k in b): ")
    else:
        assert out.startswith("They differ by no more than rounding in 40 matched modules: ")


def test_a_run_is_compared_on_a_text_by_its_own_tokenizer(command, small, text_file, tmp_path):
    for name, seed in (("one", 0), ("two", 1)):
        assert command("train", *small, "--seed", seed, "--out", tmp_path / name).code == 0
    again = command("diff", tmp_path / "one", tmp_path / "one", "--text", text_file, "--tokens", 9)
    assert again.code == 0
    assert f"Input: the first 9 tokens of {text_file}, in float64." in again.out
    other = command("diff", tmp_path / "one", tmp_path / "two")
    assert (other.code, other.out.startswith("They first part in embedding: same inputs")) == (1, True)


def test_tokens_outside_of_the_vocabulary_exit_with_2(command, folders, text_file, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(folders / "a", folder)
    (folder / "tokenizer.json").write_text(BpeTokenizer.train(b"In the beginning " * 9, 257).to_json())
    code, out, err = command("diff", folder, folders / "a", "--text", text_file)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "Both models must know the tokens of the text, got token " in err
    assert " for 120 embeddings in LlamaForCausalLM. Compare models of the same tokenizer." in err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--dtype", "int8"], "dtype must be one of float64, float32, bfloat16, float16, as-is"),
        (["--tokens", "0"], "tokens must be"),
        (["--top", "-1"], "top must be"),
        (["--html", "page.pdf"], "The page must end in .html, got page.pdf. Write for example --html page.html."),
        (["--limit", "0"], "limit must be a positive number"),
        (["--text", "no-such-file"], "Neither model has a tokenizer that can encode a text"),
        (["--device", "nothing"], "device must be one of"),
    ],
)
def test_bad_options_exit_with_2_and_one_line(command, folders, options, said):
    code, out, err = command("diff", folders / "a", folders / "b", *options)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err


def test_a_missing_folder_exits_with_2(command, folders, tmp_path):
    code, _, err = command("diff", folders / "a", tmp_path / "nowhere")
    assert (code, "No such file or folder" in err) == (2, True)
