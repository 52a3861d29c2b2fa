"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omninorm.device import widest
from omninorm.errors import RunError
from omninorm.experiments.corpus import TokenData, windows
from omninorm.experiments.evaluate import bits_per_byte, to_device
from omninorm.experiments.events import (
    AlarmEvent,
    Callback,
    CheckpointEvent,
    EvalEvent,
    Event,
    StepEvent,
    StopEvent,
    TrainResult,
    from_record,
    to_record,
)
from omninorm.experiments.optim import build_optimizer
from omninorm.experiments.precision import autocast, build_scaler, choose_precision, tensor_cores
from omninorm.experiments.processes import Processes
from omninorm.experiments.readings import Reading, Readings
from omninorm.experiments.run_folder import RunFolder, load_checkpoint, save_checkpoint
from omninorm.experiments.settings import TrainConfig, learning_rate
from omninorm.monitor import Watch, watch
from omninorm.monitor.tensors import here, whole
from omninorm.record import RECORD_FILE, read_record

_OF_EVALUATION = ("seq_len", "batch_size", "precision")


def train(
    model: nn.Module,
    data: TokenData,
    config: TrainConfig,
    *,
    run: RunFolder | None = None,
    on_event: Callback | None = None,
    stopped_by: Callable[[], int | None] = lambda: None,
    processes: Processes | None = None,
) -> TrainResult:
    """Train a model on the device of its parameters, from the newest checkpoint of `run` if there is one.

    A step sets the learning rate, accumulates the gradients of its micro-batches, measures and clips them, and updates
    the weights; after it come logging, evaluation and the checkpoint. A resumed run is bit-identical to an
    uninterrupted one on the same CPU with the same number of threads, and on the same GPU if its operators are
    deterministic; on another device it is equal up to rounding. On a GPU the host waits once per step, for the loss and
    the gradient norm of the previous step.

    Args:
        model: maps int64 tokens (batch, sequence) to logits (batch, sequence, vocabulary); trained in place.
        data: training and held-out tokens on the CPU, see `tokenize`.
        config: the settings.
        run: the folder for the record and the checkpoints; None keeps everything in memory, without monitoring.
        on_event: called with every event when it happens.
        stopped_by: called after every step; if it returns a signal number, the run ends there, with a checkpoint.
        processes: the training processes, each with a part of every batch; None means only this one. The loss and
            gradients of a step equal those of one process up to rounding.

    Returns:
        The status and the recorded events. A non-finite loss or gradient, or non-finite weights when a checkpoint is
        due, end the run with the status "diverged", which is a result and not an error. On a GPU this is detected one
        step later, but before anything is written.

    Raises:
        RunError: the run's folder can't be written, its newest checkpoint can't be used, or a process is gone.
        ConfigError: the batch can't be divided evenly among the processes.

    Example:
        >>> from omninorm import Thinker, ThinkerConfig
        >>> tokens = torch.arange(256).repeat(4)
        >>> data = TokenData(train=tokens, held_out=tokens, byte_lengths=torch.ones(256, dtype=torch.int64))
        >>> model = Thinker(ThinkerConfig(d_model=16, n_layers=1, n_heads=2, max_seq_len=32))
        >>> result = train(model, data, TrainConfig(steps=3, batch_size=2, seq_len=32))
        >>> result.status, len(result.losses)
        ('finished', 3)
    """
    processes = processes or Processes()
    processes.check_batch(config.batch_size)
    device = next(model.parameters()).device
    config = replace(config, precision=choose_precision(config.precision, device))
    wrapped = processes.wrap(model)
    called = torch.compile(wrapped) if config.compile else wrapped
    assert isinstance(called, nn.Module)
    job = _Job(model, called, build_optimizer(model, config), build_scaler(config.precision, device), data, config)
    log = _Log(run, on_event, processes)
    done = log.restore(job)
    model.train()
    with tensor_cores(config.tf32, device):
        if done == 0 and not log.evaluate(0, job):
            return log.stop(StopEvent(0, "diverged"))
        if done == config.steps and not log.evaluated(done) and not log.evaluate(done, job):
            return log.stop(StopEvent(done, "diverged"))
        with log.watching(job, done):
            end = _steps(job, done, log, stopped_by)
    return log.stop(end)


