"""Read a run's record and write its report page: read_run, read_frames and write_report."""

from omninorm.report.frames import read_frames
from omninorm.report.page import render, write_page, write_report
from omninorm.report.reading import read_run
from omninorm.report.story import RunStory
from omninorm.report.verdict import Verdict, judge

__all__ = ["RunStory", "Verdict", "judge", "read_frames", "read_run", "render", "write_page", "write_report"]
