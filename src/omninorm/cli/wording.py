"""Rewords errors for the command line, so that they name options as a user types them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import typer

from omninorm.errors import ConfigError, OmninormError

_KINDS = {"integer": "an integer", "number": "a number", "float": "a number", "boolean": "true or false"}


def bad_value(error: typer.BadParameter, values: Mapping[str, Any]) -> ConfigError | None:
    """Return the error for a value that is not a number; None if Typer's own message is better.

    Args:
        error: Typer's error.
        values: the arguments as they were typed, by parameter name.
    """
    parameter = error.param
    kind = next((ours for theirs, ours in _KINDS.items() if theirs in error.message), None)
    if parameter is None or kind is None or parameter.name not in values:
        return None
    value, flag = values[parameter.name], _flag(parameter)
    if isinstance(value, (tuple, list)):
        received = " ".join(map(str, value))
        return ConfigError(f"{flag} must be {len(value)} {kind.split()[-1]}s", repr(received), "")
    return ConfigError(f"{flag} must be {kind}", repr(value), "")


def extra_arguments(command: Any, extra: Sequence[str]) -> ConfigError:
    """Return the error for arguments that a command does not take."""
    flags = {flag for each in command.params for flag in each.opts}
    first = extra[0]
    if "--resume" in flags and (Path(first) / "config.json").exists():
        remedy = f"pass a run to resume as --resume {first}"
    elif "--text" in flags:
        remedy = f"pass a text as --text {first}"
    else:
        remedy = f"see omninorm {command.name} --help"
    received = " ".join(extra)
    takes = "no arguments" if all(each.param_type_name == "option" for each in command.params) else "fewer arguments"
    return ConfigError(f"omninorm {command.name} takes {takes}", received, remedy)


def use_flags(error: OmninormError, context: typer.Context) -> None:
    """Replace the library's names of settings in an error by the options that set them.

    Names of several words are replaced everywhere. A name of one word, such as `steps`, may be plain English, so it is
    replaced only before `=`, and at the start of the message if the option was given.
    """
    options = list(_options(context))
    given = [each for each in options if _was_given(context, each)]
    # A resumed run has its own settings, so only the options that were typed are named.
    known = given if context.params.get("resume") else options
    for name in ("invariant", "received", "remedy"):
        text = getattr(error, name)
        if isinstance(text, str):
            setattr(error, name, _replace(text, known, given, at_start=name == "invariant"))


def _replace(text: str, known: Sequence[Any], given: Sequence[Any], *, at_start: bool) -> str:
    for option in known:
        text = re.sub(rf"(?<![\w./-]){option.name}=([^\s,;()]+)", partial(_assigned, option), text)
    for option in (each for each in known if "_" in each.name):
        text = re.sub(rf"(?<![\w./-]){option.name}(?![\w/=-]|\.\w)", _flag(option), text)
    if at_start:
        for option in given:
            text = re.sub(rf"^((?:Each of )?){option.name}(?= )", rf"\g<1>{_flag(option)}", text)
    return text


def _assigned(option: Any, found: re.Match[str]) -> str:
    value = found[1]
    if value in ("True", "False") and option.secondary_opts:
        return str((option.opts if value == "True" else option.secondary_opts)[0])
    return f"{_flag(option)} {value.strip(chr(39))}"


def _options(context: typer.Context) -> Iterator[Any]:
    return (each for each in context.command.params if each.param_type_name == "option")


def _was_given(context: typer.Context, option: Any) -> bool:
    source = context.get_parameter_source(option.name)
    return source is not None and source.name == "COMMANDLINE"


def _flag(parameter: Any) -> str:
    return str(parameter.opts[0]) if parameter.param_type_name == "option" else str(parameter.name).upper()
