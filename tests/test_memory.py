"""The memory that this process may use: the machine's, or less in a container."""

from __future__ import annotations

from pathlib import Path

import pytest

from omninorm import memory


@pytest.mark.parametrize(
    ("machine", "cgroups", "limit"),
    [
        (8000, ["3000\n"], 3000),
        (8000, ["9000\n"], 8000),
        (8000, ["max\n"], 8000),
        (8000, [], 8000),
        (8000, ["max\n", "2000\n"], 2000),
        (8000, ["9223372036854771712\n"], 8000),
        (8000, ["", "ß"], 8000),
        (None, ["3000\n"], 3000),
        (None, [], None),
    ],
)
def test_limit_is_the_smaller_of_memory_and_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: int | None, cgroups: list[str], limit: int | None
) -> None:
    for number, content in enumerate(cgroups):
        (tmp_path / str(number)).write_text(content, encoding="utf-8")
    monkeypatch.setattr(memory, "memory_bytes", lambda: machine)
    monkeypatch.setattr(memory, "_CGROUP_LIMITS", (tmp_path / "0", tmp_path / "1"))
    assert memory.memory_limit() == limit
