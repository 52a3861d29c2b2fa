"""Each injected fault is found in otherwise healthy weights: the rule, the severity and the tensor."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.checkpoints import BLOCKS, HIDDEN, WIDTH, llama_tensors, save, transformers_model

from omninorm.inspection import inspect_checkpoint

UP, DOWN, OUT = (f"model.layers.2.{name}.weight" for name in ("mlp.up_proj", "mlp.down_proj", "self_attn.o_proj"))
NORM, FINAL, EMBEDDING = "model.layers.1.input_layernorm.weight", "model.norm.weight", "model.embed_tokens.weight"
MASSIVE = torch.zeros(WIDTH, WIDTH).index_put((torch.tensor(7), torch.tensor(9)), torch.tensor(3.0))


def set_to(index, value):
    def change(tensor):
        tensor[index] = value
        return tensor

    return change


FAULTS = {
    "NaN": (UP, set_to((3, 5), float("nan")), "fail", "non-finite", "1 NaN and 0 infinite of 6144 values; the first is nan at [3, 5]"),
    "infinity": (EMBEDDING, set_to((49, 63), -float("inf")), "fail", "non-finite", "the first is -inf at [49, 63]"),
    "NaN in a gain": (NORM, set_to(8, float("nan")), "fail", "non-finite", "[8]"),
    "all NaN": (DOWN, lambda w: w * float("nan"), "fail", "non-finite", "6144 NaN"),
    "final gain at 0": (FINAL, torch.zeros_like, "fail", "silent-norm", "all 64 gains"),
    "embedding of zeros": (EMBEDDING, torch.zeros_like, "fail", "zero-tensor", "all 3200 values are 0"),
    "frozen gain at 0": (NORM, torch.zeros_like, "warn", "silent-norm", "all 64 gains"),
    "silent gains": (NORM, set_to(slice(10, 13), 1e-5), "warn", "silent-gains", "channel 10"),
    "gain drift": (NORM, set_to(11, -20.0), "warn", "gain-drift", "max |γ| = 20 at channel 11 is 20 × the median 1"),
    "dead rows": (UP, set_to(slice(4, 6), 0.0), "warn", "dead-rows", "2 of 96 rows (4, 5)"),
    "nearly dead column": (UP, set_to((slice(None), 13), 1e-7), "warn", "dead-columns", "1 of 64 columns (13)"),
    "massive weight": (OUT, lambda w: w + MASSIVE, "warn", "massive-weight", "at [7, 9]"),
    "outlier row": (UP, set_to(6, 1.0), "warn", "outlier-row", "row 6 has"),
    "outlier column": (UP, set_to((slice(None), 17), 1.0), "warn", "outlier-column", "column 17 has"),
    "layer × 100": (OUT, lambda w: w * 100, "warn", "depth-outlier", "in 4 blocks"),
    "layer / 100": (UP, lambda w: w / 100, "warn", "depth-outlier", "in 4 blocks"),
    "dead branch": (DOWN, torch.zeros_like, "warn", "zero-tensor", "3 of 4 tensors of this role are not"),
    "beyond fp16": (UP, lambda w: w * 1e7, "warn", "fp16-overflow", "fp16's largest number"),
    "below fp16": (UP, lambda w: w * 1e-6, "warn", "fp16-underflow", "would become 0 in fp16"),
    "empty": (UP, lambda w: w[:0], "warn", "empty-tensor", "[0, 64]"),
    "untrained tokens": (EMBEDDING, set_to(slice(48, 50), 0.0), "note", "untrained-rows", "2 of 50 rows (48, 49)"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_injected_fault_is_found_with_its_rule_severity_and_tensor(tmp_path, fault):
    name, change, severity, rule, evidence = FAULTS[fault]
    tensors = llama_tensors()
    tensors[name] = change(tensors[name]).contiguous()
    result = inspect_checkpoint(save(tensors, tmp_path / "model.safetensors"))
    found = [(each.severity, each.tensor) for each in result.findings if each.rule == rule]
    assert found == [(severity, name)]
    finding = next(each for each in result.findings if each.rule == rule)
    assert evidence in finding.evidence
    assert finding.layer == (name[:14] if "layers" in name else None)
    assert result.failed is (severity == "fail")
    assert rule in json.dumps(result.to_record(), allow_nan=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_healthy_weights_have_no_findings(tmp_path, dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in llama_tensors().items()}
    result = inspect_checkpoint(save(tensors, tmp_path / "model.safetensors"))
    assert result.findings == []
    assert result.verdict.startswith("Healthy: no problems in 35 tensors with")
    assert [block.block for block in result.blocks] == list(range(BLOCKS))


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Gemma", "GPT2", "Bert"])
def test_random_transformers_models_are_healthy(tmp_path, family):
    model = transformers_model(family)
    model.save_pretrained(tmp_path)
    result = inspect_checkpoint(tmp_path)
    assert [each for each in result.findings if each.severity != "note"] == []
    assert len({block.block for block in result.blocks}) == 3
    assert all(block.attention_out and block.feed_forward_out and block.gain_median == 1.0 for block in result.blocks)
    assert result.totals()["parameters"] == sum(parameter.numel() for parameter in model.parameters())


def test_stored_gemma_gains_are_read_as_one_plus(tmp_path):
    model = transformers_model("Gemma")
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight.fill_(-1.0)
    model.save_pretrained(tmp_path)
    found = [(each.rule, each.tensor) for each in inspect_checkpoint(tmp_path).findings if each.severity != "note"]
    assert found == [("silent-norm", "model.layers.1.input_layernorm.weight")]
    (tmp_path / "config.json").unlink()
    blind = next(each for each in inspect_checkpoint(tmp_path).findings if each.rule == "silent-norm")
    assert "config.json" in blind.remedy


def test_findings_of_one_role_are_merged_worst_first(tmp_path):
    tensors = llama_tensors()
    for block, gain in ((0, 15.0), (3, 40.0), (1, 30.0)):
        tensors[f"model.layers.{block}.input_layernorm.weight"][2] = gain
    (finding,) = inspect_checkpoint(save(tensors, tmp_path / "a.safetensors")).findings
    assert finding.tensor == "model.layers.3.input_layernorm.weight"
    assert finding.others == tuple(f"model.layers.{block}.input_layernorm.weight" for block in (1, 0))


def test_failures_come_first(tmp_path):
    tensors = llama_tensors()
    tensors[NORM][11] = 20.0
    tensors["lm_head.weight"][0, 0] = torch.nan
    tensors[EMBEDDING][0] = 0.0
    result = inspect_checkpoint(save(tensors, tmp_path / "a.safetensors"))
    assert [each.severity for each in result.findings] == ["fail", "warn", "note"]
    assert result.verdict.startswith("2 findings (1 failure) in 35 tensors")
    assert result.verdict.endswith("non-finite, gain-drift, 1 note.")


def test_tied_and_duplicate_matrices_are_found(tmp_path):
    tensors = llama_tensors()
    tensors["lm_head.weight"] = tensors[EMBEDDING].clone()
    tensors[OUT] = tensors["model.layers.1.self_attn.o_proj.weight"].clone()
    found = {each.rule: each for each in inspect_checkpoint(save(tensors, tmp_path / "a.safetensors")).findings}
    assert set(found) == {"duplicate", "tied"}
    assert (found["duplicate"].tensor, found["duplicate"].severity) == (OUT, "warn")
    assert "model.layers.1.self_attn.o_proj.weight" in found["duplicate"].evidence
    assert found["tied"].severity == "note"


def test_config_that_contradicts_the_weights_is_found(tmp_path):
    config = {"model_type": "llama", "rms_norm_eps": 0.1, "tie_word_embeddings": True, "num_hidden_layers": 6}
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = inspect_checkpoint(save(llama_tensors(), tmp_path / "model.safetensors"))
    found = {each.rule: each.evidence for each in result.findings}
    assert set(found) == {"norm-eps", "eps-share", "untied-head", "missing-blocks"}
    assert "0.1" in found["norm-eps"]
    assert found["missing-blocks"] == "model.layers has 4 of 6 blocks; missing: 4, 5"
    assert "is 100%" in found["eps-share"]


def test_missing_block_is_named(tmp_path):
    tensors = {name: tensor for name, tensor in llama_tensors().items() if ".layers.1." not in name}
    (finding,) = inspect_checkpoint(save(tensors, tmp_path / "a.safetensors")).findings
    assert (finding.rule, finding.layer) == ("missing-blocks", "model.layers")
    assert "3 of 4 blocks; missing: 1" in finding.evidence


def test_minus_infinity_in_a_mask_is_no_finding(tmp_path):
    tensors = {**llama_tensors(), "model.causal_mask": torch.full((8, 8), -torch.inf).triu(1)}
    assert inspect_checkpoint(save(tensors, tmp_path / "a.safetensors")).findings == []


def test_rows_are_outputs_and_columns_are_inputs(tmp_path):
    result = inspect_checkpoint(save(llama_tensors(), tmp_path / "a.safetensors"))
    found = {each.name: each for each in result.tensors}
    assert (found[UP].rows.count, found[UP].columns.count) == (HIDDEN, WIDTH)
    assert (found[DOWN].rows.count, found[DOWN].columns.count) == (WIDTH, HIDDEN)
