"""The worked examples of docs/extending.md, applied to a copy of the repository."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
BLOCK = re.compile(
    r"```\{code-block\} python\n:caption: (\S+), (a new file|at the end|(?:after|in the place of): ([^\n]*))\n(.*?)```",
    re.DOTALL,
)


class Edit(NamedTuple):
    path: str
    how: str
    line: str
    content: str


def chapters() -> dict[str, tuple[list[Edit], list[tuple[str, str]]]]:
    """Return each chapter's edits and commands, by its title."""
    by_title = {}
    for part in PAGE.split("\n## ")[1:]:
        edits = [Edit(*match) for match in BLOCK.findall(part)]
        assert len(edits) == part.count("```{code-block}"), "a block whose caption has an unknown form"
        by_title[part.splitlines()[0]] = (
            edits,
            re.findall(r"^    ((?:\w+=\S+ )?)python -m pytest (.*)$", part, re.MULTILINE),
        )
    return by_title


CHAPTERS = chapters()


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for folder in ("src", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def apply(copy: Path, edit: Edit) -> None:
    path = copy / edit.path
    if edit.how == "a new file":
        assert not path.exists()
        path.write_text(edit.content, encoding="utf-8")
        return
    text = path.read_text(encoding="utf-8")
    if edit.how == "at the end":
        path.write_text(text + "\n" + edit.content, encoding="utf-8")
        return
    lines = text.splitlines(keepends=True)
    (at,) = [number for number, line in enumerate(lines) if line.strip() == edit.line]
    kept = lines[at : at + 1] if edit.how.startswith("after") else []
    path.write_text("".join([*lines[:at], *kept, edit.content, *lines[at + 1 :]]), encoding="utf-8")


@pytest.mark.parametrize("title", CHAPTERS)
def test_the_edits_of_a_chapter_apply_and_parse(title: str, tmp_path: Path) -> None:
    edits, commands = CHAPTERS[title]
    assert len(edits) >= 4
    assert commands
    for edit in edits:
        path = tmp_path / edit.path
        path.parent.mkdir(parents=True, exist_ok=True)
        if edit.how != "a new file" and not path.exists():
            shutil.copy(ROOT / edit.path, path)
        apply(tmp_path, edit)
    for edit in edits:
        ast.parse((tmp_path / edit.path).read_text(encoding="utf-8"), edit.path)


@pytest.mark.slow
@pytest.mark.parametrize("title", CHAPTERS)
def test_the_commands_of_a_chapter_pass_after_its_edits(title: str, copy: Path) -> None:
    edits, commands = CHAPTERS[title]
    for edit in edits:
        apply(copy, edit)
    environment = {**os.environ, "PYTHONPATH": str(copy / "src"), "OMP_NUM_THREADS": "1"}
    for variable, command in commands:
        arguments = [part.strip('"') for part in re.findall(r'"[^"]*"|\S+', command)]
        line = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
        extra = dict([variable.strip().split("=")]) if variable else {}
        process = subprocess.run(line, cwd=copy, env=environment | extra, capture_output=True, text=True, check=False)
        assert process.returncode == 0, process.stdout[-3000:]
        assert int(re.search(r"(\d+) passed", process.stdout)[1]) >= 2


def test_the_page_has_all_five_chapters() -> None:
    expected = ["A placement", "A norm", "A signal", "A rule", "A back end"]
    assert [title.split(":")[0] for title in CHAPTERS] == expected


@pytest.mark.parametrize("title", [title for title in CHAPTERS if title.startswith(("A signal", "A rule"))])
def test_a_signal_or_rule_changes_two_source_files_besides_its_registration(title: str) -> None:
    registrations = {"src/omninorm/record/signals.py", "src/omninorm/monitor/rules/__init__.py"}
    sources = {edit.path for edit in CHAPTERS[title][0] if edit.path.startswith("src/")}
    assert len(sources & registrations) == 1
    assert len(sources - registrations) <= 2
