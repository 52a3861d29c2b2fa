"""Writes docs/command-line.md from the commands themselves.

python docs/generate.py           # writes it
python docs/generate.py --check   # fails if it is not what would be written
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from omninorm.cli.app import app

PAGE = Path(__file__).with_name("command-line.md")
HEAD = """# Command line

Made from `omninorm --help` by `python docs/generate.py`. Every command ends with 0 if it did what was asked, 1 if a run diverged, 2 for bad input, in one sentence on stderr,
and 130 after Ctrl-C.
"""


def render() -> str:
    root: Any = typer.main.get_command(app)
    lines = [HEAD]
    for name, command in sorted(root.commands.items()):
        if not command.hidden:
            lines.extend(_command(name, command))
    return "\n".join(lines).rstrip() + "\n"


def _command(name: str, command: Any) -> Iterator[str]:
    arguments = [each for each in command.params if each.param_type_name == "argument"]
    options = [each for each in command.params if each.param_type_name == "option" and not each.hidden]
    usage = " ".join(["omninorm", name, "[OPTIONS]", *(_argument(each) for each in arguments)])
    yield f"## omninorm {name}\n"
    yield f"    {usage}\n"
    yield _cell(command.help or "", keep_lines=True) + "\n"
    rows = [(f"`{each.name.upper()}`", each.help or "", "") for each in arguments]
    rows += [(_names(each), each.help or "", _default(each)) for each in options]
    if rows:
        yield "| | | default |\n|---|---|---|"
        yield from (f"| {names} | {_cell(text)} | {default} |" for names, text, default in rows)
        yield ""


def _argument(each: Any) -> str:
    name = each.name.upper()
    return name if each.required else f"[{name}]"


def _names(option: Any) -> str:
    on = ", ".join(f"`{name}`" for name in option.opts)
    off = "".join(f", `{name}`" for name in option.secondary_opts)
    return on + off


def _default(option: Any) -> str:
    shown = option.show_default if isinstance(option.show_default, str) else option.default
    if option.is_flag and not isinstance(option.show_default, str):
        return ""
    return "" if shown is None or callable(shown) else f"`{shown}`"


def _cell(text: str, keep_lines: bool = False) -> str:
    escaped = text.strip().replace("|", "\\|").replace("<", "&lt;")
    return "\n".join(line.strip() for line in escaped.splitlines()) if keep_lines else " ".join(escaped.split())


if __name__ == "__main__":
    page = render()
    if "--check" in sys.argv:
        if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page:
            sys.exit("docs/command-line.md is not what the commands say; run python docs/generate.py")
    else:
        PAGE.write_text(page, encoding="utf-8")
