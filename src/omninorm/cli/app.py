"""The Typer application. The module of a command is imported when the command is used, but not to list the commands."""

from __future__ import annotations

import ast
import copy
import importlib
import importlib.util
import logging
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from omninorm.cli.wording import bad_value, extra_arguments, use_flags
from omninorm.errors import ConfigError, DataError, InputError

# The commands in the order of the help page. The module `omninorm.cli.NAME` defines the function NAME.
COMMANDS = ("demo", "train", "generate", "compare", "report", "inspect", "diff", "convert", "bench", "doctor")


class _Command(TyperCommand):
    """A command whose help page wraps paragraphs at the width of the terminal instead of where the docstring does.

    Its errors name options as a user types them."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        typed = list(args)
        ctx.allow_extra_args = True  # `extra_arguments` explains them below
        try:
            extra = super().parse_args(ctx, args)
        except typer.BadParameter as error:
            if (own := bad_value(error, self.make_parser(ctx).parse_args(typed)[0])) is None:
                raise
            raise own from error
        if extra:
            raise extra_arguments(self, extra)
        return extra

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (ConfigError, DataError, InputError) as error:
            use_flags(error, ctx)
            raise

    def get_help_option(self, ctx: Any) -> Any:
        return _hide_type(super().get_help_option(ctx))

    def format_help(self, ctx: Any, formatter: Any) -> None:
        shown: Any = copy.copy(self)
        shown.__class__ = TyperCommand
        shown.help = "\n\n".join(" ".join(part.split()) for part in (self.help or "").split("\n\n"))
        shown.format_help(ctx, formatter)


class _Commands(Mapping[str, Any]):
    """The commands by name, each imported when it is looked up."""

    def __getitem__(self, name: str) -> Any:
        if name not in COMMANDS:
            raise KeyError(name)
        module = importlib.import_module(f"omninorm.cli.{name}")
        single = typer.Typer(add_completion=False, context_settings=_SETTINGS)
        single.command(name, cls=_Command)(getattr(module, name))
        command = typer.main.get_command(single)
        for parameter in command.params:
            _show_plain_default(parameter)
            if getattr(parameter, "is_flag", False):
                _hide_type(parameter)
        return command

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


class _LazyGroup(TyperGroup):
    """A group that imports a command only to run it or to print its own help."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = _Commands()  # type: ignore[assignment]

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # Typer would exit without a message
            typer.echo("omninorm: Interrupted.", err=True)
            raise typer.Exit(128 + signal.SIGINT) from None

    def get_help_option(self, ctx: Any) -> Any:
        return _hide_type(super().get_help_option(ctx))

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        listing: Any = copy.copy(self)
        listing.__class__ = TyperGroup
        listing.commands = {name: TyperCommand(name, help=_summary(name)) for name in COMMANDS}
        listing.format_help(ctx, formatter)


_SETTINGS = {"help_option_names": ["-h", "--help"]}

app = typer.Typer(
    cls=_LazyGroup,
    help="Normalization for PyTorch transformers, from the layer to the training run.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings=_SETTINGS,
)


def _summary(name: str) -> str:
    """Return the first paragraph of a command's docstring, read from its source because importing it is slow."""
    spec = importlib.util.find_spec(f"omninorm.cli.{name}")
    assert spec is not None
    assert spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    function = next(each for each in tree.body if isinstance(each, ast.FunctionDef) and each.name == name)
    return (ast.get_docstring(function) or "").split("\n\n")[0]


def _show_plain_default(parameter: Any) -> None:
    """Show a default that is a text without the parentheses in which Typer puts it."""
    if isinstance(parameter.show_default, str) and hasattr(parameter, "_get_default_string"):
        parameter._get_default_string = lambda **_: parameter.show_default


def _hide_type(option: Any) -> Any:
    """Hide a flag's type, `<bool>`, on the help page, because a flag takes no value; return the option."""
    if option is not None:
        option.metavar = ""
    return option


def _version() -> str:
    from importlib import metadata  # a late import: it takes longer than printing the help page

    try:
        return metadata.version("omninorm")
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _show_version(requested: bool) -> None:
    if requested:
        typer.echo(f"omninorm {_version()}")
        raise typer.Exit


@app.callback()
def _omninorm(
    version: Annotated[
        bool,
        typer.Option(
            "--version", metavar="", callback=_show_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    # The commands print alarms themselves, so the library's log would repeat them.
    log = logging.getLogger("omninorm.watch")
    log.propagate = False
    log.addHandler(logging.NullHandler())
