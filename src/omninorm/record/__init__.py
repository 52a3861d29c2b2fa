"""The record of a run, and atomic file writes."""

from omninorm.record.jsonl import RECORD_FILE, Record, final_status, read_history, read_record

__all__ = ["RECORD_FILE", "Record", "final_status", "read_history", "read_record"]
