"""`omninorm diff`: run two models on the same input and name the module in which they first part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from omninorm.cli.console import DEVICE_HELP, console
from omninorm.cli.harmless import harmless
from omninorm.config import check_choice, check_count
from omninorm.errors import ConfigError

if TYPE_CHECKING:
    from omninorm.surgery import FirstDifference, ModuleDifference

DIFFERENT = 1
DTYPES = ("float64", "float32", "bfloat16", "float16", "as-is")
_BEFORE = 4  # modules shown before the first in which the models part


def diff(
    a: Annotated[
        Path,
        typer.Argument(
            metavar="A", help="A Hugging Face folder, the folder of a run, or a .gguf file.", show_default=False
        ),
    ],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another one, of the same model.", show_default=False)],
    text: Annotated[
        Path | None,
        typer.Option(help="Text file to run both on, encoded by A's tokenizer.", show_default="random tokens"),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Maximum number of tokens of the text.")] = 128,
    seed: Annotated[int, typer.Option(help="Random seed of the tokens without --text.")] = 0,
    dtype: Annotated[str, typer.Option(help=f"Dtype to run both in: {', '.join(DTYPES)}.")] = "float64",
    limit: Annotated[
        float | None,
        typer.Option(
            help="Largest relative difference of one module that counts as rounding.",
            show_default="by the dtype: 1e-10 in float64, 1e-06 there between different classes",
        ),
    ] = None,
    top: Annotated[int, typer.Option(help="Maximum number of modules to show.")] = 12,
    page: Annotated[
        Path | None, typer.Option("--html", help="Also write a page with every module.", show_default=False)
    ] = None,
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object with every module.")] = False,
) -> None:
    """Run two models on the same input and name the module in which they first part: same inputs, other outputs.

    For a trainer against an inference engine, a refactored model against the original, or two dtypes. To compare
    weights without running the models, use omninorm inspect A --against B.

    Exits with 1 if the models part by more than rounding.
    """
    check_choice("dtype", dtype, DTYPES)
    check_count("tokens", tokens)
    check_count("top", top, at_least=0)
    if page is not None and page.suffix != ".html":
        raise ConfigError(
            "The page must end in .html", str(page), f"write for example --html {page.with_suffix('.html')}"
        )
    found, described = _find(a, b, (text, tokens, seed), dtype, limit, device)
    record = {"a": str(a), "b": str(b), **described, **found.to_record()}
    if page is not None:
        from omninorm.report.difference import write_difference

        write_difference(record, page)
    if as_json:
        typer.echo(json.dumps(record, indent=2, allow_nan=False))
    else:
        _show(console(), record, found, top, page)
    if found.kind == "different":
        raise typer.Exit(DIFFERENT)


def _find(
    a: Path, b: Path, source: tuple[Path | None, int, int], dtype: str, limit: float | None, device: str
) -> tuple[FirstDifference, dict[str, str]]:
    """Load both models and compare them; also return their classes and the input, in words."""
    import torch  # here, because it takes seconds to import

    from omninorm.device import find_device
    from omninorm.experiments.models import check_vocabulary, load_model, tokens_of
    from omninorm.surgery import first_difference

    place, (text, most, seed) = find_device(device), source
    (one, one_tokenizer), (other, other_tokenizer) = load_model(a), load_model(b)
    inputs: list[torch.Tensor] | None = None
    described = f"random tokens from seed {seed}, because no --text was given"
    if text is not None:
        ids = tokens_of(text, (one_tokenizer, other_tokenizer), most)
        for model in (one, other):
            check_vocabulary(model, ids)
        inputs, described = [ids.to(place)], f"the first {ids.shape[1]} tokens of {text}"
    precision = None if dtype == "as-is" else getattr(torch, dtype)
    found = first_difference(one.to(place), other.to(place), inputs, dtype=precision, limit=limit, seed=seed)
    return found, {"class_a": type(one).__name__, "class_b": type(other).__name__, "input": described}


def _show(screen: Console, record: dict[str, str], found: FirstDifference, top: int, page: Path | None) -> None:
    screen.print(_line(found.verdict), style="bold")
    for sentence in found.details:
        screen.print(_line(sentence))
    screen.print()
    screen.print(_line(f"A: {record['a']} ({record['class_a']})"))
    screen.print(_line(f"B: {record['b']} ({record['class_b']})"))
    dtype = "in the dtypes of their weights" if found.dtype == "as they are" else f"in {found.dtype}"
    screen.print(_line(f"Input: {record['input']}, {dtype}."))
    screen.print(f"Counts as rounding: {found.allowance}.")
    if rows := _rows(found, top):
        screen.print()
        screen.print(_table(rows))
    if page is not None:
        screen.print(f"Page: {_line(str(page))}")


def _rows(found: FirstDifference, top: int) -> list[ModuleDifference]:
    """Return the modules around the first in which the models part, or else those that differ the most."""
    modules = list(found.modules)
    if found.kind == "equal":
        return []
    if found.first is None:
        return sorted(modules, key=lambda each: -each.size)[:top]
    place = modules.index(found.first)
    start = max(0, place - min(_BEFORE, max(0, top - 1)))
    return modules[start : start + top]


def _table(rows: list[ModuleDifference]) -> Table:
    title = "relative differences: of what modules receive and return, and of what they return for the same input"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name in ("module", "inputs", "outputs", "same input"):
        table.add_column(name, justify="left" if name == "module" else "right", overflow="fold")
    for each in rows:
        numbers = ("–" if value is None else f"{value:.2g}" for value in (each.inputs, each.outputs, each.fed))
        table.add_row(_line(each.label), *numbers, style="bold red" if each.parts else None)
    return table


def _line(text: str) -> str:
    return harmless(text, one_line=True)