@dataclass(frozen=True)
class _Job:
    """The objects of a training run. `called` is the model that is called: wrapped for processes, perhaps compiled."""

    model: nn.Module
    called: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    data: TokenData
    config: TrainConfig

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def _steps(job: _Job, done: int, log: _Log, stopped_by: Callable[[], int | None]) -> StopEvent:
    """Run the steps after step `done`; return the event that ended them."""
    config, processes = job.config, log.processes
    readings = Readings(late=job.device.type != "cpu", scaled=job.scaler.is_enabled(), report=log.step_done(config))
    for step in range(done + 1, config.steps + 1):
        started, rate = time.perf_counter(), learning_rate(step, config)
        for group in job.optimizer.param_groups:
            group["lr"] = rate
        loss = _accumulate(job.called, job.data, config, step, processes, job.scaler)
        job.scaler.unscale_(job.optimizer)
        reading = Reading(step, rate, started, loss, _clip(job.model, config.grad_clip))
        if end := readings.check_at_once(reading):
            log.watch_step(reading.loss)
            return end
        job.scaler.step(job.optimizer)
        job.scaler.update()
        job.optimizer.zero_grad(set_to_none=True)
        log.watch_step(loss if readings.late else reading.loss)

        end = readings.add(reading)
        evaluates, checkpoints = (_due(step, every, config) for every in (config.eval_every, config.checkpoint_every))
        if end is None and (evaluates or checkpoints):
            end = readings.settle()
        if end is not None:
            return end
        if evaluates and not log.evaluate(step, job):
            return reading.end()
        signal = (processes.largest(stopped_by() or 0) or None) if step < config.steps else None
        if signal is not None or checkpoints:
            if (end := readings.settle()) is not None:
                return end
            if processes.largest(not _is_finite(job.model)):  # a diverged checkpoint must not replace a good one
                return reading.end()
            log.checkpoint(step, job)
        if signal is not None:
            return StopEvent(step, "interrupted", signal=signal)
    return StopEvent(config.steps, "finished")


def _accumulate(
    model: nn.Module,
    data: TokenData,
    config: TrainConfig,
    step: int,
    processes: Processes,
    scaler: torch.amp.GradScaler,
) -> Tensor:
    """Accumulate the gradients of the step's mean loss over its micro-batches, scaled by the scaler.

    The result is this loss in nats per token, on the device."""
    device = next(model.parameters()).device
    count = config.batch_size * config.grad_accumulation
    total = torch.zeros((), dtype=widest(device), device=device)
    batches = windows(data.train, config.seed, step, count, config.seq_len)
    for number, batch in enumerate(batches.view(config.grad_accumulation, config.batch_size, -1), start=1):
        tokens = to_device(processes.share(batch), device)
        with processes.accumulating(model, last=number == config.grad_accumulation):
            with autocast(config.precision, device):
                logits = model(tokens[:, :-1])
                loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
            scaler.scale(loss / config.grad_accumulation).backward()  # type: ignore[no-untyped-call]
        total += loss.detach().to(total.dtype) / config.grad_accumulation
    return processes.mean(total)


def _clip(model: nn.Module, limit: float | None) -> Tensor:
    """Clip gradients to the total norm `limit` (None does not clip); return the norm before clipping."""
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = whole(nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None]))
    if limit is not None:
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm


def _is_finite(model: nn.Module) -> bool:
    """Return whether all parameters are finite; the host waits for a GPU once."""
    return bool(torch.stack([here(parameter.detach()).isfinite().all() for parameter in model.parameters()]).all())


def _due(step: int, every: int, config: TrainConfig) -> bool:
    return step % every == 0 or step == config.steps


