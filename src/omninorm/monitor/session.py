"""Watch: the context manager around a training loop, which coordinates hooks, buffers, rules and records."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from omninorm.config import read_count
from omninorm.errors import ConfigError, RunError
from omninorm.monitor.alarms import Judge
from omninorm.monitor.arguments import (
    check_places,
    printable,
    read_evaluation,
    read_facts,
    read_loss,
    read_optimizers,
    uncovered,
)
from omninorm.monitor.checks.collect import Checks
from omninorm.monitor.checks.weights import frozen, shifted_gains
from omninorm.monitor.events import sample_event, seen_event, steps_event, watch_event
from omninorm.monitor.facts import facts_of
from omninorm.monitor.history import History, Sample, Step
from omninorm.monitor.hooks.attach import Hooks, leaves, sentinel_names
from omninorm.monitor.hooks.cells import cell_sizes
from omninorm.monitor.hooks.compiled import is_compiled
from omninorm.monitor.hooks.training_pass import safely
from omninorm.monitor.model_map.structure import find_structure, unwrap
from omninorm.monitor.probes.gradients import Gradients
from omninorm.monitor.probes.optimizer import OptimizerWatch
from omninorm.monitor.probes.padding import MASK, ZERO_ROWS
from omninorm.monitor.probes.weights import GAIN_SIGNALS, measure_all
from omninorm.monitor.reasons import not_seen
from omninorm.monitor.rules import Rule
from omninorm.monitor.rules.expert_load import load_signals
from omninorm.monitor.rules.label_order import NEXT
from omninorm.monitor.sample_builder import SampleBuilder, first_nonfinite, step_of
from omninorm.monitor.sinks import Sink, flatten
from omninorm.monitor.stats_buffer import UNSEEN, Row, StatsBuffer
from omninorm.monitor.tensors import reshard
from omninorm.monitor.writer import Output, rank
from omninorm.record import Record
from omninorm.record.alarm import Alarm, link

# Largest ring buffer; with more steps between samples it is emptied earlier.
MOST_ROWS = 256
LOG = logging.getLogger("omninorm.watch")
_watched: WeakSet[nn.Module] = WeakSet()


class Watch:
    """The object that `watch` returns. Open it with `with` or `open`, and end it with `close`.

    Attributes:
        alarms: the alarms so far, in the order in which they were reported.
        history: the steps and samples that rules read.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] | None,
        every: int,
        folder: str | Path | Record | None,
        *,
        step: int,
        scaler: Any,
        sinks: Sequence[Sink],
        rules: Sequence[Rule] | None,
        replicas: bool = True,
        config: Mapping[str, Any] | None = None,
        name: str | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ConfigError("model must be a torch.nn.Module", type(model).__name__, "pass the model that is trained")
        every, step = read_count("every", every), read_count("step", step, at_least=0)
        check_places(folder, scaler, sinks)
        self._model, self._compiled = unwrap(model), is_compiled(model)
        self._optimizers = read_optimizers(optimizer)
        self._every, self._folder, self._scaler, self._sinks = every, folder, scaler, tuple(sinks)
        self._done, self._replicas = step, replicas
        self._judge = Judge(rules)
        self._given = read_facts(config, name, f"Run of {type(self._model).__name__}" if folder is None else None)
        self.alarms: list[Alarm] = []
        self.history = History()
        self._output: Output | None = None
        self._hooks: Hooks | None = None
        self._reported_seen = self._failed_once = False

    # Beginning and end ------------------------------------------------------------------------------------------------

    def __enter__(self) -> Watch:
        return self.open()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.close("done" if error is None else f"{type(error).__name__}: {error}")

    def open(self) -> Watch:
        """Register the hooks and start the record."""
        if self._output is not None and self._hooks is None:
            raise RunError("This Watch has already been closed", "", "create a new one with omninorm.watch(…)")
        kind = type(self._model).__name__
        if self._model in _watched:
            raise ConfigError(f"This {kind} is already being watched", "", "close the other Watch first, or use it")
        reshard(self._model)
        self._structure = structure = find_structure(self._model)
        named = list(self._model.named_parameters())
        if not named:
            raise ConfigError(f"This {kind} has no parameters to watch", "", "pass the model that is trained")
        self._names, self._parameters = [name for name, _ in named], [parameter for _, parameter in named]
        self._sentinels = sentinel_names(structure)
        places = {name: at for at, name in enumerate(self._names)}
        groups = {group: [places[name] for name, _ in members] for group, members in structure.groups.items()}
        self._groups, self._builder = groups, SampleBuilder(structure, groups, self._names)
        sizes = cell_sizes(structure), len(self._sentinels), len(named), min(self._every, MOST_ROWS)
        self._buffer = StatsBuffer(self._parameters[0].device, *sizes, self._scaler)
        self._first, self._rates = self._done + 1, list[float | None]()
        self.history.facts = facts_of(structure, self._optimizers, self._every, self._given.get("config"))
        if rank() > 0:
            self._sinks = ()  # only the first process writes to sinks
        self._output = Output(self._folder)
        # The owner of a Record that was passed in records its own resumes.
        if self._output.continues or (self._done and not isinstance(self._folder, Record)):
            kept = "Continuing the record in %s. It keeps earlier entries after step %d, but its page leaves them out."
            LOG.info(kept, self._folder, self._done)
            self._output.append({"kind": "resume", "step": self._done})
        limits = [limit for rule in self._judge.rules for limit in rule.limits()]
        self._output.append(watch_event(self.history.facts, limits, self._done) | self._given)
        with ExitStack() as undo:
            undo.callback(self.close, "not opened")
            self._attach()
            _watched.add(self._model)
            self._report_alarms(uncovered(named, self._optimizers, self._done))
            self._report_alarms(frozen(structure, self._done) + shifted_gains(structure, self._done))
            self._begin_step()
            undo.pop_all()
        return self

    def _attach(self) -> None:
        self._handles: list[RemovableHandle] = []
        self._hooks = Hooks(self._structure, self._buffer, self._failed, self._compiled)
        self._gradients = Gradients(self._buffer, self._parameters, self._failed)
        self._optimizer_watch = OptimizerWatch(
            self._buffer, self._parameters, self._optimizers, self._failed, self._gradients.before_step
        )
        self._checks = Checks(
            self._structure,
            list(zip(self._names, self._parameters, strict=True)),
            self._groups,
            (self._sentinels, len(leaves(self._structure))),
            self._buffer,
            self._optimizers,
            self._gradients,
            self._failed,
            every=self._every,
            done=self._done,
            scaler=self._scaler,
            replicas=self._replicas,
            dropout=self._hooks.dropout,
        )
        self._hooks.see_norms, self._gradients.may_wait = self._gradients.see_norms, bool(self._optimizers)
        self._hooks.attach()
        self._handles += self._gradients.attach()
        self._handles += self._optimizer_watch.attach()
        self._handles += self._checks.attach(self._compiled)

    def close(self, reason: str = "done") -> None:
        """Judge the remaining steps, remove every hook and close the record. A second call does nothing."""
        if self._output is None or self._hooks is None:
            return
        with ExitStack() as last:  # in reverse order; each is called even if an earlier one raises
            last.callback(self._to_sinks, lambda sink: sink.close())
            last.callback(self._output.close)
            last.callback(self._output.append, {"kind": "end", "step": self._done, "reason": reason})
            last.callback(self._release)
            last.callback(self._hooks.detach)
            self.flush()

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._hooks = None
        _watched.discard(self._model)

    # Steps ------------------------------------------------------------------------------------------------------------

    def step(self, loss: Tensor | float | None = None) -> None:
        """End a training step. A loss on the device is copied to the host at the next sample.

        Args:
            loss: the loss of this step: a tensor (its mean is used), a number, or None.

        Raises:
            InputError: the loss is neither a real tensor nor a number.
            RunError: the watch is not open.
        """
        hooks = self._hooks
        if hooks is None:
            raise RunError("This Watch is not open", "", "call step inside `with omninorm.watch(…) as w:`")
        value = read_loss(loss)
        hooks.rest()
        self._gradients.end_step()
        self._done += 1
        self.history.passes = max(self.history.passes, self._gradients.passes)
        self._rates.append(self._optimizer_watch.rate())
        safely(self._optimizer_watch.see_weights, self._failed)
        safely(self._checks.end_step, self._failed)
        safely(lambda: self._buffer.end_row(value), self._failed)
        if self._buffer.sampling or self._buffer.full:
            self._flush(self._buffer.sampling)
        self._begin_step()

    def _begin_step(self) -> None:
        coming = self._done + 1
        self._buffer.sampling = coming % self._every == 0 or coming == 1
        if self._hooks is not None:  # a sink may have closed the watch
            self._hooks.begin_step()
        self._gradients.forget()

    def flush(self) -> None:
        """Copy the statistics since the last sample to the host, record and judge them. Call it between steps."""
        self._flush(sampled=False)

    def _flush(self, sampled: bool) -> None:
        safely(lambda: self._move(sampled), self._failed)

    def _move(self, sampled: bool) -> None:
        if self._hooks is None or self._buffer.row == 0:
            return
        extra, names = self._measure() if sampled else ([], [])
        # An error from here on must not shift the numbers of later steps.
        first, given, self._first, self._rates = self._first, self._rates, self._done + 1, []
        cells, rows, numbers = self._buffer.take(extra, sampled)
        checks = self._checks.of_steps(rows)
        steps = [step_of(row, first + at, given[at], checks[at]) for at, row in enumerate(rows)]
        self.history.steps.extend(steps)
        for at, row in enumerate(rows):
            if self.history.nonfinite is None:
                self._look_for_nonfinite(row, first + at)
        self._append(steps_event(steps, rows))
        if sampled:
            placements = self._hooks.placements
            self.history.placement, self.history.placement_reason = placements.verdict(len(self._structure.blocks))
            self.history.no_residual = placements.without_residual()
            self.history.without_input = placements.without_input()
            if self._hooks.padding.used or any(cells["zero_rows"]):
                self.history.padding = MASK if self._hooks.padding.used else ZERO_ROWS
            self.history.classes = self._hooks.classes
            self.history.dtype = None if self._hooks.dtype is None else str(self._hooks.dtype).removeprefix("torch.")
        alarms = list(self._judge.judge_steps(self.history, steps))
        if sampled:
            values = dict(zip(names, numbers, strict=True))
            checked = self._checks.of_sample(self._done, rows[-1], values)
            sample = self._builder.build(self._done, cells, rows[-1], self._gains(values), values)
            loads = self._hooks.routers.read(values)
            signals = {**sample.signals, **load_signals(loads)}
            sample = replace(sample, signals=signals, checks=checked, loads=loads)
            sample = self._builder.with_decay(sample, self._parameters, self._optimizers)
            self._hooks.causality.elsewhere = sample.next_tokens is not None and sample.next_tokens < NEXT
            self._write_sample(sample, steps[-1])
            alarms += self._judge.judge_sample(self.history)
        self._report_alarms(alarms)

    def _measure(self) -> tuple[list[Tensor], list[str]]:
        """Return a sample's statistics of parameters and optimizers: tensors, and their names."""
        assert self._hooks is not None
        others = (self._optimizer_watch.take, self._checks.measure, self._hooks.routers.take)
        found = measure_all(self._structure.norms, self._parameters, self._buffer.device, others, self._failed)
        return list(found.values()), list(found)

    def _gains(self, values: dict[str, list[float]]) -> dict[str, list[float | None]]:
        return {name: [None if v == UNSEEN else v for v in values.pop(name)] for name in GAIN_SIGNALS if name in values}

    def _look_for_nonfinite(self, row: Row, step: int) -> None:
        found = first_nonfinite(row, step, self._sentinels, self._names, self._buffer.order)
        if found is not None:
            self.history.nonfinite = found
            self._append({"kind": "nonfinite", **asdict(found)})

    def log_eval(self, loss: Tensor | float, step: int | None = None, name: str = "eval") -> None:
        """Record a held-out loss, and judge it. A loss on the device is copied to the host at once.

        Args:
            loss: the loss of an evaluation: a tensor (its mean is used) or a number.
            step: the number of training steps before it; None means those done so far.
            name: the name of the held-out data, if there are several.

        Raises:
            ConfigError: step is not a whole number of 0 or more.
            InputError: the loss is neither a real tensor nor a number.
            RunError: the watch is not open.
        """
        if self._hooks is None:
            raise RunError("This Watch is not open", "", "call log_eval inside `with omninorm.watch(…) as w:`")
        evaluation = read_evaluation(loss, self._done if step is None else step, name)
        self.flush()
        self.history.evaluations.append(evaluation)
        self._append({"kind": "evaluation", **asdict(evaluation)})
        self._to_sinks(lambda sink: sink.log(evaluation.step, {f"{evaluation.name}/loss": evaluation.loss}))
        self._report_alarms(self._judge.judge_evaluation(self.history))

    # Output ----------------------------------------------------------------------------------------------------------

    def _append(self, event: dict[str, Any]) -> None:
        assert self._output is not None
        self._output.append(event)

    def _write_sample(self, sample: Sample, step: Step) -> None:
        history = self.history
        history.samples.append(sample)
        if not self._reported_seen:
            self._reported_seen = True
            self._append(seen_event(sample, history, not_seen(sample, history.facts, bool(self._optimizers))))
        self._append(sample_event(sample, self._judge.bounds()))
        if self._sinks:
            numbers = flatten(sample, history.facts)
            numbers |= {"loss": step.loss, "grad_norm": step.grad_norm, "lr": step.lr}
            known = {name: value for name, value in numbers.items() if value == value}
            self._to_sinks(lambda sink: sink.log(sample.step, known))

    def _report_alarms(self, alarms: Sequence[Alarm]) -> None:
        if not alarms:
            return
        alarms = self._judge.link(self.history, alarms)
        self.alarms[:] = link([*self.alarms, *alarms])
        self._append({"kind": "alarms", "step": self._done, "alarms": [alarm.to_record() for alarm in alarms]})
        for alarm in alarms:
            level = logging.ERROR if alarm.severity == "fail" else logging.WARNING
            where = f" {alarm.layer}:" if alarm.layer and alarm.layer not in alarm.evidence else ""
            LOG.log(level, "%s", printable(f"step {alarm.step}, {alarm.rule}:{where} {alarm.text}"))
            self._to_sinks(lambda sink, alarm=alarm: sink.alarm(alarm))  # type: ignore[misc]

    def _to_sinks(self, call: Callable[[Sink], None]) -> None:
        """Call every sink. One that raises, for example because its service is down, is disabled with a warning."""
        for sink in self._sinks:
            try:
                call(sink)
            except Exception as error:
                self._sinks = tuple(other for other in self._sinks if other is not sink)
                text = f"The sink {type(sink).__name__} failed and has been disabled: {type(error).__name__}: {error}"
                warnings.warn(text, stacklevel=3)

    @property
    def record(self) -> list[dict[str, Any]]:
        """The events so far, as in record.jsonl."""
        return [] if self._output is None else self._output.events

    def report(self, path: str | Path) -> Path:
        """Write the report page: one self-contained HTML file.

        Raises:
            RunError: nothing has been recorded yet, or the file cannot be written.
        """
        from omninorm.report import write_report

        if self._hooks is not None:
            self.flush()
        if self._output is None:
            raise RunError("This Watch has not been opened", "", "use `with omninorm.watch(…) as w:` first")
        with self._output.file() as record:
            return write_report(record, path)

    def _failed(self, error: Exception) -> None:
        """Warn once about a monitoring error; the affected statistic is missing."""
        if not self._failed_once:
            self._failed_once = True
            text = f"omninorm.watch could not measure a statistic: {type(error).__name__}: {error}"
            warnings.warn(text, stacklevel=3)
