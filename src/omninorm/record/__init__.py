"""A run's record and the files beside it, written so that nothing is ever lost by halves."""

from omninorm.record.jsonl import RECORD_FILE, Record, final_status, read_history, read_record

__all__ = ["RECORD_FILE", "Record", "final_status", "read_history", "read_record"]
