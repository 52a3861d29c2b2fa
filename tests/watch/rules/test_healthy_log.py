"""Alarms on the public log of a healthy run, GPT-2 124M: what it costs to listen to the rules."""

from __future__ import annotations

import gzip
import json
import math
from collections import Counter
from pathlib import Path

from omninorm.watch import Facts, History, Step
from omninorm.watch.judge import Judge

LOG = Path(__file__).parents[1] / "data" / "healthy-gpt2-124m.json.gz"


def test_a_healthy_run_of_19560_steps() -> None:
    log = json.loads(gzip.decompress(LOG.read_bytes()))
    history, judge, alarms = History(facts=Facts(every=10)), Judge(), []
    for number, (loss, norm) in enumerate(zip(log["loss"], log["grad_norm"], strict=True), start=1):
        history.steps.append(Step(number, loss / 1e4, norm / 100, math.nan))
        alarms += judge.judge_steps(history, [history.steps[-1]])
    assert number == 19560
    assert [alarm for alarm in alarms if alarm.severity == "fail"] == []
    # OLMo-core's bare 6σ over 128 steps fires at 15 losses and 57 gradient norms of it.
    # Spikes that are 3-fold, too, are 4; only one of them comes again within 64 steps or does harm.
    assert Counter(alarm.rule for alarm in alarms) == {"gradient-spike": 1}
