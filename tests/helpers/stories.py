"""Run stories for report tests: read from a synthetic record, or reduced to a few losses."""

from __future__ import annotations

from dataclasses import replace

from helpers import synthetic_run as synthetic

from omninorm.report import read_run
from omninorm.report.story import Ending, RunStory, Series, StoryAlarm


def story_of(tmp_path, **options) -> RunStory:
    return read_run(synthetic.run(tmp_path / "run", **options))


def alarm(step, severity="fail", layer="blocks.1", **given) -> StoryAlarm:
    values = {"rule": "rule", "evidence": "it was too large", "remedy": "try less", "source": ""}
    return StoryAlarm(step, severity, layer=layer, **values | given)


def of_losses(story, *losses):
    series = Series(list(range(1, len(losses) + 1)), list(losses))
    return replace(
        story,
        alarms=[],
        ending=Ending(len(losses), "done"),
        series={"loss": series},
        evals=Series([], []),
        columns=story.columns[:1],
    )
