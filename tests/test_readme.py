"""The README's examples print what it says they print."""

import contextlib
import io
import re
import textwrap
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
# A block of Python, and the indented output that follows it.
EXAMPLES = re.findall(r"```python\n(.*?)```\n\n((?: {4}[^\n]*\n)+)", README, re.DOTALL)


@pytest.mark.parametrize(("code", "output"), EXAMPLES)
def test_examples_print_what_they_say(code: str, output: str) -> None:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    assert printed.getvalue() == textwrap.dedent(output)


def test_all_examples_were_found() -> None:
    assert len(EXAMPLES) == README.count("```python") == 3
