"""Opening of safetensors files, whose headers may be damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from omninorm.errors import RunError
from omninorm.record.tensors import open_safetensors


@pytest.mark.parametrize("damage", [{"dtype": "F32\n" * 5000}, {"shape": ["x" * 10_000]}], ids=["dtype", "shape"])
def test_a_message_quotes_only_the_beginning_of_a_damaged_header(tmp_path: Path, damage: dict[str, object]) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **damage}}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(RunError) as error:
        open_safetensors(path)
    assert str(path) in error.value.invariant
    assert "header" in error.value.invariant
    assert len(str(error.value)) < 500 + len(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [None, b"", b"\xff" * 100])
def test_a_file_that_is_missing_or_no_safetensors_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "model.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RunError) as error:
        open_safetensors(path)
    assert str(path) in error.value.invariant
