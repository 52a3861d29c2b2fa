"""`omninorm convert`: surgery on a checkpoint, with verification and undo."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from omninorm.cli.console import CPU_HELP, check_on_cpu, console
from omninorm.cli.counting import Counting
from omninorm.cli.harmless import harmless
from omninorm.errors import ConfigError

if TYPE_CHECKING:
    from omninorm.surgery.convert import Conversion, Tell

_HEADINGS = {
    "swap": "Replaceable norms:",
    "fold": "Folded:",
    "center": "Centered:",
    "fold+center": "Folded and centered:",
    "rotate": "Folded and rotated:",
}


def convert(
    source: Annotated[Path, typer.Argument(help="A Hugging Face folder with safetensors.", show_default=False)],
    target: Annotated[
        Path | None, typer.Argument(help="The new folder; not needed with --dry-run.", show_default=False)
    ] = None,
    swap: Annotated[
        bool, typer.Option("--swap", help="Copy the checkpoint unchanged and list the norms that omninorm can replace.")
    ] = False,
    fold: Annotated[
        bool, typer.Option("--fold", help="Fold γ and β into the linear layers that read the norms' outputs.")
    ] = False,
    center: Annotated[
        bool, typer.Option("--center", help="Remove the mean from the residual stream, so LayerNorm equals RMSNorm.")
    ] = False,
    rotate: Annotated[
        str | None,
        typer.Option(
            "--rotate",
            metavar="KIND",
            help="Rotate the residual stream and the values of heads by a matrix of this kind: hadamard or random. "
            "Gains are folded first.",
            show_default=False,
        ),
    ] = None,
    undone: Annotated[bool, typer.Option("--undo", help="Restore the weights from before a conversion.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be changed without writing anything.")
    ] = False,
    keep_delta: Annotated[
        bool, typer.Option("--delta/--no-delta", help="Save the original values of changed weights for --undo.")
    ] = True,
    device: Annotated[str, typer.Option(help=CPU_HELP)] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Rewrite a checkpoint into an equivalent one, verified in float64. The original is never modified.

    --fold and --center can be combined.

    transformers loads the new folder like the old one. docs/surgery.md explains when a conversion is exact.
    """
    check_on_cpu("convert", device, "it reads each weight from disk a few times and computes little with it")
    given = {"swap": swap, "fold": fold, "center": center, "rotate": rotate is not None, "undo": undone}
    chosen = [name for name, wanted in given.items() if wanted]
    if chosen == ["fold", "center"]:
        chosen = ["fold+center"]
    if len(chosen) != 1:
        received = " and ".join(f"--{name}" for name in chosen) or "none of them"
        remedy = "choose one, or --fold with --center"
        raise ConfigError("Exactly one of --swap, --fold, --center, --rotate and --undo is needed", received, remedy)
    if dry_run and undone:
        raise ConfigError("--dry-run cannot be combined with --undo", "", "leave one of them out")
    if target is None and not dry_run:
        raise ConfigError("The new folder is missing", "", "name it after the source, or pass --dry-run")
    target = None if dry_run else target
    screen = Console(file=sys.stderr, soft_wrap=True, markup=False) if as_json else console()
    with Counting(screen) as counting:

        def tell(what: str, share: float) -> None:
            counting(what, int(100 * share), 100)

        done = _do(source, target, chosen[0], rotate or "hadamard", keep_delta, tell)
    if done is None:
        screen.print(f"Restored bit for bit. Output folder: {harmless(str(target), one_line=True)}")
    elif as_json:
        typer.echo(json.dumps(asdict(done), indent=2))
    else:
        _print(screen, done, target, keep_delta)


def _do(source: Path, target: Path | None, what: str, kind: str, keep_delta: bool, tell: Tell) -> Conversion | None:
    """Convert or undo; return the conversion, or None for an undo."""
    from omninorm.surgery import convert as library  # a late import: this module imports torch

    if what != "undo":
        return library.convert(source, target, what, kind=kind, keep_delta=keep_delta, tell=tell)
    assert target is not None
    library.undo(source, target, tell)
    return None


def _print(screen: Console, done: Conversion, target: Path | None, keep_delta: bool) -> None:
    from omninorm.surgery.convert import DELTA_FILE, PROOF_FILE

    for title, found in ((_HEADINGS[done.operation], done.changed), ("Left unchanged:", done.refused)):
        if found:
            screen.print(title)
        for name, what in found.items():
            screen.print(harmless(f"  {name}: {what}", one_line=True))
    screen.print(f"Verified in float64: maximum relative difference {done.error:.0e}.")
    if done.rounded is not None:
        screen.print(f"After rounding the weights to the checkpoint's dtype: {done.rounded:.0e}.")
    if target is None:
        screen.print("Dry run: nothing was written.")
        return
    kept = f", {DELTA_FILE} for --undo" if keep_delta and (target / DELTA_FILE).exists() else ""
    screen.print(f"Output folder: {harmless(str(target), one_line=True)} (the model, {PROOF_FILE}{kept})")
