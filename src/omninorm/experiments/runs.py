"""Creates, opens and resumes training runs."""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from omninorm.config import NormConfig, check_choice, check_keys, read_count, store_python_numbers
from omninorm.device import AUTO, device_name, find_device
from omninorm.errors import ConfigError, DataError, OmninormError, RunError
from omninorm.experiments.checkpoint import check_packages, check_sizes, list_checkpoints, load_checkpoint
from omninorm.experiments.corpus import Corpus, TokenData, load_corpus, tokenize
from omninorm.experiments.events import Callback, Event, StepEvent, TrainResult
from omninorm.experiments.interrupt import Interrupt
from omninorm.experiments.memory import check_model, does_not_fit, fitting, step_does_not_fit
from omninorm.experiments.precision import choose_precision
from omninorm.experiments.processes import Processes
from omninorm.experiments.provenance import git_commit, versions
from omninorm.experiments.run_folder import (
    CHECKPOINTS,
    CONFIG_FILE,
    FolderTakenError,
    RunFolder,
    fresh_folder,
    read_config,
)
from omninorm.experiments.settings import TrainConfig
from omninorm.experiments.tokenizer import TOKENIZER_FILE, TOKENIZERS, Tokenizer, build_tokenizer, load_tokenizer
from omninorm.experiments.train import train
from omninorm.record import RECORD_FILE, final_status
from omninorm.thinker import Thinker, ThinkerConfig

_SECTIONS = ("model", "train", "tokenizer", "data", "versions")
_MOST_SKIPPED = 20  # entries in config.json
_AFTER_DIVERGENCE = "start a new run with a smaller learning rate, gradient clipping, or another norm or placement"


@dataclass(frozen=True)
class Plan:
    """Everything that determines what a run computes.

    Args:
        model: the Thinker's config. The tokenizer determines its vocab_size; its max_seq_len must be train.seq_len.
        train: the training settings.
        text: None for the default text, or the path of a file or folder.
        held_out: fraction of the text, at its end, that is held out.
        tokenizer: "byte" or "bpe".
        vocab_size: vocabulary size of a BPE tokenizer; None means 1024.
    """

    model: ThinkerConfig = field(default_factory=lambda: ThinkerConfig(d_model=128, n_layers=4, max_seq_len=128))
    train: TrainConfig = field(default_factory=TrainConfig)
    text: str | None = None
    held_out: float = 0.1
    tokenizer: str = "byte"
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        store_python_numbers(self)
        check_choice("tokenizer", self.tokenizer, TOKENIZERS)
        if self.model.max_seq_len != self.train.seq_len:
            received = f"{self.model.max_seq_len} and {self.train.seq_len}"
            raise ConfigError("max_seq_len and seq_len must be equal", received, "set both to the same value")

    def change(self, **settings: Any) -> Plan:
        """Return this plan with some settings replaced.

        The names are those of Plan, ThinkerConfig, NormConfig and TrainConfig. `seq_len` also sets the model's
        max_seq_len.

        Raises:
            ConfigError: an unknown name or an invalid value.
        """
        if "seq_len" in settings:
            settings = {**settings, "max_seq_len": settings["seq_len"]}
        own = {name for name in _names(Plan) if name not in ("model", "train")}
        known = sorted(own | _names(ThinkerConfig) | _names(NormConfig) | _names(TrainConfig))
        check_keys("a plan", settings, known)
        norm = replace(self.model.norm, **_pick(settings, _names(NormConfig)))
        return replace(
            self,
            model=replace(self.model, **{"norm": norm, **_pick(settings, _names(ThinkerConfig) - own)}),
            train=replace(self.train, **_pick(settings, _names(TrainConfig))),
            **_pick(settings, own),
        )

    def settings(self) -> dict[str, Any]:
        """Return all settings by the names that `change` takes. If None means a default, the default is returned."""
        model, training = self.model, self.train
        return {
            **{item.name: getattr(model.norm, item.name) for item in fields(NormConfig)},
            **{item.name: getattr(model, item.name) for item in fields(ThinkerConfig)},
            **{item.name: getattr(training, item.name) for item in fields(TrainConfig)},
            **{item.name: getattr(self, item.name) for item in fields(Plan) if item.name not in ("model", "train")},
            "n_kv_heads": model.kv_heads,
            "head_dim": model.head_width,
            "d_ff": model.hidden_width,
            "warmup_steps": training.warmup,
            "vocab_size": model.vocab_size,
        }


