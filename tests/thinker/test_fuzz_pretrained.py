"""Damaged Hugging Face folders: each is read, or refused by an OmninormError, within limits of time and memory."""

from __future__ import annotations

import json

import pytest
from helpers.mutations import bounded, cases, mutated_bytes, mutated_json, refuses_or_reads
from helpers.tiny_files import CONFIG, hugging_face

from omninorm.errors import OmninormError
from omninorm.thinker import Thinker


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return hugging_face(tmp_path_factory.mktemp("folder"))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "model-1.safetensors"])
def test_a_damaged_file_is_read_or_refused(folder, name):
    path = folder / name
    good = path.read_bytes()
    Thinker.from_pretrained(folder)
    read = 0
    try:
        for case in range(cases(60)):
            damaged = mutated_json(json.loads(good), case) if name.endswith(".json") else mutated_bytes(good, case)
            path.write_bytes(damaged)
            with bounded(len(damaged)):
                read += refuses_or_reads(Thinker.from_pretrained, folder)
    finally:
        path.write_bytes(good)
    assert 0 < read < cases(60)


def test_a_damaged_header_of_the_weights_is_read_or_refused(folder):
    path = folder / "model-1.safetensors"
    good = path.read_bytes()
    size = int.from_bytes(good[:8], "little")
    header, weights = json.loads(good[8 : 8 + size]), good[8 + size :]
    read = 0
    try:
        # Nearly every change of a header is refused, so the undamaged one must be among those that are read.
        for damaged in (json.dumps(header).encode(), *(mutated_json(header, case) for case in range(cases(100)))):
            path.write_bytes(len(damaged).to_bytes(8, "little") + damaged + weights)
            with bounded(len(damaged) + len(weights)):
                read += refuses_or_reads(Thinker.from_pretrained, folder)
    finally:
        path.write_bytes(good)
    assert 0 < read < 1 + cases(100)


@pytest.mark.parametrize("key", [key for key, value in CONFIG.items() if type(value) is int])
def test_a_size_that_the_weights_do_not_have_is_refused(folder, key):
    path = folder / "config.json"
    good = path.read_bytes()
    read = []
    try:
        for size in (0, 1, 3, 10**5, 2**31, 2**63, 10**18, 10**23, -1, 1e18, "8", None, [8]):
            path.write_text(json.dumps({**CONFIG, key: size}))
            with bounded(0):
                read += [size] if refuses_or_reads(Thinker.from_pretrained, folder) else []
    finally:
        path.write_bytes(good)
    # Any context is possible; one key head is what the weights have; head_dim follows from the other sizes.
    possible = {
        "max_position_embeddings": [1, 3, 10**5, 2**31, 2**63, 10**18, 10**23],
        "num_key_value_heads": [1],
        "head_dim": [None],
    }
    assert read == possible.get(key, [])


def test_a_long_context_takes_no_memory_until_it_is_used(folder):
    path = folder / "config.json"
    good = path.read_bytes()
    path.write_text(json.dumps({**CONFIG, "max_position_embeddings": 10**8}))
    try:
        with bounded(0):
            model = Thinker.from_pretrained(folder)
            assert len(model.generate([[1, 2]], 3)[0]) == 3
    finally:
        path.write_bytes(good)
    assert model.config.max_seq_len == 10**8
    assert len(model.rotary.cos) < 10**5


def test_too_many_layers_are_named(folder):
    path = folder / "config.json"
    good = path.read_bytes()
    path.write_text(json.dumps({**CONFIG, "num_hidden_layers": 10**23}))
    try:
        with pytest.raises(OmninormError) as caught:
            Thinker.from_pretrained(folder)
    finally:
        path.write_bytes(good)
    assert str(10**23) in caught.value.invariant
    assert "the weights have 2" in caught.value.invariant
