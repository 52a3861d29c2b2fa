"""Faults of data and labels."""

from __future__ import annotations

import dataclasses

import torch
from faults.faults import fault
from faults.tasks import Batch
from faults.training import Training
from torch import Tensor

FAMILY = "data and labels"
SPIKES = {"loss-spike", "unrecovered-spike", "loss-rising"}
BURST = 30


def _shuffled(labels: Tensor) -> Tensor:
    return labels.flatten()[torch.randperm(labels.numel())].view_as(labels)


@fault("labels not shifted", FAMILY, {"suspicious-loss"}, only=lambda a: a.next_token)
def labels_not_shifted(training: Training) -> None:
    """The label of each position is its own input, not the next one."""
    training.preprocess = lambda batch: dataclasses.replace(batch, labels=batch.inputs)


@fault("the same batch in every step", FAMILY, {"identical-batches", "suspicious-loss"}, at_once=True, frozen=True)
def same_batch(training: Training) -> None:
    """The loader returns its first batch forever."""
    data = training.data
    training.data = lambda step: data(1)


@fault("workers repeat the same data", FAMILY, {"identical-batches"}, at_once=True, frozen=True)
def workers_repeat(training: Training) -> None:
    """Four workers have the same random seed, so every batch comes four times (a case of TrainCheck)."""
    data = training.data
    training.data = lambda step: data((step - 1) // 4)


@fault("two batches in turn", FAMILY, {"identical-batches", "held-out-rising", "suspicious-loss"}, frozen=True)
def two_batches(training: Training) -> None:
    """The data set has two batches, so the model learns them by heart."""
    data = training.data
    training.data = lambda step: data(step % 2)


@fault("labels shuffled for 30 steps", FAMILY, {*SPIKES, "label-order"}, early=False, at_once=True, frozen=True)
def labels_shuffled_for_a_while(training: Training) -> None:
    """A broken shard: for 30 steps the labels are those of other positions."""
    data = training.data

    def shuffled(step: int) -> Batch:
        batch = data(step)
        hit = training.begins <= training.step < training.begins + BURST
        return dataclasses.replace(batch, labels=_shuffled(batch.labels)) if hit else batch

    training.data = shuffled


@fault("labels always shuffled", FAMILY, {"label-order", "no-progress", "unigram-only", "loss-plateau"}, frozen=True)
def labels_shuffled(training: Training) -> None:
    """The labels are those of other positions or examples in every step."""
    data = training.data

    def shuffled(step: int) -> Batch:
        batch = data(step)
        return dataclasses.replace(batch, labels=_shuffled(batch.labels))

    training.data = shuffled


@fault("inputs corrupted", FAMILY, {*SPIKES, "label-order"}, early=False, at_once=True)
def inputs_corrupted(training: Training) -> None:
    """From some step on the inputs are random."""
    data = training.data

    def corrupted(step: int) -> Batch:
        batch = data(step)
        if not training.faulty:
            return batch
        inputs = torch.randint(256, batch.inputs.shape)
        return dataclasses.replace(
            batch, inputs=inputs, images=None if batch.images is None else torch.randn_like(batch.images)
        )

    training.data = corrupted


@fault("one label for everything", FAMILY, {"suspicious-loss", *SPIKES}, early=False, only=lambda a: a.name != "clip")
def one_label(training: Training) -> None:
    """From some step on every label is the same, as after a failed look-up."""
    data = training.data

    def constant(step: int) -> Batch:
        batch = data(step)
        labels = torch.where(batch.labels >= 0, torch.ones_like(batch.labels), batch.labels)
        return dataclasses.replace(batch, labels=labels) if training.faulty else batch

    training.data = constant


@fault("no labels in a batch", FAMILY, {"nonfinite"}, early=False, at_once=True, frozen=True)
def no_labels(training: Training) -> None:
    """From some step on all labels are ignored, so the mean loss is 0/0."""
    data = training.data

    def empty(step: int) -> Batch:
        batch = data(step)
        return dataclasses.replace(batch, labels=torch.full_like(batch.labels, -100)) if training.faulty else batch

    training.data = empty


@fault(
    "images not scaled",
    FAMILY,
    {"layer-jump", "massive-activation", "input-scale", *SPIKES},
    early=False,
    at_once=True,
    only=lambda a: a.on_images,
)
def images_not_scaled(training: Training) -> None:
    """From some step on the images are in 0 to 255 instead of unit scale."""
    data = training.data

    def scaled(step: int) -> Batch:
        batch = data(step)
        assert batch.images is not None
        return dataclasses.replace(batch, images=128 + 128 * batch.images) if training.faulty else batch

    training.data = scaled
