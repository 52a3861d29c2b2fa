"""A run's record, and files that are written atomically."""

from omninorm.record.jsonl import RECORD_FILE, Record, final_status, read_history, read_record

__all__ = ["RECORD_FILE", "Record", "final_status", "read_history", "read_record"]
