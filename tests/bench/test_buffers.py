"""Inputs rotate through more memory than the cache holds."""

from __future__ import annotations

import pytest
import torch

from omninorm.bench.buffers import FALLBACK_CACHE_BYTES, Buffers, last_level_cache_bytes, sets_needed

MIB = 2**20


@pytest.mark.parametrize(
    ("bytes_per_set", "cache", "cap", "count"),
    [
        (MIB, 32 * MIB, 2048 * MIB, 64),  # twice the cache
        (3 * MIB, 32 * MIB, 2048 * MIB, 22),  # rounded up
        (256 * MIB, 32 * MIB, 2048 * MIB, 2),  # one follows another, always
        (4 * MIB, 1024 * MIB, 480 * MIB, 10),  # the memory's cap: a set may bring twelve tensors
        (16, 32 * MIB, 2048 * MIB, 256),  # tiny ones: no thousands
        (0, 32 * MIB, 2048 * MIB, 256),
    ],
)
def test_the_sets_fill_the_cache_twice_within_the_memory_cap(bytes_per_set, cache, cap, count) -> None:
    assert sets_needed(bytes_per_set, cache, cap) == count


def test_every_set_has_its_own_memory() -> None:
    buffers = Buffers(3, 5, torch.bfloat16, cache_bytes=100)
    assert buffers.bytes == 30
    assert buffers.count == 7
    for tensors in (buffers.x, buffers.dy, buffers.residual):
        assert len({tensor.data_ptr() for tensor in tensors}) == 7
        assert {(tensor.shape, tensor.dtype) for tensor in tensors} == {((3, 5), torch.bfloat16)}
    assert all(x.requires_grad and x.is_leaf for x in buffers.x)


def test_the_cache_size_is_the_largest_that_the_system_reports(tmp_path) -> None:
    for index, text in enumerate(["32K\n", "512K\n", "260M\n", "damaged\n", ""]):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(text)
    assert last_level_cache_bytes(tmp_path) == 260 * MIB


def test_without_a_reported_cache_size_the_fallback_is_used(tmp_path) -> None:
    assert last_level_cache_bytes(tmp_path / "none") == FALLBACK_CACHE_BYTES
