"""Experiments: training on real text, in runs that can be interrupted at any time and resumed.

The command line is not needed for this.
"""

from omninorm.experiments.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from omninorm.experiments.corpus import Corpus, TokenData, load_corpus, tokenize, windows
from omninorm.experiments.evaluate import bits_per_byte, unigram_bits_per_byte, xz_bits_per_byte
from omninorm.experiments.events import CheckpointEvent, EvalEvent, Event, StepEvent, StopEvent, TrainResult
from omninorm.experiments.interrupt import Interrupt
from omninorm.experiments.optim import build_optimizer
from omninorm.experiments.run_folder import RunFolder, fresh_folder, is_finished
from omninorm.experiments.runs import Plan, Run, build_model, create_run, load_run, open_run, read_plan
from omninorm.experiments.sample import stream_text
from omninorm.experiments.settings import TrainConfig, learning_rate
from omninorm.experiments.tokenizer import BpeTokenizer, ByteTokenizer, build_tokenizer, load_tokenizer
from omninorm.experiments.train import train
from omninorm.record import Record, read_history, read_record

__all__ = [
    "BpeTokenizer",
    "ByteTokenizer",
    "CheckpointEvent",
    "Corpus",
    "EvalEvent",
    "Event",
    "Interrupt",
    "Plan",
    "Record",
    "Run",
    "RunFolder",
    "StepEvent",
    "StopEvent",
    "TokenData",
    "TrainConfig",
    "TrainResult",
    "bits_per_byte",
    "build_model",
    "build_optimizer",
    "build_tokenizer",
    "create_run",
    "fresh_folder",
    "is_finished",
    "learning_rate",
    "list_checkpoints",
    "load_checkpoint",
    "load_corpus",
    "load_run",
    "load_tokenizer",
    "open_run",
    "read_history",
    "read_plan",
    "read_record",
    "save_checkpoint",
    "stream_text",
    "tokenize",
    "train",
    "unigram_bits_per_byte",
    "windows",
    "xz_bits_per_byte",
]
