"""Readable explanations of errors in a plan's file, with the line number."""

from __future__ import annotations

import re

import yaml

# Patterns of PyYAML's messages, our explanations, and "opened" if the line to report is where the construct starts.
_YAML = (
    (r"^expected <block end>", "the indentation does not match the lines above", ""),
    (r"cannot start any token", "a value can't start with {0}: indent with spaces, or put the value in quotes", ""),
    (r"unexpected end of stream", "a quotation mark is not closed", "opened"),
    (r"^expected ',' or '([\]}])'", "a bracket is not closed: {0} is missing", "opened"),
    (r"^mapping values are not allowed", "a colon is not allowed here: check the indentation, or quote the text", ""),
    (r"^could not find expected ':'", "a colon is missing after the key", ""),
    (r"^found undefined alias", "the alias {0} is not defined", ""),
    (r"^could not determine a constructor", "the tag {0} is not supported", ""),
    (r"^found another document|^but found another document", "a second document starts here", ""),
    (r"^found unhashable key", "a key must be plain text", ""),
)  # fmt: skip


def explain(error: Exception, content: bytes) -> str:
    """Return the reason why a plan's file can't be read, such as "line 3: a quotation mark is not closed"."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, UnicodeDecodeError):
        line = 1 + content.count(b"\n", 0, error.start)
        return f"line {line} holds the byte 0x{content[error.start]:02x}, which is not UTF-8"
    if isinstance(error, yaml.MarkedYAMLError):
        return _explain_yaml(error)
    text = " ".join(str(error).split())[:300]
    # JSON's errors end in "line 1 column 14 (char 13)", and TOML's in "(at line 1, column 5)".
    found = re.match(r"(.*?):? \(?(?:at )?line (\d+),? column (\d+)", text)
    return text if found is None else f"line {found[2]}, column {found[3]}: {found[1][:1].lower()}{found[1][1:]}"


def _explain_yaml(error: yaml.MarkedYAMLError) -> str:
    problem = " ".join((error.problem or error.context or "").split())[:300]
    mark = error.problem_mark or error.context_mark
    for pattern, words, where in _YAML:
        if re.search(pattern, problem):
            quoted = re.search(r"'([^']+|'(?='))'", problem)
            problem = words.format(f"'{quoted[1]}'".replace(r"'\t'", "a tab") if quoted else "this")
            mark = error.context_mark or mark if where else mark
            break
    return problem if mark is None else f"line {mark.line + 1}: {problem}"
