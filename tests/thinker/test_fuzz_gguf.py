"""Damaged GGUF files: each is read, or refused by an OmninormError, within limits of time and memory."""

from __future__ import annotations

import pytest
from helpers.mutations import bounded, cases, mutated_bytes, refuses_or_reads
from helpers.tiny_files import GGUF_SIZES, gguf_file

from omninorm.experiments.pretrained import load_gguf
from omninorm.thinker import Thinker


def test_damaged_bytes_are_read_or_refused(tmp_path):
    good = gguf_file(tmp_path / "good.gguf").read_bytes()
    load_gguf(tmp_path / "good.gguf")
    header = good[: good.index(b"blk.0.") + 400]
    read = 0
    for case in range(cases(100)):
        # Mostly the header, because every change of a weight is still a weight.
        damaged = mutated_bytes(header, case) + good[len(header) :] if case % 4 else mutated_bytes(good, case)
        (tmp_path / "bad.gguf").write_bytes(damaged)
        with bounded(len(damaged)):
            read += refuses_or_reads(load_gguf, tmp_path / "bad.gguf")
    assert read < cases(100)


@pytest.mark.parametrize("key", GGUF_SIZES)
def test_a_size_that_the_tensors_do_not_have_is_refused(tmp_path, key):
    read = []
    for size in (0, 1, 3, 10**5, 2**31, 2**63, 10**18, -1.0, 1e18, "8", True, [8]):
        gguf_file(tmp_path / "m.gguf", {key: size})
        with bounded(0):
            read += [size] if refuses_or_reads(Thinker.from_pretrained, tmp_path / "m.gguf") else []
    # Any context is possible; one key head is what the tensors have; without a width of a head RoPE's counts.
    possible = {
        "context_length": [1, 3, 10**5, 2**31, 2**63, 10**18],
        "attention.head_count_kv": [1],
        "attention.key_length": [0],
    }
    assert read == possible.get(key, [])


def test_a_long_context_takes_no_memory_until_it_is_used(tmp_path):
    gguf_file(tmp_path / "m.gguf", {"context_length": 10**8})
    with bounded(0):
        model = Thinker.from_pretrained(tmp_path / "m.gguf")
    assert model.config.max_seq_len == 10**8
    assert len(model.rotary.cos) < 10**5


def test_rotation_of_a_part_of_each_head_is_refused(tmp_path):
    gguf_file(tmp_path / "m.gguf", {"rope.dimension_count": 2})
    assert not refuses_or_reads(Thinker.from_pretrained, tmp_path / "m.gguf")