@dataclass
class Run:
    """A run that is ready to train. Close it, or use it as a context manager, to release its folder.

    The model is on the CPU until training moves it to the device of `processes`.
    """

    plan: Plan
    folder: RunFolder
    corpus: Corpus
    tokenizer: Tokenizer
    data: TokenData
    model: Thinker
    notices: tuple[str, ...] = ()
    processes: Processes = field(default_factory=Processes)

    def train(self, on_event: Callback | None = None) -> TrainResult:
        """Train to the end, or until SIGINT or SIGTERM; see `omninorm.experiments.train.train`.

        Raises:
            ConfigError: a step does not fit in the memory of the device. If the run is new, its folder is removed.
        """
        too_large = step_does_not_fit(self.plan.train, self.processes.device)
        stepped = False

        def note(event: Event) -> None:
            nonlocal stepped
            stepped |= isinstance(event, StepEvent)
            if on_event is not None:
                on_event(event)

        try:
            with fitting(too_large), Interrupt(patient=self.processes.count > 1) as interrupt:
                return train(
                    self.model.to(self.processes.device),
                    self.data,
                    self.plan.train,
                    run=self.folder,
                    on_event=note,
                    stopped_by=lambda: interrupt.signal,
                    processes=self.processes,
                )
        except ConfigError:
            self.folder.discard()
            raise
        except RuntimeError:
            if self.processes.count > 1 and not stepped:  # the first step of another process did not fit in memory
                self.folder.discard()
            raise

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exception: object) -> None:
        self.folder.close()


def create_run(
    plan: Plan,
    path: Path | None = None,
    command: Sequence[str] = (),
    processes: Processes | None = None,
    *,
    device: str = AUTO,
) -> Run:
    """Read the text, build tokenizer and model, and at last create the run's folder, when nothing else can fail.

    Args:
        plan: the settings of the run.
        path: a new or empty folder; None means a new folder runs/NAME-N, named after the text.
        command: the command that started the run, for config.json.
        processes: the processes that train together, with their devices; None means only this one, on `device`.
        device: a name as in `omninorm.device.find_devices`. It also determines precision "auto".

    Raises:
        DataError, ConfigError, RunError: the text, a setting, the device or the folder cannot be used. Nothing is
            written in this case.
        MissingExtraError: a package that the run or its checkpoints need is not installed.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     text = Path(folder, "text.txt")
        ...     _ = text.write_text("In the beginning God created the heaven and the earth. " * 20)
        ...     plan = Plan(text=str(text)).change(d_model=16, n_layers=1, n_heads=2, seq_len=16, steps=2)
        ...     with create_run(plan, Path(folder, "run"), device="cpu") as run:
        ...         run.train().status
        'finished'
    """
    check_packages()
    check_model(plan.model)
    processes = processes or Processes(device=find_device(device))
    corpus = load_corpus(plan.text, plan.held_out)
    tokenizer = build_tokenizer(plan.tokenizer, plan.vocab_size, corpus.train)
    plan = replace(
        plan,
        text=None if plan.text is None else corpus.source,
        model=replace(plan.model, vocab_size=tokenizer.vocab_size),
        train=replace(plan.train, precision=choose_precision(plan.train.precision, processes.device)),
    )
    data = tokenize(corpus, tokenizer, plan.train.seq_len, plan.train.eval_bytes)
    model = build_model(plan.model, plan.train.seed)
    serialized = tokenizer.to_json()
    files = {} if serialized is None else {TOKENIZER_FILE: serialized.encode()}
    folder = _create_folder(path, corpus.name, _describe(plan, corpus, files, command, processes.device), files)
    return Run(plan, folder, corpus, tokenizer, data, model, processes=processes)


