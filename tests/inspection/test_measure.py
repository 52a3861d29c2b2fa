"""Measured statistics match plain torch on the whole tensor in float64."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from omninorm.inspection import inspect_checkpoint, tensors


def only(folder, tensor, name="weight"):
    save_file({name: tensor}, folder / "model.safetensors")
    return inspect_checkpoint(folder).tensors[0]


def rounding(rows: torch.Tensor, most: int) -> float:
    scale = rows.abs().amax(-1, keepdim=True) / most
    return float((rows - scale * (rows / scale).round()).square().sum())


@pytest.mark.parametrize("chunk", [1, 100, 1000, 1 << 20])
@pytest.mark.parametrize("shape", [(40, 64), (7, 96), (3, 24, 32)])
def test_statistics_do_not_depend_on_the_chunks(tmp_path, monkeypatch, chunk, shape):
    monkeypatch.setattr(tensors, "CHUNK", chunk)
    weight = torch.randn(shape) * 0.02
    weight.view(-1)[5] = 0.0
    weight.view(-1)[37] = -0.3
    got, w = only(tmp_path, weight), weight.double()
    matrix = w.reshape(-1, shape[-1])
    assert got.rms == pytest.approx(float(w.square().mean().sqrt()), rel=1e-6)
    assert got.kurtosis == pytest.approx(float((w**4).mean() / w.square().mean() ** 2), rel=1e-5)
    assert got.max_abs == pytest.approx(0.3, rel=1e-6)
    assert weight[got.argmax] == weight.view(-1)[37]
    assert got.zeros == 1
    assert got.fp16_subnormal == pytest.approx(((w != 0) & (w.abs() < 2**-14)).sum().item() / (w.numel() - 1))
    rms = matrix.square().mean(0).sqrt()
    assert got.columns.ratio == pytest.approx(float(rms.max() / rms.median()), rel=1e-6)
    assert got.columns.largest == 37 % shape[-1]
    total = float(w.square().sum())
    assert got.int8_error == pytest.approx((rounding(matrix, 127) / total) ** 0.5, rel=1e-3)
    assert got.int4_error == pytest.approx((rounding(matrix.reshape(-1, 32), 7) / total) ** 0.5, rel=1e-3)


@pytest.mark.parametrize("scale", [1e-200, 1e-30, 1e-12, 1e12, 1e30, 1e150])
def test_values_whose_squares_overflow_float32_are_measured(tmp_path, scale):
    weight = torch.randn(20, 30, dtype=torch.float64)
    if 1e-38 < scale < 1e38:
        weight = weight.float()
    got = only(tmp_path, weight * scale)
    assert got.rms / scale == pytest.approx(
        float(weight.double().square().mean().sqrt()) if scale > 1e-150 else 0.0, rel=1e-5
    )
    assert got.max_abs / scale == pytest.approx(float(weight.abs().max()), rel=1e-5)


def test_the_first_bad_value_is_found_in_a_later_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "CHUNK", 64)
    weight = torch.ones(4, 6, 32)
    weight[2, 3, 9] = torch.inf
    weight[3, 0, 0] = torch.nan
    got = only(tmp_path, weight)
    assert (got.nan, got.inf, got.first_bad, got.first_bad_value) == (1, 1, (2, 3, 9), "inf")
    assert got.rms == 1.0


def test_fractions_lost_in_fp16(tmp_path):
    got = only(tmp_path, torch.tensor([[1.0, 2.0**-14, 2.0**-15, 2.0**-24, 2.0**-25, 0.0]]))
    assert (got.fp16_subnormal, got.fp16_lost, got.zeros) == (3 / 5, 1 / 5, 1)
    assert torch.tensor(2.0**-25).half() == 0 < torch.tensor(2.0**-24).half()


def test_statistics_of_gains(tmp_path):
    gain = torch.ones(9)
    gain[2], gain[5] = -4.0, 1e-4
    gains = only(tmp_path, gain, "norm.weight").gains
    assert (gains.median, gains.largest, gains.largest_at, gains.ratio) == (1.0, 4.0, 2, 4.0)
    assert (gains.silent, gains.silent_first, gains.negative) == (1 / 9, 5, 1 / 9)


def test_a_convolution_has_a_row_for_each_output(tmp_path):
    weight = torch.randn(8, 3, 4, 4)
    weight[6] = 0.0
    got = only(tmp_path, weight)
    assert (got.rows.count, got.columns.count, got.rows.dead_first) == (8, 48, [6])


@pytest.mark.parametrize("threads", [1, 3])
def test_results_do_not_depend_on_the_number_of_threads(tmp_path, threads):
    save_file({f"layers.{block}.w": torch.randn(30, 40) for block in range(9)}, tmp_path / "model.safetensors")
    before, alone = torch.get_num_threads(), inspect_checkpoint(tmp_path).to_record()
    torch.set_num_threads(threads)
    try:
        assert inspect_checkpoint(tmp_path).to_record() == alone
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(64, 32), (4, 64, 32), (5000,), (16, 8, 3, 3)])
def test_chunks_are_small_and_complete(tmp_path, monkeypatch, shape):
    monkeypatch.setattr(tensors, "CHUNK", 512)
    weight = torch.randn(shape)
    save_file({"weight": weight}, tmp_path / "a.safetensors")
    (stored,) = tensors.read_safetensors(tmp_path / "a.safetensors")
    chunks = list(stored.chunks())
    assert max(chunk.numel() for chunk in chunks) <= 512
    assert torch.equal(torch.cat([chunk.flatten() for chunk in chunks]), weight.flatten())
