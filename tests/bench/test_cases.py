"""The benchmark cases: peers compute the same values, and unavailable peers are skipped with the reason."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn

import omninorm
from omninorm.bench import cases, memory, models, peers
from omninorm.bench.buffers import Buffers
from omninorm.bench.config import BenchConfig
from omninorm.bench.onnx_model import rms_norm_model
from omninorm.bench.peers import Unavailable
from omninorm.bench.plan import plan
from omninorm.timing import OURS, Case, Contestant

EAGER = [name for name in cases.CASES if name != cases.RMS_COMPILED]


def context(dtype: torch.dtype, skipped: list[tuple[str, str]] | None = None) -> cases.Context:
    noted = [] if skipped is None else skipped
    return cases.Context(Buffers(4, 24, dtype, cache_bytes=500), 1, lambda what, why: noted.append((what, why)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", EAGER)
def test_peers_compute_the_same_values(name: str, dtype: torch.dtype) -> None:
    case = cases.CASES[name](context(dtype))
    assert case.name == name
    assert (case.inputs > 1) == (name != cases.ONE_ROW)
    assert [each.role for each in case.contestants].count("ours") == 1
    assert any(each.role == "peer" for each in case.contestants)
    cases.check_agreement(case)


def test_a_peer_with_other_values_is_not_timed() -> None:
    wrong = Contestant("wrong", lambda i: torch.ones(3) * 1.01, "peer")
    with pytest.raises(Unavailable, match=r"wrong gives other values.* 1\.0e-02"):
        cases.check_agreement(Case("a case", [Contestant(OURS, lambda i: torch.ones(3), "ours"), wrong], 1, False))
    nothing = Contestant("wrong", lambda i: torch.full((3,), torch.nan), "peer")
    with pytest.raises(Unavailable, match="nan"):
        cases.check_agreement(Case("a case", [Contestant(OURS, lambda i: torch.ones(3), "ours"), nothing], 1, False))


def test_missing_peers_are_skipped_with_the_reason(monkeypatch) -> None:
    found = importlib.util.find_spec
    hidden = ("transformers", "onnxruntime")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in hidden else found(name, *rest))
    skipped: list[tuple[str, str]] = []
    case = cases.rms_forward(context(torch.float32, skipped))
    assert [each.name for each in case.contestants] == [OURS, "torch.nn", "torch.nn.LayerNorm", "clone"]
    assert [what for what, _ in skipped] == ["transformers Llama", "transformers Qwen3", "onnxruntime"]
    assert all("not installed: pip install" in why for _, why in skipped)


def test_without_a_compiler_the_compiled_case_is_skipped(monkeypatch) -> None:
    monkeypatch.setattr(peers.shutil, "which", lambda name: None)
    with pytest.raises(Unavailable, match=r"needs a C\+\+ compiler"):
        cases.rms_compiled(context(torch.float32))


def test_kept_bytes_leave_out_input_parameters_and_output() -> None:
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            # exp keeps its output, each product its factors: the weight and x · exp(x), a new tensor of 10 × 6.
            return torch.exp(x * torch.exp(x) * self.weight)

    x = torch.randn(10, 6)
    assert memory.kept_bytes(Keeps(), x) == 2 * 10 * 6 * 4, "exp(x) and x · exp(x)"
    assert memory.kept_bytes(nn.LayerNorm(6), x) == 2 * 10 * 4, "mean and reciprocal standard deviation of every row"


def test_kept_by_our_norms_is_within_the_limits() -> None:
    assert memory.kept_per_row(memory.RMS_KEPT, 8, 16, torch.bfloat16)[OURS] <= 4
    assert memory.kept_per_row(memory.LAYER_KEPT, 8, 16, torch.bfloat16)[OURS] <= 8


def test_nested_norms_are_replaced_and_share_their_weights() -> None:
    pytest.importorskip("transformers")
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    inner = nn.Sequential(nn.Linear(8, 8), Qwen3RMSNorm(8, 1e-5))
    model = nn.Sequential(Qwen3RMSNorm(8, 1e-6), inner, nn.LayerNorm(8)).to(torch.bfloat16)
    x = torch.randn(3, 8, dtype=torch.bfloat16)
    before, weight = model(x), inner[1].weight
    assert models.replace_norms(model, Qwen3RMSNorm, models.our_qwen3_norm) == 2
    assert [type(norm) for norm in (model[0], inner[1], model[2])] == [omninorm.RMSNorm, omninorm.RMSNorm, nn.LayerNorm]
    assert (inner[1].eps, inner[1].weight is weight) == (1e-5, True)
    assert torch.equal(model(x), before)


def test_a_model_beyond_the_time_limit_is_skipped_with_its_duration(monkeypatch) -> None:
    monkeypatch.setattr(models, "matmul_speed", lambda dtype, training: 1e9)
    with pytest.raises(Unavailable, match=r"about \d{3} s here .*--patience \d+"):
        models.check_patience(models.QWEN_TRAINING, "bf16", 60.0)
    models.check_patience(models.QWEN_TRAINING, "bf16", 1e9)


def test_the_onnx_model_has_the_right_wire_format() -> None:
    model = rms_norm_model(512, 576, 1e-6, half=False)
    assert model.startswith(b"\x08\x08\x3a"), "IR version 8, then the graph"
    assert model.endswith(b"\x42\x04\x0a\x00\x10\x11"), "the operator set: domain '', version 17"
    assert b"SimplifiedLayerNormalization" in model
    assert b"\x08\x80\x04" in model, "512 as a varint"
    assert rms_norm_model(512, 576, 1e-6, half=True) != model


@pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="onnxruntime is not installed")
def test_onnxruntime_computes_our_norm() -> None:
    norm = peers.onnx_rms_norm(4, 24, torch.float32, threads=1)
    x = torch.randn(4, 24)
    torch.testing.assert_close(torch.from_numpy(norm(x)), omninorm.functional.rms_norm(x))


def test_the_plan_has_every_size_and_both_allocators() -> None:
    config = BenchConfig(rows=(512, 2048), widths=(576, 4096), threads=(1, 2))
    groups = plan(config)
    assert [(group.threads, group.allocator) for group in groups] == [
        (1, "raised"),
        (2, "raised"),
        (1, "default"),
        (2, "raised"),
    ]
    first, second, default, whole = (group.jobs for group in groups)
    forward = {(job.dtype, job.rows, job.width) for job in first if job.case == cases.RMS_FORWARD}
    assert forward == {(d, r, w) for d in ("fp32", "bf16", "fp16") for r in (512, 2048) for w in (576, 4096)}
    assert {job.rows for job in second} == {2048}
    assert {(job.rows, job.width) for job in default} == {(2048, 4096)}
    assert {job.case for job in whole} == set(models.MODELS)
    without = plan(BenchConfig(compile=False, models=False))
    assert not {job.case for group in without for job in group.jobs} & {cases.RMS_COMPILED, *models.MODELS}
