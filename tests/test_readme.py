"""The README's examples print what it says they print."""

import contextlib
import io
import re
import textwrap
from pathlib import Path

import pytest
import yaml

from omninorm.experiments.compare import parse_plan

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def examples(page: str) -> list[tuple[str, str]]:
    """Blocks of Python, each with the indented output that follows it."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```\n\n((?: {4}[^\n]*\n)+)", text, re.DOTALL)


EXAMPLES = examples("README.md")


@pytest.mark.parametrize(("code", "output"), EXAMPLES)
def test_examples_print_what_they_say(code: str, output: str) -> None:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    assert printed.getvalue() == textwrap.dedent(output)


@pytest.mark.parametrize(("code", "output"), examples("docs/surgery.md"))
def test_the_cookbooks_examples_print_what_they_say(code: str, output: str) -> None:
    test_examples_print_what_they_say(code, output)


@pytest.mark.parametrize(("page", "cells"), [("README.md", 2 * 3 * 2 * 5), ("docs/comparing.md", 2 * 3 * 2 * 5)])
def test_plans_are_plans(page: str, cells: int) -> None:
    (plan,) = re.findall(r"```yaml\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    assert len(parse_plan(yaml.safe_load(plan), page).cells()) == cells


def test_all_examples_were_found() -> None:
    assert len(EXAMPLES) == README.count("```python") == 4