def _create_folder(path: Path | None, name: str, config: Mapping[str, Any], files: Mapping[str, bytes]) -> RunFolder:
    while path is None:
        try:
            return RunFolder.create(fresh_folder(name), config, files)
        except FolderTakenError:  # another run has just been created under this name
            continue
    return RunFolder.create(path, config, files)


def open_run(
    path: Path,
    text: str | None = None,
    processes: Processes | None = None,
    *,
    steps: int | None = None,
    command: Sequence[str] = (),
    device: str | None = None,
) -> Run:
    """Open a run to continue it from its newest checkpoint, with its own settings, on any device.

    A larger number of steps extends the run, finished or not; a smaller one shortens it, but not below the newest
    checkpoint. From the resumed step on, the learning rate follows the schedule for the new number of steps; the
    warm-up stays as it was. config.json is rewritten and keeps the earlier number under "extended".

    Args:
        path: the run's folder.
        text: the new path of the text, if it has moved.
        processes: the processes that train together, of which the first has already opened the run; None means only
            this one.
        steps: the new number of optimizer steps; None keeps the run's number.
        command: the command that extended or shortened the run, for config.json.
        device: the device on which this process continues alone, a name as in `omninorm.device.find_devices`; None
            means `usual_device`.

    Raises:
        ConfigError: the device cannot be used; `steps` is below the newest checkpoint or the warm-up, or above 10¹²; or
            the model is too large for this machine.
        RunError: the folder has no run, the run is damaged or has diverged, another process is writing it, or the text
            is not the one with which the run was started.
        DataError: the text is missing or cannot be read any more.
        MissingExtraError: a package that the run or its checkpoints need is not installed.
    """
    check_packages()
    config = read_config(path)
    plan = read_plan(path)
    processes = processes or Processes(device=find_device(usual_device(path) if device is None else device))
    if final_status(path / RECORD_FILE) == "diverged":
        raise RunError(f"The run in {path} has diverged and can't be resumed", "", _AFTER_DIVERGENCE)
    try:
        check_model(plan.model)
    except ConfigError as error:
        remedy = "restore the file, or use a machine with more memory"
        raise ConfigError(f"{path / CONFIG_FILE}: {error.invariant}", error.received, remedy) from error
    corpus = load_text(path, text)
    tokenizer = _load_tokenizer(path, plan, config)
    data = tokenize(corpus, tokenizer, plan.train.seq_len, plan.train.eval_bytes)
    steps_saved = list_checkpoints(path / CHECKPOINTS)
    if steps_saved:
        check_sizes(path / CHECKPOINTS, steps_saved[-1], plan.model)
    model = build_model(plan.model, plan.train.seed)
    folder = RunFolder(path) if processes.first else RunFolder.follow(path, processes.rank)
    notices = _changes(config, processes.device)
    try:
        extended = plan if steps is None else _extended(plan, steps, path, folder.newest() or 0)
        if extended != plan:
            notices += (_extend(folder, config, plan, extended, command),)
    except BaseException:
        folder.close()
        raise
    return Run(extended, folder, corpus, tokenizer, data, model, notices, processes)


def usual_device(path: Path) -> str:
    """Return the device on which to resume a run: the kind on which it was started, or "auto" if it is not available.

    If no device is recorded, the run was started on the CPU.
    """
    try:
        name = read_config(path).get("device", "cpu")
        find_device(name if isinstance(name, str) else AUTO)
    except OmninormError:  # `open_run` reports what is wrong with config.json
        return AUTO
    return name if isinstance(name, str) else AUTO