class _Log:
    """Sends every event to the callback, the record and the result.

    Only the first of several processes writes events and checkpoints; each process has a record for its monitor.
    """

    def __init__(self, run: RunFolder | None, on_event: Callback | None, processes: Processes) -> None:
        self._run = run
        self._on_event = on_event
        self.processes = processes
        self._steps: list[StepEvent] = []
        self._evals: dict[int, EvalEvent] = {}
        self._watch: Watch | None = None
        self._alarms_emitted = 0

    def restore(self, job: _Job) -> int:
        """Load the newest checkpoint and the events up to it; return its step, or 0 without a checkpoint."""
        if self._run is None:
            return 0
        step = self.processes.from_first(self._run.newest)
        if step is not None:
            load_checkpoint(self._run.checkpoints, step, job.model, job.optimizer, job.scaler)
        path = self._run.path / RECORD_FILE
        if self.processes.from_first(lambda: bool(read_record(path))):
            self._run.record.append({"kind": "resume", "step": step or 0})
            for line in read_record(path):
                self._keep(_event(line, path))
        return step or 0

    @contextmanager
    def watching(self, job: _Job, done: int) -> Iterator[None]:
        """Monitor the run, if it has a record to write to."""
        every = job.config.watch_every
        if self._run is None or every is None:
            yield
            return
        scaler = job.scaler if job.scaler.is_enabled() else None
        with watch(job.called, job.optimizer, every, self._run.record, step=done, scaler=scaler) as self._watch:
            yield
        self._emit_alarms()

    def step_done(self, config: TrainConfig) -> Callable[[Reading, float], None]:
        """Return the function to call with each step and its duration."""

        def report(reading: Reading, seconds: float) -> None:
            step, speed = reading.step, config.tokens_per_step / seconds
            if _due(step, config.log_every, config):
                self.emit(StepEvent(step, reading.loss, reading.grad_norm, reading.lr, seconds, speed))

        return report

    def watch_step(self, loss: Tensor | float) -> None:
        if self._watch is not None:
            self._watch.step(loss)
            self._emit_alarms()

    def _emit_alarms(self) -> None:
        assert self._watch is not None
        for alarm in self._watch.alarms[self._alarms_emitted :]:
            self._alarms_emitted += 1
            self.emit(AlarmEvent(alarm.step, alarm))

    def emit(self, event: Event) -> None:
        written = self._run if self.processes.first else None
        if written is not None and not isinstance(event, (CheckpointEvent, AlarmEvent)):
            written.record.append(to_record(event))
        self._keep(event)
        if self._on_event is not None:
            self._on_event(event)

    def evaluate(self, step: int, job: _Job) -> bool:
        """Measure held-out bits per byte; return whether they are finite."""
        started, settings = time.perf_counter(), {name: getattr(job.config, name) for name in _OF_EVALUATION}
        bits = self.processes.evaluate(job.model, lambda: bits_per_byte(job.model, job.data, **settings))
        self.emit(EvalEvent(step, bits, time.perf_counter() - started))
        return math.isfinite(bits)

    def evaluated(self, step: int) -> bool:
        """Return whether a step has been evaluated. The last step of a shortened run may not have been."""
        return self.processes.from_first(lambda: step in self._evals)

    def checkpoint(self, step: int, job: _Job) -> None:
        if self._run is not None:
            if self._watch is not None:
                self._watch.flush()
            self._run.record.sync()
            folder, keep = self._run.checkpoints, job.config.keep_checkpoints
            path = save_checkpoint(folder, step, job.model, job.optimizer, keep, self.processes, job.scaler)
            if self.processes.first:
                self.emit(CheckpointEvent(step, path))

    def stop(self, event: StopEvent) -> TrainResult:
        self.emit(event)
        folder = self._run.path if self._run else None
        alarms = () if self._watch is None else tuple(self._watch.alarms)
        return TrainResult(
            event.status, event.step, tuple(self._steps), tuple(self._evals.values()), event.signal, folder, alarms
        )

    def _keep(self, event: Event) -> None:
        if isinstance(event, StepEvent):
            self._steps.append(event)
        elif isinstance(event, EvalEvent):
            self._evals.setdefault(event.step, event)


def _event(line: dict[str, object], path: object) -> Event:
    try:
        return from_record(line)
    except (KeyError, TypeError) as error:
        invariant = f"The event {line.get('kind')!r:.40} of step {line.get('step')} in {path} is incomplete"
        raise RunError(invariant, "", "delete that line") from error
