"""Damaged GGUF files: each is read, or refused by an OmninormError, within limits of time and memory."""

from __future__ import annotations

import pytest
from helpers.mutations import bounded, cases, mutated_bytes, refuses_or_reads
from helpers.tiny_files import GGUF_SIZES, gguf_file

from omninorm.errors import RunError
from omninorm.experiments.pretrained import load_gguf
from omninorm.thinker import Thinker
from omninorm.thinker.gguf import open_gguf, read_settings


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
    assert 0 < read < cases(100)


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


def _claim(path, key, count):
    """Return the content of a GGUF file after the number of items of an array, or of the tensors, has been replaced."""
    good = gguf_file(path).read_bytes()
    at = 8 if key == "tensors" else good.index(key.encode()) + len(key) + 8  # type of the setting, type of an item
    return good[:at] + count.to_bytes(8, "little") + good[at + 8 :]


@pytest.mark.parametrize("count", [10**6, 2**32, 2**63])
@pytest.mark.parametrize("key", ["tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tensors"])
def test_a_huge_number_of_items_is_refused_although_the_file_is_long_enough(tmp_path, key, count):
    """The rest of the file is zeros, which can be read as strings, numbers and tensors."""
    path = tmp_path / "m.gguf"
    damaged = _claim(path, key, count)
    last = damaged.index(b"tokens") + 22 if key.endswith("tokens") else damaged.index(b"blk.1.ffn_down.weight") + 60
    path.write_bytes(damaged[:last])
    with path.open("r+b") as file:
        file.truncate(2**30)  # takes no space on the disk
    with bounded(2**30):
        assert not refuses_or_reads(load_gguf, path)


def test_arrays_that_are_together_too_long_are_refused(tmp_path, monkeypatch):
    import gguf

    monkeypatch.setattr("omninorm.thinker.gguf._MOST_ITEMS", 100)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for number in range(4):
        writer.add_key_value(f"a{number}", bytes(30), gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(RunError) as error:
        open_gguf(tmp_path / "m.gguf")
    assert "items in arrays" in error.value.received


def test_settings_are_read_as_they_were_written(tmp_path):
    import gguf

    settings = {"a": [3, -1, 2], "b": ["x", "", "ß€"], "c": [0.5], "d": [True, False], "e": "text", "f": 7}
    for order in gguf.GGUFEndian:
        writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", endianess=order)
        for key, value in settings.items():
            kind = gguf.GGUFValueType.get_type(value)
            writer.add_key_value(key, value, kind, gguf.GGUFValueType.get_type(value[0]) if kind == 9 else None)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        read = read_settings(open_gguf(tmp_path / "m.gguf"))
        assert {key: read[key] for key in settings} == settings


def test_a_long_context_takes_no_memory_until_it_is_used(tmp_path):
    gguf_file(tmp_path / "m.gguf", {"context_length": 10**8})
    with bounded(0):
        model = Thinker.from_pretrained(tmp_path / "m.gguf")
    assert model.config.max_seq_len == 10**8
    assert len(model.rotary.cos) < 10**5


def test_rotation_of_a_part_of_each_head_is_refused(tmp_path):
    gguf_file(tmp_path / "m.gguf", {"rope.dimension_count": 2})
    assert not refuses_or_reads(Thinker.from_pretrained, tmp_path / "m.gguf")
