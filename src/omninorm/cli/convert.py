"""`omninorm convert`: surgery on a checkpoint, with proof and undo."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from omninorm.cli.console import console
from omninorm.cli.counting import Counting
from omninorm.cli.harmless import harmless
from omninorm.errors import ConfigError
from omninorm.surgery.convert import DELTA_FILE, PROOF_FILE, Conversion, Tell, undo
from omninorm.surgery.convert import convert as operate


def convert(
    source: Annotated[Path, typer.Argument(help="A Hugging Face folder with safetensors.", show_default=False)],
    target: Annotated[Path | None, typer.Argument(help="The new folder.", show_default=False)] = None,
    swap: Annotated[bool, typer.Option("--swap", help="Copy it, and say which norms omninorm can replace.")] = False,
    fold: Annotated[bool, typer.Option("--fold", help="Move γ and β into the matrices behind the norms.")] = False,
    center: Annotated[bool, typer.Option("--center", help="Take the mean out of the residual stream.")] = False,
    undone: Annotated[bool, typer.Option("--undo", help="Restore what an earlier conversion changed.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done, and write nothing.")] = False,
    keep_delta: Annotated[
        bool, typer.Option("--delta/--no-delta", help="Keep the changed weights as they were, for --undo.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")] = False,
) -> None:
    """Operate on a checkpoint: exactly, proved in float64, and never on the original.

    The new folder loads in transformers as the old one did. See docs/surgery.md for when it is exact and when not.
    """
    chosen = [name for name, given in (("swap", swap), ("fold", fold), ("center", center), ("undo", undone)) if given]
    if len(chosen) != 1:
        received = " and ".join(f"--{name}" for name in chosen) or "none"
        raise ConfigError("a conversion is one of --swap, --fold, --center, --undo", received, "choose one")
    if (target is None) != (dry_run and not undone):
        received = "no new folder" if target is None else f"{target} and --dry-run"
        raise ConfigError("a conversion writes a new folder, or with --dry-run none", received, "name one, or neither")
    screen = Console(file=sys.stderr, soft_wrap=True, markup=False) if as_json else console()
    with Counting(screen) as counting:

        def tell(what: str, share: float) -> None:
            counting(what, int(100 * share), 100)

        done = _do(source, target, chosen[0], keep_delta, tell)
    if done is None:
        screen.print(f"Restored bit for bit. Written to {harmless(str(target), one_line=True)}")
    elif as_json:
        typer.echo(json.dumps(asdict(done), indent=2))
    else:
        _tell(screen, done, target, keep_delta)


def _do(source: Path, target: Path | None, what: str, keep_delta: bool, tell: Tell) -> Conversion | None:
    """What was converted; None where it was undone."""
    if what != "undo":
        return operate(source, target, what, keep_delta=keep_delta, tell=tell)
    assert target is not None
    undo(source, target, tell)
    return None


def _tell(screen: Console, done: Conversion, target: Path | None, keep_delta: bool) -> None:
    for title, found in ((f"{done.operation}:", done.changed), ("left as they are:", done.refused)):
        if found:
            screen.print(title)
        for name, what in found.items():
            screen.print(harmless(f"  {name}: {what}", one_line=True))
    screen.print(f"Proof: outputs in float64 are {done.error:.0e} of the largest apart.")
    if done.rounded is not None:
        screen.print(f"With the weights as they were written, rounded once, {done.rounded:.0e}.")
    if target is None:
        screen.print("Nothing was written.")
        return
    kept = f", {DELTA_FILE} for --undo" if keep_delta and (target / DELTA_FILE).exists() else ""
    screen.print(f"Written to {harmless(str(target), one_line=True)}: the model, {PROOF_FILE}{kept}")
