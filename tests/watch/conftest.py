"""What the rules' alarms say, word for word."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from omninorm.watch import Alarm
from omninorm.watch.rules import Rule

# Sentences are what a user gets. To change one, run the tests with OMNINORM_UPDATE_WORDS=1, and read the difference.
WORDS = Path(__file__).parent / "data" / "words.json"
UPDATE = "OMNINORM_UPDATE_WORDS"


@pytest.fixture
def words(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compares everything that rules say during a test with what is written down."""
    said: list[list[str | None]] = []
    made = Rule.alarm

    def alarm(self: Rule, step: int, severity: str, layer: str | None, evidence: str, remedy: str) -> Alarm:
        said.append([self.name, severity, layer, evidence, remedy])
        return made(self, step, severity, layer, evidence, remedy)

    monkeypatch.setattr(Rule, "alarm", alarm)
    yield
    if "junk" in request.node.name:
        return
    different = first_and_last(said)
    known = json.loads(WORDS.read_text(encoding="utf-8")) if WORDS.exists() else {}
    if os.environ.get(UPDATE):
        known[request.node.name] = different
        kept = {name: sentences for name, sentences in sorted(known.items()) if sentences}
        WORDS.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    else:
        assert different == known.get(request.node.name, [])


def first_and_last(said: list[list[str | None]]) -> list[list[str | None]]:
    """What each rule says of a layer at first and at last."""
    by_subject: dict[tuple[str | None, ...], list[list[str | None]]] = {}
    for each in said:
        by_subject.setdefault(tuple(each[:3]), []).append(each)
    return [each for told in by_subject.values() for each in (told[:1] if told[0] == told[-1] else [told[0], told[-1]])]
