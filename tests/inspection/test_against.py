"""compare_weights finds no difference between formats of the same model, and names every planted conversion error."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.converted import FAMILIES, interleaved, random_model, write_folder, write_gguf
from torch import Tensor

from omninorm.inspection import compare_weights


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[torch.nn.Module, Path]]:
    """Returns a family's model and its folder, which is written once."""

    @functools.cache
    def make(family: str) -> tuple[torch.nn.Module, Path]:
        model = random_model(family)
        return model, write_folder(model, tmp_path_factory.mktemp(family))

    return make


@pytest.mark.parametrize("kind", [None, "BF16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_gguf_of_the_same_model_has_no_difference_that_matters(
    original: Callable[..., tuple[torch.nn.Module, Path]], tmp_path: Path, family: str, kind: str | None
) -> None:
    model, folder = original(family)
    found = compare_weights(folder, write_gguf(model, tmp_path / "model.gguf", family, kind=kind))
    assert found.differences == []
    assert (found.not_compared, found.matters) == ([], False)
    compared = sum(each.a.shape[0] * each.a.shape[1] for each in found.results)
    assert compared == sum(each.numel() for each in model.parameters())
    outcome = {None: "equal", "BF16": "rounding"}.get(kind, "quantization")
    assert {each.outcome for each in found.results if len(each.b.tensor.shape) > 1} == {outcome}


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "mixtral"])
def test_module_in_memory_equals_its_folder_in_bfloat16(tmp_path: Path, family: str) -> None:
    model = random_model(family)
    folder = write_folder(model, tmp_path / "folder", dtype=torch.bfloat16)
    for pair in ((model, folder), (folder, model)):
        found = compare_weights(*pair)
        assert found.differences == []
        assert {each.outcome for each in found.results} == {"rounding"}


def only(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    """Return a change of every tensor whose name contains `name`."""

    def apply(tensors: dict[str, Tensor]) -> None:
        chosen = [each for each in tensors if name in each]
        assert chosen, name
        for each in chosen:
            tensors[each] = change(tensors[each])

    return apply


def swap(first: str, second: str) -> Callable[[dict[str, Tensor]], None]:
    """Return a change that exchanges tensors: those with `first` in their name, and those with `second` instead."""

    def apply(tensors: dict[str, Tensor]) -> None:
        chosen = [each for each in tensors if first in each]
        assert chosen, first
        for each in chosen:
            other = each.replace(first, second)
            tensors[each], tensors[other] = tensors[other], tensors[each]

    return apply


def remove(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.pop(name)


def all_norms(amount: float, but: str = "no such norm") -> Callable[[dict[str, Tensor]], None]:
    def apply(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            if name.endswith("norm.weight") and but not in name:
                tensors[name] = tensors[name] + amount

    return apply


def with_nan(values: Tensor) -> Tensor:
    values = values.clone()
    values[0] = torch.nan
    return values


def with_other_values(values: Tensor) -> Tensor:
    values = values.clone()
    values[1, :5] += 0.1
    return values


# family, change of the GGUF file, kind of difference, what the sentence must contain
PLANTED = [
    ("gemma", all_norms(1.0, but="output"), "shift", ["6 of 7 norms are exactly 1 higher in B: the +1 offset was applied twice; `model.norm.weight` is not"]),
    ("gemma2", all_norms(1.0), "shift", ["13 of 13 norms are exactly 1 higher in B: the +1 offset was applied twice."]),
    ("gemma2", all_norms(-1.0), "shift", ["13 of 13 norms are exactly 1 lower in B: the +1 offset was not applied."]),
    ("nemotron", all_norms(-1.0), "shift", ["7 of 7 norms are exactly 1 lower in B: the +1 offset was not applied."]),
    ("llama", all_norms(1.0), "shift", ["7 of 7 norms are exactly 1 higher in B", "which this model type does not have"]),
    ("qwen3", only("attn_q_norm.weight", lambda g: 2 * g), "scale", ["3 of 13 norms are 2 times as large in B", "q_norm.weight"]),
    ("llama", only("blk.1.ffn_norm", torch.zeros_like), "zero", ["1 of 7 norms is all zeros in B only", "layers.1.post_attention_layernorm"]),
    ("llama", only("norm", torch.ones_like), "constant", ["7 of 7 norms are 1 everywhere in B only"]),
    ("llama", swap("attn_norm", "ffn_norm"), "moved", ["are swapped in B (3 ×)", "attn_norm", "ffn_norm"]),
    ("llama", remove("blk.2.ffn_norm.weight"), "missing", ["The norm `model.layers.2.post_attention_layernorm.weight` is missing from B"]),
    ("gpt2", remove("blk.1.attn_qkv.bias"), "missing", ["`transformer.h.1.attn.c_attn.bias` is missing from B"]),
    ("llama", only("token_embd", lambda w: 8 * w), "scale", ["`token_embd.weight` is ", "8 times as large in B"]),
    ("llama", only("attn_q", lambda w: w.reshape(4, 8, 2, 64).transpose(1, 2).reshape(64, 64)), "layout", ["`blk.*.attn_q.weight` in 3 of 3 places is not interleaved by head"]),
    ("qwen3", only("attn_k.", lambda w: interleaved(w, 2)), "layout", ["`blk.*.attn_k.weight` in 3 of 3 places fits only with its rows of B interleaved by head"]),
    ("qwen3", only("attn_output", lambda w: w.T), "layout", ["`blk.*.attn_output.weight` in 3 of 3 places is transposed in B"]),
    ("llama", swap("ffn_gate", "ffn_up"), "moved", ["`blk.*.ffn_gate.weight` and `blk.*.ffn_up.weight` are swapped in B (3 ×)"]),
    ("llama", swap("blk.0.", "blk.1."), "moved", ["tensors of blocks 0 and 1 are swapped in B (9 ×)"]),
    ("llama", only("blk.2.ffn_down", with_nan), "non-finite", ["`blk.*.ffn_down.weight` in 1 of 3 places has NaN or infinite values in B only"]),
    ("llama", only("blk.2.ffn_down", with_other_values), "few", ["has up to 5 of 6,144 values that are different in B"]),
    ("llama", only("blk.0.ffn_down", torch.randn_like), "values", ["`blk.*.ffn_down.weight` in 1 of 3 places holds other values in B"]),
    ("llama", remove("output.weight"), "values", ["`output.weight` holds other values in B"]),
    ("mixtral", only("blk.1.ffn_up_exps", lambda w: w[[1, 0, 2]]), "moved", ["experts of `blk.*.ffn_up_exps.weight` are swapped in B"]),
]  # fmt: skip


# Quantization spreads a NaN over its block, and hides a few changed values.
CASES = [
    pytest.param(*case, kind, id=f"{case[0]}-{case[2]}-{case[3][0][:40]}-{kind}")
    for kind in (None, "Q4_0")
    for case in PLANTED
    if kind is None or case[2] not in ("non-finite", "few")
]


@pytest.mark.parametrize(("family", "change", "what", "sentences", "kind"), CASES)
def test_planted_conversion_error_is_the_only_one_named(
    original: Callable[..., tuple[torch.nn.Module, Path]],
    tmp_path: Path,
    family: str,
    change: Callable[[dict[str, Tensor]], object],
    what: str,
    sentences: list[str],
    kind: str | None,
) -> None:
    model, folder = original(family)
    found = compare_weights(folder, write_gguf(model, tmp_path / "model.gguf", family, change, kind=kind))
    assert found.matters
    assert [each.kind for each in found.differences] == [what]
    assert all(part in found.differences[0].sentence for part in sentences), found.differences[0].sentence
