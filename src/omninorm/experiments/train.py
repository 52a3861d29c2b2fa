"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from omninorm.errors import RunError
from omninorm.experiments.corpus import TokenData, windows
from omninorm.experiments.evaluate import autocast, bits_per_byte
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
from omninorm.experiments.processes import Processes
from omninorm.experiments.run_folder import RunFolder, load_checkpoint, save_checkpoint
from omninorm.experiments.settings import TrainConfig, learning_rate
from omninorm.monitor import Watch, watch
from omninorm.monitor.tensors import here, whole
from omninorm.record import RECORD_FILE, read_record


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
    """Train a model, from the newest checkpoint of `run` if there is one.

    A step: set the learning rate, accumulate the gradients of its micro-batches, measure and clip them, step; then
    log, evaluate, checkpoint. A resumed run is bit-identical to an uninterrupted one on the same machine with the same
    number of threads.

    Args:
        model: maps int64 tokens (batch, sequence) to logits (batch, sequence, vocabulary); trained in place.
        data: training and held-out tokens, see `tokenize`.
        config: the settings.
        run: where to record and to write checkpoints; None keeps everything in memory, without monitoring.
        on_event: called with every event as it happens.
        stopped_by: called after every step; a signal number ends the run there, with a checkpoint.
        processes: the training processes, each with its share of every batch; None means only this one. The loss and
            gradients of a step equal those of one process up to rounding.

    Returns:
        The status and the recorded events. A non-finite loss or gradient, or non-finite weights when a checkpoint is
        due, end the run as "diverged", which is a result and not an error.

    Raises:
        RunError: the run's folder can't be written, its newest checkpoint can't be used, or a process is gone.
        ConfigError: the batch can't be divided evenly among the processes.
    """
    processes = processes or Processes()
    processes.check_batch(config.batch_size)
    wrapped = processes.wrap(model)
    optimizer = build_optimizer(model, config)
    log = _Log(run, on_event, processes)
    done = log.restore(model, optimizer)
    model.train()
    if done == 0 and not log.evaluate(0, model, data, config):
        return log.stop(StopEvent(0, "diverged"))
    if done == config.steps and not log.evaluated(done) and not log.evaluate(done, model, data, config):
        return log.stop(StopEvent(done, "diverged"))
    with log.watching(wrapped, optimizer, done, config):
        end = _steps(model, wrapped, optimizer, data, config, done, log, stopped_by)
    return log.stop(end)


def _steps(
    model: nn.Module,
    wrapped: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: TokenData,
    config: TrainConfig,
    done: int,
    log: _Log,
    stopped_by: Callable[[], int | None],
) -> StopEvent:
    """Run the steps after `done` and return how they ended; `wrapped` is the model to call."""
    processes = log.processes
    for step in range(done + 1, config.steps + 1):
        started = time.perf_counter()
        rate = learning_rate(step, config)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = _accumulate(wrapped, data, config, step, processes)
        grad_norm = _clip(model, config.grad_clip)
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            log.watch_step(loss)
            return StopEvent(step, "diverged", loss, grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        log.watch_step(loss)
        seconds = time.perf_counter() - started

        if _due(step, config.log_every, config):
            log.emit(StepEvent(step, loss, grad_norm, rate, seconds, config.tokens_per_step / seconds))
        if _due(step, config.eval_every, config) and not log.evaluate(step, model, data, config):
            return StopEvent(step, "diverged", loss, grad_norm)
        signal = (processes.largest(stopped_by() or 0) or None) if step < config.steps else None
        if signal is not None or _due(step, config.checkpoint_every, config):
            if processes.largest(not _is_finite(model)):  # such a checkpoint must not replace a good one
                return StopEvent(step, "diverged", loss, grad_norm)
            log.checkpoint(step, model, optimizer, config)
        if signal is not None:
            return StopEvent(step, "interrupted", signal=signal)
    return StopEvent(config.steps, "finished")


def _accumulate(model: nn.Module, data: TokenData, config: TrainConfig, step: int, processes: Processes) -> float:
    """Accumulate the gradients of the step's mean loss by micro-batches; return that loss in nats per token."""
    device = next(model.parameters()).device
    count = config.batch_size * config.grad_accumulation
    total = torch.zeros((), dtype=torch.float64)
    batches = windows(data.train, config.seed, step, count, config.seq_len)
    for number, batch in enumerate(batches.view(config.grad_accumulation, config.batch_size, -1), start=1):
        tokens = processes.share(batch).to(device)
        with processes.accumulating(model, last=number == config.grad_accumulation):
            with autocast(config.precision, device):
                logits = model(tokens[:, :-1])
                loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
            (loss / config.grad_accumulation).backward()  # type: ignore[no-untyped-call]
        total += loss.detach().double().cpu() / config.grad_accumulation
    return processes.mean(float(total))


def _clip(model: nn.Module, limit: float | None) -> float:
    """Clip gradients to the total norm `limit`, unless it is None; return the norm before clipping."""
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = whole(nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None]))
    if limit is not None:
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return float(norm)


def _is_finite(model: nn.Module) -> bool:
    return all(bool(here(parameter.detach()).isfinite().all()) for parameter in model.parameters())


def _due(step: int, every: int, config: TrainConfig) -> bool:
    return step % every == 0 or step == config.steps


class _Log:
    """Sends every event to the callback, the record and the result.

    Only the first of several processes writes events and checkpoints; each has its own record for its monitor.
    """

    def __init__(self, run: RunFolder | None, on_event: Callback | None, processes: Processes) -> None:
        self._run = run
        self._on_event = on_event
        self.processes = processes
        self._steps: list[StepEvent] = []
        self._evals: dict[int, EvalEvent] = {}
        self._watch: Watch | None = None
        self._alarms_emitted = 0

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Load the newest checkpoint and the events up to it; return its step, 0 if there is none."""
        if self._run is None:
            return 0
        step = self.processes.from_first(self._run.newest)
        if step is not None:
            load_checkpoint(self._run.checkpoints, step, model, optimizer)
        path = self._run.path / RECORD_FILE
        if self.processes.from_first(lambda: bool(read_record(path))):
            self._run.record.append({"kind": "resume", "step": step or 0})
            for line in read_record(path):
                self._keep(_event(line, path))
        return step or 0

    @contextmanager
    def watching(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, done: int, config: TrainConfig
    ) -> Iterator[None]:
        """Monitor the run, if it has a record to write to."""
        if self._run is None or config.watch_every is None:
            yield
            return
        with watch(model, optimizer, config.watch_every, self._run.record, step=done) as self._watch:
            yield
        self._emit_alarms()

    def watch_step(self, loss: float) -> None:
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

    def evaluate(self, step: int, model: nn.Module, data: TokenData, config: TrainConfig) -> bool:
        """Measure held-out bits per byte; return whether they are finite."""
        started = time.perf_counter()
        bits = self.processes.evaluate(
            model,
            lambda: bits_per_byte(
                model, data, seq_len=config.seq_len, batch_size=config.batch_size, precision=config.precision
            ),
        )
        self.emit(EvalEvent(step, bits, time.perf_counter() - started))
        return math.isfinite(bits)

    def evaluated(self, step: int) -> bool:
        """Return whether a step has been evaluated. A run that was shortened may end at one that was not."""
        return self.processes.from_first(lambda: step in self._evals)

    def checkpoint(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, config: TrainConfig) -> None:
        if self._run is not None:
            if self._watch is not None:
                self._watch.flush()
            self._run.record.sync()
            path = save_checkpoint(
                self._run.checkpoints, step, model, optimizer, config.keep_checkpoints, self.processes
            )
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
