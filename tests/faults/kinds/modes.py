"""Faults of training and evaluation mode, and of dropout."""

from __future__ import annotations

import torch.nn.functional as F
from faults.faults import change_output, fault, part_of
from faults.training import EVERY, Training
from torch import Tensor

FAMILY = "training mode"


def _drop(training: Training, share: float) -> None:
    """Put dropout on the output of every attention."""

    def drop(y: Tensor) -> Tensor:
        return F.dropout(y, share, training.model.training)

    blocks = training.model.get_submodule(training.architecture.layout.blocks)
    for module in {part_of(training, "attention", index)[0] for index, _ in enumerate(blocks.children())}:
        change_output(module, drop)


@fault("dropout 0.8", FAMILY, {"dropout"}, needs=("attention",))
def strong_dropout(training: Training) -> None:
    """Every attention has a dropout of 0.8 on its output."""
    _drop(training, 0.8)


@fault(
    "dropout active in evaluation",
    FAMILY,
    {"evaluation-mode", "held-out-rising"},
    at_once=True,
    variant="dropout",
    first=2 * EVERY,
)
def dropout_in_evaluation(training: Training) -> None:
    """The model is not put into evaluation mode, so dropout disturbs it (a case of TrainCheck)."""
    training.evaluating = lambda: None


@fault("left in evaluation mode", FAMILY, {"evaluation-mode"}, at_once=True, variant="dropout", first=2 * EVERY + 1)
def left_in_evaluation(training: Training) -> None:
    """After the first evaluation the model stays in evaluation mode, so dropout no longer acts."""
    training.resuming = lambda: None
