"""`watch` as a callback for Lightning's Trainer, of the packages lightning and pytorch-lightning."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from torch import Tensor

from omninorm.errors import MissingExtraError
from omninorm.monitor.callbacks.driver import Driver, Total

PACKAGES = ("lightning.pytorch", "pytorch_lightning")
SETTINGS = ("max_epochs", "max_steps", "accumulate_grad_batches", "gradient_clip_val", "precision", "world_size")
"""The attributes of the Trainer that the report page shows, with the module's hyperparameters."""
DEFAULT_NAME = "lightning_logs"
"""The name of a logger that was not given any."""


def _callback_class() -> Any:
    """Return the base class of callbacks, preferably of the package that has been imported already."""
    for package in sorted(PACKAGES, key=lambda name: name not in sys.modules):
        try:
            return importlib.import_module(package).Callback
        except ImportError:
            continue
    remedy = "Install it with pip install lightning"
    raise MissingExtraError("WatchCallback needs the package lightning or pytorch-lightning", "", remedy)


class WatchCallback(Driver, _callback_class()):  # type: ignore[misc]
    """Monitors a Lightning `Trainer`: a record in its log folder, alarms in the log, a report at the end.

    A step ends when `trainer.global_step` has increased; validation is not counted. The loss is the one that
    `training_step` returned, averaged over the batches of a step if gradients are accumulated. With manual
    optimization it is known only if `training_step` returns it.

    Args:
        every, folder, sinks, rules, report, replicas, config, name: see `Driver`. The folder is `trainer.log_dir` and
            the name that of the logger, unless given; the module's `hparams` are among the settings.

    Example:
        ::

            callback = WatchCallback(every=10)
            Trainer(max_epochs=1, callbacks=[callback]).fit(model, loader)
            print(callback.alarms)
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._losses = Total()
        self._done = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._done = trainer.global_step
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        folder = trainer.log_dir or trainer.default_root_dir
        self._losses.take()
        settings = {name: value for name in SETTINGS if (value := getattr(trainer, name, None)) is not None}
        settings |= {str(name): value for name, value in pl_module.hparams.items()}
        named = trainer.logger and trainer.logger.name
        name = named if isinstance(named, str) and named != DEFAULT_NAME else None
        self._begin(pl_module, trainer.optimizers, folder, self._done, scaler, settings, name)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor):
            # Lightning has divided the loss by the number of batches.
            self._losses.add(loss * trainer.accumulate_grad_batches)
        if trainer.global_step > self._done:
            self._done = trainer.global_step
            self._end_step(self._losses.take(mean=True))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._end(f"{type(exception).__name__}: {exception}")
