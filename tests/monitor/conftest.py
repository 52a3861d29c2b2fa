"""A snapshot of the alarms' texts: every message that a rule can produce, with its numbers left out."""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from omninorm.monitor import Alarm
from omninorm.monitor.rules import Rule

WORDS = Path(__file__).parent / "data" / "words.json"
# With this variable set, the texts of every rule that the tests exercise are written to the file instead of compared.
UPDATE = "OMNINORM_UPDATE_WORDS"
NUMBER = re.compile(r"(?<![A-Za-z\d])\d+(?:,\d{3})*(?:\.\d+)?(?:e[+-]?\d+)?")
Texts = defaultdict[str, set[tuple[str, str]]]


@pytest.fixture(scope="session")
def snapshot() -> Iterator[tuple[Texts, Texts]]:
    """The texts in the file and those seen in this session: by rule, pairs of remedy and evidence."""
    known, seen = Texts(set), Texts(set)
    stored = json.loads(WORDS.read_text(encoding="utf-8")) if WORDS.exists() else {}
    for rule, remedies in stored.items():
        known[rule] = {(remedy, evidence) for remedy, texts in remedies.items() for evidence in texts}
    yield known, seen
    if os.environ.get(UPDATE):
        by_rule: dict[str, dict[str, list[str]]] = {}
        for rule, pairs in sorted({**known, **seen}.items()):
            for remedy, evidence in sorted(pairs):
                by_rule.setdefault(rule, {}).setdefault(remedy, []).append(evidence)
        WORDS.write_text(json.dumps(by_rule, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@pytest.fixture
def words(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, snapshot: tuple[Texts, Texts]
) -> Iterator[None]:
    """Fails a test in which a rule produces a text that is not in the snapshot."""
    produced = Texts(set)
    original = Rule.alarm

    def alarm(self: Rule, step: int, severity: str, layer: str | None, evidence: str, remedy: str) -> Alarm:
        produced[self.name].add((without_numbers(remedy, layer), without_numbers(evidence, layer)))
        return original(self, step, severity, layer, evidence, remedy)

    monkeypatch.setattr(Rule, "alarm", alarm)
    yield
    if "junk" in request.node.name:  # its numbers are not what a run can have
        return
    known, seen = snapshot
    for rule, pairs in produced.items():
        seen[rule] |= pairs
        if not os.environ.get(UPDATE):
            assert pairs <= known[rule], f"{rule} has new texts; compare them with {WORDS.name}, or set {UPDATE}=1"


def without_numbers(text: str, layer: str | None) -> str:
    """The text with its numbers as # and the alarm's own layer as a placeholder; another layer's name stays visible."""
    return NUMBER.sub("#", text.replace(layer, "{layer}") if layer else text)
