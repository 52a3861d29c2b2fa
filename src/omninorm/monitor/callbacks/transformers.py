"""`watch` as a callback for the Trainer of transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.utils.hooks import RemovableHandle

from omninorm.errors import MissingExtraError
from omninorm.monitor.callbacks.driver import Driver, Total

try:
    from transformers import TrainerCallback
except ImportError as error:
    remedy = 'Install both with pip install "transformers[torch]"'
    raise MissingExtraError("WatchCallback needs the packages transformers and accelerate", "", remedy) from error

SETTINGS = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps", "seed"),
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "optim"),
    *("bf16", "fp16", "label_smoothing_factor", "gradient_checkpointing", "torch_compile"),
)
"""The TrainingArguments that the report page shows."""


class WatchCallback(Driver, TrainerCallback):
    """Monitors a `transformers.Trainer`: a record in its output folder, alarms in the log, a report at the end.

    Steps are optimizer steps; evaluations are not counted. The Trainer does not pass losses to its callbacks, and those
    it logs are smoothed and without NaNs. So the loss is read from the model's output and weighted as the Trainer
    weights it, by the gradient that flows back to it. The loss is unknown where the Trainer computes it itself
    (`compute_loss_func`, `label_smoothing_factor`) or compiles the model: then call `follow(trainer)`.

    Args:
        every, folder, sinks, rules, report, replicas, config, name: see `Driver`. The folder is `args.output_dir` and
            the name `args.run_name`, unless given.

    Example:
        ::

            callback = WatchCallback(every=10)
            trainer = Trainer(model, args, train_dataset=data, callbacks=[callback])
            with callback:  # closes the record if an exception ends the training
                trainer.train()
            print(callback.alarms)
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._losses = Total()
        self._handle: RemovableHandle | None = None
        self._followed = False

    def follow(self, trainer: Any) -> WatchCallback:
        """Read the losses from `trainer.training_step`, and close the record if it raises."""
        original = trainer.training_step

        def training_step(*args: Any, **kwargs: Any) -> Tensor:
            try:
                loss: Tensor = original(*args, **kwargs)
            except BaseException as error:
                self._end(f"{type(error).__name__}: {error}")
                raise
            self._losses.add(loss)
            return loss

        trainer.training_step = training_step
        self._followed = True
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        from omninorm.monitor.callbacks.accelerate import inner_optimizer

        model, optimizer = kwargs["model"], kwargs.get("optimizer")
        inner = None if optimizer is None else inner_optimizer(optimizer)
        scaler = getattr(optimizer, "scaler", None)
        settings = {name: value for name in SETTINGS if (value := getattr(args, name, None)) is not None}
        name = None if args.run_name == args.output_dir else args.run_name  # its default in some versions
        optimizers = [] if inner is None else [inner]
        self._begin(model, optimizers, args.output_dir, state.global_step, scaler, settings, name)
        self._losses.take()
        if not self._followed:
            self._handle = self._read_losses(model, scaler)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._end_step(self._losses.take())

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._end()

    def _end(self, reason: str = "done") -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        super()._end(reason)

    def _read_losses(self, model: nn.Module, scaler: Any) -> RemovableHandle:
        """Register hooks on the model and on each loss that it returns.

        The gradient of a batch's loss is its weight in the step: 1 divided by the number of accumulated batches, or 1
        if the model has already divided by the tokens of all of them; times the scale of a GradScaler.
        """

        def after(module: nn.Module, inputs: Any, output: Any) -> None:
            loss = None if is_compiling() or not torch.is_grad_enabled() else find_loss(output)
            if loss is None or not loss.requires_grad:
                return
            value = loss.detach().clone()  # the Trainer may scale it in place

            def weigh(share: Tensor) -> None:
                scale = getattr(scaler, "_scale", None)
                self._losses.add(value * (share if scale is None else share / scale))

            loss.register_hook(weigh)  # type: ignore[no-untyped-call]

        return model.register_forward_hook(after)


def find_loss(output: Any) -> Tensor | None:
    """Return the loss in a model's output as the Trainer does: "loss" of a dictionary, or the first item of a tuple."""
    loss = output.get("loss") if isinstance(output, dict) else output[0] if isinstance(output, tuple) else None
    return loss if isinstance(loss, Tensor) and loss.numel() == 1 else None
