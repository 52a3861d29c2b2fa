"""The worker process: reads cells from stdin, one JSON line each, and reports their results on stdout."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from omninorm.device import find_device
from omninorm.errors import OmninormError
from omninorm.experiments.compare.cells import Cell
from omninorm.experiments.compare.factory import CPU
from omninorm.experiments.compare.protocols import measure
from omninorm.experiments.compare.store import Store
from omninorm.experiments.corpus import Corpus, load_corpus
from omninorm.experiments.workers import end_with_parent

READY = {"ready": True}  # sent once, after all imports


def main(parent: int, folder: str, device: str) -> None:
    """Run cells on a device until stdin or the parent process ends."""
    end_with_parent(parent)
    torch.set_num_threads(1)
    store, texts, place = Store(Path(folder)), _Texts(), find_device(device)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries may print to stdout
    print(json.dumps(READY), file=answers, flush=True)
    for line in sys.stdin:
        cell = Cell.from_dict(json.loads(line))
        print(json.dumps(run(cell, store, texts.read, place)), file=answers, flush=True)


def run(cell: Cell, store: Store, read: Any = load_corpus, device: torch.device = CPU) -> dict[str, str]:
    """Run a cell and store its outcome; return {"done": id} or {"failed": id, "why": …}."""
    try:
        store.save(cell, measure(cell, read(cell.text), device))
        return {"done": cell.id}
    except OmninormError as error:
        return {"failed": cell.id, "why": str(error)}
    except Exception as error:  # a failed cell must not end the others
        return {"failed": cell.id, "why": f"{type(error).__name__}: {error}"}


class _Texts:
    """A cache of the last text, because the next cell usually has the same one."""

    def __init__(self) -> None:
        self._last: tuple[str | None, Corpus] | None = None

    def read(self, text: str | None) -> Corpus:
        if self._last is None or self._last[0] != text:
            self._last = text, load_corpus(text)
        return self._last[1]