def _extended(plan: Plan, steps: int, path: Path, done: int) -> Plan:
    """Return the plan with another number of steps. The warm-up, whose default depends on this number, stays."""
    steps = read_count("steps", steps)
    if steps == plan.train.steps:
        return plan
    if steps < done:
        invariant = f"A run cannot end before its newest checkpoint, and the run in {path} has done {done} steps"
        raise ConfigError(invariant, f"steps={steps}", f"give at least {done}, or start a new run")
    if steps < plan.train.warmup:
        invariant = (
            f"A run cannot end before its warm-up, and that of the run in {path} takes {plan.train.warmup} steps"
        )
        raise ConfigError(invariant, f"steps={steps}", f"give at least {plan.train.warmup}, or start a new run")
    return replace(plan, train=replace(plan.train, steps=steps, warmup_steps=plan.train.warmup))


def _extend(folder: RunFolder, config: Mapping[str, Any], plan: Plan, extended: Plan, command: Sequence[str]) -> str:
    """Write the new number of steps to config.json; return a notice that describes the change."""
    before, after, done = plan.train.steps, extended.train.steps, folder.newest() or 0
    earlier = config.get("extended")
    entry = {"from": before, "to": after, "at_step": done, "command": list(command), "time": _now()}
    extensions = [*(earlier if isinstance(earlier, list) else []), entry]
    folder.rewrite_config({**config, "train": extended.train.to_dict(), "extended": extensions})
    notice = f"{'extended' if after > before else 'shortened'} from {before} to {after} steps"
    if done == after:
        return f"{notice}, all of which are done"
    schedule = plan.train.schedule
    change = "stays constant" if schedule == "constant" else f"follows the {schedule} schedule for {after} steps"
    return f"{notice}: from step {done + 1} on, the learning rate {change}"


def load_text(path: Path, text: str | None = None) -> Corpus:
    """Return the text of the run in a folder, read from its recorded path or from `text`.

    Raises:
        DataError: the text cannot be read.
        RunError: the text is not the one with which the run was started.
    """
    corpus = _load_again(read_plan(path), text)
    if corpus.sha256 != read_config(path)["data"].get("sha256"):
        invariant = f"{corpus.source} is not the text with which the run in {path} was started"
        raise RunError(invariant, "", "restore the text, or start a new run")
    return corpus


def _load_again(plan: Plan, text: str | None) -> Corpus:
    try:
        return load_corpus(plan.text if text is None else text, plan.held_out)
    except DataError as error:
        remedy = "restore the run's text, or pass its new place with --text"
        raise DataError(error.invariant, error.received, remedy) from error


def _load_tokenizer(path: Path, plan: Plan, config: Mapping[str, Any]) -> Tokenizer:
    tokenizer = load_tokenizer(plan.tokenizer, path, config["tokenizer"].get("sha256"))
    if tokenizer.vocab_size != plan.model.vocab_size:
        invariant = f"The tokenizer in {path} must have the {plan.model.vocab_size} tokens of the model"
        raise RunError(invariant, tokenizer.vocab_size, "restore the files of the original run, or train again")
    return tokenizer


def read_plan(path: Path) -> Plan:
    """Return the plan in a run's config.json.

    Raises:
        RunError: config.json is missing or damaged.
    """
    config = read_config(path)
    try:
        _check_sections(config)
        data, tokenizer = config["data"], config["tokenizer"]
        return Plan(
            model=ThinkerConfig.from_dict(config["model"]),
            train=TrainConfig.from_dict(config["train"]),
            text=data["text"],
            held_out=data["held_out"],
            **{name: value for name, value in tokenizer.items() if name != "sha256"},
        )
    except (OmninormError, KeyError, TypeError) as error:
        remedy = "restore the file, or use the version of omninorm that wrote it"
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise RunError(f"{path / CONFIG_FILE} must describe a run", f"{reason:.300}", remedy) from error


def _check_sections(config: Mapping[str, Any]) -> None:
    for name in _SECTIONS:
        if not isinstance(config[name], dict):
            raise TypeError(f"{name} of type {type(config[name]).__name__}")
    text = config["data"]["text"]
    if not isinstance(text, (str, type(None))):
        raise TypeError(f"a text of type {type(text).__name__}")


