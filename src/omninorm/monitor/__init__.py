"""Training monitor: which layer goes wrong, why, and what to try.

Submodules are imported on first use, so that importing omninorm stays fast.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

    from omninorm.monitor.history import Facts, History, NonFinite, NormFacts, Sample, Step
    from omninorm.monitor.rules import Rule, default_rules
    from omninorm.monitor.session import Watch
    from omninorm.monitor.sinks import Sink
    from omninorm.record import Record
    from omninorm.record.alarm import Alarm

__all__ = [
    "Alarm",
    "Facts",
    "History",
    "NonFinite",
    "NormFacts",
    "Rule",
    "Sample",
    "Sink",
    "Step",
    "Watch",
    "default_rules",
    "watch",
]

_HOMES = {
    "Alarm": "omninorm.record.alarm",
    **dict.fromkeys(("Facts", "History", "NonFinite", "NormFacts", "Sample", "Step"), f"{__name__}.history"),
    **dict.fromkeys(("Rule", "default_rules"), f"{__name__}.rules"),
    "Sink": f"{__name__}.sinks",
    "Watch": f"{__name__}.session",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def watch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] | None = None,
    every: int = 10,
    folder: str | Path | Record | None = None,
    *,
    step: int = 0,
    scaler: Any = None,
    sinks: Sequence[Sink] = (),
    rules: Sequence[Rule] | None = None,
    replicas: bool = True,
    config: Mapping[str, Any] | None = None,
    name: str | None = None,
) -> Watch:
    """Monitor a training run and report which layer goes wrong, why, and what to try.

    Use it as a context manager around the training loop and call `step(loss)` once per optimizer step. The trained
    weights are bit-identical to those of the loop without it.

    Args:
        model: any torch.nn.Module; compiled, wrapped in DistributedDataParallel, or plain. If it is compiled, enter
            before its first call.
        optimizer: one or several optimizers; without them, update ratios and Adam statistics are unavailable.
        every: steps between samples of all signals. Losses, gradient norms and NaNs are checked in every step.
        folder: where record.jsonl is appended; None keeps the record in memory. If the folder has a record, it is
            continued. Nothing is deleted, but the page leaves out what an earlier run recorded after `step`: use
            another folder for another run.
        step: the number of steps done before, for a resumed run.
        scaler: the torch.amp.GradScaler, if one scales the loss.
        sinks: further loggers, such as `TensorBoard(writer)`; see `omninorm.monitor.sinks`.
        rules: the alarm rules; None means `default_rules()`.
        replicas: whether the processes of a distributed run should hold equal weights, except for sharded parameters.
            False if they differ on purpose, as between the averages of local SGD or in independent runs.
        config: facts about the run for the report page, such as batch size, seed, commit and device. If "precision" or
            "mixed_precision" asks for 16 bits, such as "bf16", autocast and the stream's dtype are compared with it.
        name: the title of the report page; None means the name of the folder.

    Raises:
        ConfigError: an argument has the wrong type, or the model is already being watched.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.RMSNorm(4), nn.Linear(4, 1))
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> with watch(model, optimizer, every=2) as w:
        ...     for _ in range(4):
        ...         loss = model(torch.ones(8, 4)).square().mean()
        ...         loss.backward()
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        ...         w.step(loss)
        >>> [sample.step for sample in w.history.samples]
        [1, 2, 4]
    """
    from omninorm.monitor.session import Watch

    return Watch(
        model,
        optimizer,
        every,
        folder,
        step=step,
        scaler=scaler,
        sinks=sinks,
        rules=rules,
        replicas=replicas,
        config=config,
        name=name,
    )
