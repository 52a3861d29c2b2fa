"""Read the records of runs and write their pages: read_run, read_frames, write_report and write_pair."""

from omninorm.report.frames import read_frames
from omninorm.report.page import render, write_page, write_report
from omninorm.report.pair import read_pair, write_pair
from omninorm.report.parting import Difference, Parting, compare
from omninorm.report.reading import read_run
from omninorm.report.story import RunStory
from omninorm.report.verdict import Verdict, judge

__all__ = [
    "Difference",
    "Parting",
    "RunStory",
    "Verdict",
    "compare",
    "judge",
    "read_frames",
    "read_pair",
    "read_run",
    "render",
    "write_page",
    "write_pair",
    "write_report",
]
