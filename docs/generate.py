"""Generate command-line.md from the help, and the tables between <!-- name --> and <!-- end --> from results.

python docs/generate.py           # write the pages
python docs/generate.py --check   # fail if a page is out of date
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from omninorm.cli.app import app
from omninorm.experiments.demo import VARIANTS

DOCS = Path(__file__).parent
README = DOCS.parent / "README.md"
HEAD = """# Command line

Generated from `omninorm --help` by `python docs/generate.py`.

Exit codes: 0 on success, 1 if a run diverged, an inspected checkpoint fails or differs from
another, or two models part, 2 for bad input (with one line on stderr), 130 after Ctrl-C and 143
after SIGTERM.
"""


def pages() -> dict[Path, str]:
    """Return the content of every generated page, by file."""
    performance = DOCS / "performance.md"
    return {
        DOCS / "command-line.md": command_line(),
        README: _filled(README, "demo", _demo()),
        performance: _filled(performance, "targets", _targets()),
    }


def _filled(page: Path, name: str, table: Iterator[str]) -> str:
    """Return the page's text with the table between its markers."""
    text = page.read_text(encoding="utf-8")
    content = "\n".join(table)
    filled, count = re.subn(
        rf"(<!-- {name} -->\n).*?(<!-- end -->)", lambda m: f"{m[1]}{content}\n{m[2]}", text, flags=re.DOTALL
    )
    assert count == 1, page
    return filled


def _demo() -> Iterator[str]:
    results = json.loads((DOCS / "demo.json").read_text(encoding="utf-8"))
    yield "| model | held-out bits per byte | largest gradient norm | verdict |\n|---|---|---|---|"
    for run in results["runs"]:
        bits = "–" if run["bits_per_byte"] is None else f"{run['bits_per_byte']:.3f}"
        gradient = "not finite" if run["largest_grad_norm"] is None else f"{run['largest_grad_norm']:.3g}"
        yield f"| {VARIANTS[run['name']][0]} | {bits} | {gradient} | {run['verdict']} |"
    yield f"| *unigram baseline* | {results['baselines']['unigram']:.3f} | | |"


def _targets() -> Iterator[str]:
    yield "| target | limit | worst | median | verdict |\n|---|---|---|---|---|"
    for each in json.loads((DOCS / "bench.json").read_text(encoding="utf-8"))["targets"]:
        met = f"{each['sizes'] - len(each['missed'])}/{each['sizes']}"
        verdict = f"{'**missed**' if each['verdict'] == 'FAIL' else 'met'}, {met}"
        yield f"| {each['name']} | {each['wanted']} | {each['worst']:.2f} | {each['median']:.2f} | {verdict} |"


def command_line() -> str:
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
    for path, page in pages().items():
        if "--check" not in sys.argv:
            path.write_text(page, encoding="utf-8")
        elif path.read_text(encoding="utf-8") != page:
            sys.exit(f"{path.name} is out of date. Run python docs/generate.py.")