def load_run(path: Path, step: int | None = None) -> tuple[Thinker, Tokenizer, int]:
    """Return the model and tokenizer of a run at its newest checkpoint, or at `step`, and the step.

    Raises:
        RunError: the folder has no run, or the checkpoint is missing or damaged.
    """
    check_packages()
    plan = read_plan(path)
    steps = list_checkpoints(path / CHECKPOINTS)
    if not steps and final_status(path / RECORD_FILE) == "diverged":
        invariant = f"The run in {path} diverged before its first checkpoint, so it has no model"
        raise RunError(invariant, "", _AFTER_DIVERGENCE)
    if not steps:
        raise RunError(f"The run in {path} has no checkpoint yet", "", "resume its training")
    if step is not None and step not in steps:
        found = ", ".join(map(str, steps))
        raise RunError(f"The run in {path} has no checkpoint of step {step}", "", f"available: {found}")
    chosen = steps[-1] if step is None else step
    check_sizes(path / CHECKPOINTS, chosen, plan.model)
    model = build_model(plan.model, plan.train.seed)
    load_checkpoint(path / CHECKPOINTS, chosen, model)
    return model.eval(), _load_tokenizer(path, plan, read_config(path)), chosen


def build_model(config: ThinkerConfig, seed: int) -> Thinker:
    """Return a Thinker whose initial weights depend only on the seed; torch's global generator is seeded with it.

    Raises:
        ConfigError: the model does not fit in memory, or has too many blocks.
    """
    check_model(config)
    torch.manual_seed(seed)
    with fitting(does_not_fit(config)):
        return Thinker(config)


def _describe(
    plan: Plan, corpus: Corpus, files: Mapping[str, bytes], command: Sequence[str], device: torch.device
) -> dict[str, Any]:
    """Return the content of config.json."""
    digest = {"sha256": hashlib.sha256(files[TOKENIZER_FILE]).hexdigest()} if TOKENIZER_FILE in files else {}
    return {
        "model": plan.model.to_dict(),
        "train": plan.train.to_dict(),
        "tokenizer": {"tokenizer": plan.tokenizer, "vocab_size": plan.vocab_size, **digest},
        "data": {
            "text": plan.text,
            "source": corpus.source,
            "held_out": plan.held_out,
            "files": corpus.files,
            "skipped": _shorten(corpus.skipped),
            "train_bytes": len(corpus.train),
            "held_out_bytes": len(corpus.held_out),
            "sha256": corpus.sha256,
        },
        "device": str(device),
        "device_name": device_name(device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "git_commit": git_commit(),
        "command": list(command),
        "started": _now(),
    }


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def _shorten(skipped: Sequence[str]) -> list[str]:
    more = len(skipped) - _MOST_SKIPPED
    return [*skipped[:_MOST_SKIPPED], *([f"and {more} more"] if more > 0 else [])]


def _changes(config: Mapping[str, Any], device: torch.device) -> tuple[str, ...]:
    """Return notices of changes since the start of the run that can affect its arithmetic."""
    then, now = config.get("versions", {}), versions()
    notices = [
        f"the run was started with {name} {then.get(name)!s:.40} and continues with {now[name]}: "
        "results may differ in the last bits"
        for name in ("omninorm", "torch")
        if then.get(name) != now[name]
    ]
    if config.get("threads") != torch.get_num_threads():
        threads = f"threads={config.get('threads')!s:.40} and continues with {torch.get_num_threads()}"
        notices.append(f"the run was started with {threads}: results may differ in the last bits")
    before, here = config.get("device_name", "cpu"), device_name(device)
    if before != here:
        devices = f"{before!s:.80} and continues on {here}"
        notices.append(f"the run was started on {devices}: results are equal up to rounding")
    return tuple(notices)


def _names(config: type) -> set[str]:
    return {item.name for item in fields(config)}


def _pick(settings: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name in names}
