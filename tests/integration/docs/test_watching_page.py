"""docs/watching.md: its tables list every signal, as in SIGNALS, and every rule; its code is that of the examples."""

import re
from pathlib import Path

import pytest
import torch

import omninorm
from omninorm.monitor import default_rules
from omninorm.monitor.rules import Rule
from omninorm.record.signals import SIGNALS

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "watching.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


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


def test_the_quoted_code_is_that_of_the_example() -> None:
    example = (ROOT / "examples" / "find_a_fault.py").read_text(encoding="utf-8")
    quoted = [block for block in BLOCKS if block.startswith("class ") and "Block(Block)" in block]
    assert len(quoted) == 2
    for block in quoted:
        assert block in example


class FailAtOnce(Rule):
    name = "fail-at-once"

    def on_step(self, history, step):
        yield self.alarm(step.step, "fail", "layer", "It failed.", "Try again.")


def test_the_sink_and_the_stop_of_the_page_work(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = [block for block in BLOCKS if "class Pager" in block]
    scope = {"omninorm": omninorm}
    exec(block, scope)
    model, pager, stop = torch.nn.Linear(2, 2), scope["Pager"](), scope["stop_on_failure"]
    with omninorm.watch(model, rules=[FailAtOnce()], sinks=[pager]) as w:
        stop(w)  # nothing has failed before the first step
        loss = model(torch.ones(1, 2)).sum()
        loss.backward()
        w.step(loss)
        with pytest.raises(RuntimeError, match=r"^It failed\. Try again\.$"):
            stop(w)
    assert capsys.readouterr().out == "step 1, fail-at-once in layer: It failed.\n"
