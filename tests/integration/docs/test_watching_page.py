"""docs/watching.md names every signal and every rule, with what the table of signals says."""

from pathlib import Path

from omninorm.record.signals import SIGNALS
from omninorm.watch import default_rules

PAGE = (Path(__file__).parents[3] / "docs" / "watching.md").read_text(encoding="utf-8")


def rows(of: str) -> dict[str, list[str]]:
    """The cells of each row in a section's first table, by the name in its first cell."""
    section = PAGE.split(f"\n## {of}\n")[1].split("\n## ")[0].replace("\\|", "¦")
    lines = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| `")]
    return {cells[0].strip(" `"): [cell.strip() for cell in cells[1:]] for cells in lines}


def test_signals() -> None:
    found = rows("Signals")
    assert list(found) == list(SIGNALS)
    for name, signal in SIGNALS.items():
        assert found[name] == [signal.axis, signal.formula.replace("|", "¦")]


def test_rules() -> None:
    assert list(rows("Rules")) == [rule.name for rule in default_rules()]
