"""The tables of docs/watching.md list every signal, as in SIGNALS, and every rule."""

from pathlib import Path

from omninorm.monitor import default_rules
from omninorm.record.signals import SIGNALS

PAGE = (Path(__file__).parents[3] / "docs" / "watching.md").read_text(encoding="utf-8")


def rows(of: str) -> dict[str, list[str]]:
    """Return the cells of each row of a section's table, by the name in the first cell."""
    section = PAGE.split(f"\n## {of}\n")[1].split("\n## ")[0].replace("\\|", "¦")
    lines = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| `")]
    return {cells[0].strip(" `"): [cell.strip() for cell in cells[1:]] for cells in lines}


def test_the_table_of_signals_matches_the_code() -> None:
    table = rows("Signals")
    assert list(table) == list(SIGNALS)
    for name, signal in SIGNALS.items():
        assert table[name] == [signal.axis, signal.formula.replace("|", "¦")]


def test_the_table_of_rules_lists_the_default_rules_in_order() -> None:
    assert list(rows("Rules")) == [rule.name for rule in default_rules()]
