"""`omninorm train`: a Thinker on real text."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer

from omninorm.cli.console import console, generate_command, resume_command
from omninorm.cli.harmless import harmless
from omninorm.cli.progress import show_progress
from omninorm.config import NORMALIZATIONS, PLACEMENTS, check_count
from omninorm.errors import ConfigError
from omninorm.experiments.events import TrainResult
from omninorm.experiments.processes import PARALLEL, Processes, SilentExit, joined
from omninorm.experiments.run_folder import is_finished, read_config
from omninorm.experiments.runs import Plan, Run, create_run, open_run, read_plan
from omninorm.experiments.settings import PRECISIONS, SCHEDULES
from omninorm.experiments.tokenizer import TOKENIZERS
from omninorm.report import write_report
from omninorm.thinker.config import FEED_FORWARDS

_PLAN = Plan()
_SHOWN = 5
_MOST_THREADS = 4096
REPORT_FILE = "report.html"
_DEFAULTS = {
    **{field.name: getattr(_PLAN, field.name) for field in dataclasses.fields(_PLAN)},
    **_PLAN.model.to_dict(),
    **_PLAN.train.to_dict(),
    **dataclasses.asdict(_PLAN.model.norm),
}


def _option(name: str, flag: str, panel: str, text: str, default: str | None = None) -> Any:
    """An option without a default of its own, so that one that was given can be told from one that was not; the help
    page shows the library's default."""
    value = _DEFAULTS.get(name)
    shown = default or (None if value is None else str(value))
    return typer.Option(flag, help=text, rich_help_panel=panel, show_default=shown or False)


def _text(name: str, flag: str, text: str, default: str | None = None) -> Any:
    return _option(name, flag, "Text", text, default)


def _model(name: str, flag: str, text: str, default: str | None = None) -> Any:
    return _option(name, flag, "Model", text, default)


def _norm(name: str, flag: str, text: str, default: str | None = None) -> Any:
    return _option(name, flag, "Norm", text, default)


def _train(name: str, flag: str, text: str, default: str | None = None) -> Any:
    return _option(name, flag, "Training", text, default)


def _one_of(choices: tuple[str, ...]) -> str:
    return f"One of {', '.join(choices)}."


def train(
    context: typer.Context,
    text: Annotated[
        str | None, _text("text", "--text", "A text file (.gz too), or a folder of them.", "King James Bible")
    ] = None,
    held_out: Annotated[float | None, _text("held_out", "--held-out", "Share held out, at the text's end.")] = None,
    tokenizer: Annotated[str | None, _text("tokenizer", "--tokenizer", _one_of(TOKENIZERS))] = None,
    vocab_size: Annotated[int | None, _text("", "--vocab-size", "Tokens of a BPE tokenizer.", "1024")] = None,
    out: Annotated[Path | None, _option("", "--out", "Run", "The run's folder, new or empty.", "runs/NAME-N")] = None,
    resume: Annotated[Path | None, _option("", "--resume", "Run", "Go on with the run in this folder.")] = None,
    threads: Annotated[int | None, _option("", "--threads", "Run", "CPU threads.", "torch's choice")] = None,
    parallel: Annotated[
        str, _option("", "--parallel", "Run", f"How torchrun's processes share the model. {_one_of(PARALLEL)}", "ddp")
    ] = PARALLEL[0],
    d_model: Annotated[int | None, _model("d_model", "--d-model", "Width of the residual stream.")] = None,
    n_layers: Annotated[int | None, _model("n_layers", "--layers", "Blocks.")] = None,
    n_heads: Annotated[int | None, _model("n_heads", "--heads", "Query heads.")] = None,
    n_kv_heads: Annotated[int | None, _model("", "--kv-heads", "Key and value heads.", "as --heads")] = None,
    head_dim: Annotated[int | None, _model("", "--head-dim", "Width of a head.", "d_model / heads")] = None,
    feed_forward: Annotated[str | None, _model("feed_forward", "--feed-forward", _one_of(FEED_FORWARDS))] = None,
    d_ff: Annotated[int | None, _model("", "--d-ff", "Width of the feed-forward.", "by --feed-forward")] = None,
    tied_head: Annotated[
        bool | None, _model("tied_head", "--tied-head/--untied-head", "Share the head with the embedding.", "tied")
    ] = None,
    normalization: Annotated[str | None, _norm("normalization", "--norm", _one_of(NORMALIZATIONS))] = None,
    norm_placement: Annotated[str | None, _norm("norm_placement", "--placement", _one_of(PLACEMENTS))] = None,
    norm_eps: Annotated[float | None, _norm("norm_eps", "--eps", "ε, added under the root.")] = None,
    qk_norm: Annotated[
        bool | None, _norm("", "--qk-norm/--no-qk-norm", "Norms on queries and keys.", "as the placement wants")
    ] = None,
    steps: Annotated[int | None, _train("steps", "--steps", "Optimizer steps.")] = None,
    batch_size: Annotated[int | None, _train("batch_size", "--batch-size", "Windows per micro-batch.")] = None,
    seq_len: Annotated[int | None, _train("seq_len", "--seq-len", "Tokens per window.")] = None,
    lr: Annotated[float | None, _train("lr", "--lr", "Largest learning rate.")] = None,
    warmup_steps: Annotated[
        int | None, _train("", "--warmup-steps", "Steps of linear warm-up.", "a tenth of the steps, at most 100")
    ] = None,
    schedule: Annotated[str | None, _train("schedule", "--schedule", _one_of(SCHEDULES))] = None,
    min_lr_ratio: Annotated[
        float | None, _train("min_lr_ratio", "--min-lr-ratio", "Where the cosine ends, as a share of --lr.")
    ] = None,
    weight_decay: Annotated[float | None, _train("weight_decay", "--weight-decay", "AdamW's, on matrices.")] = None,
    betas: Annotated[tuple[float, float] | None, _train("", "--betas", "AdamW's two.", "0.9 0.95")] = None,
    adam_eps: Annotated[float | None, _train("adam_eps", "--adam-eps", "AdamW's ε.")] = None,
    grad_clip: Annotated[float | None, _train("grad_clip", "--grad-clip", "Largest gradient norm.")] = None,
    no_grad_clip: Annotated[bool, _train("", "--no-grad-clip", "Never clip gradients.")] = False,
    grad_accumulation: Annotated[
        int | None, _train("grad_accumulation", "--grad-accumulation", "Micro-batches per step.")
    ] = None,
    precision: Annotated[str | None, _train("precision", "--precision", _one_of(PRECISIONS))] = None,
    seed: Annotated[int | None, _train("seed", "--seed", "Decides the first weights and every batch.")] = None,
    eval_every: Annotated[int | None, _train("eval_every", "--eval-every", "Steps between evaluations.")] = None,
    eval_bytes: Annotated[int | None, _train("eval_bytes", "--eval-bytes", "Held-out bytes to evaluate on.")] = None,
    checkpoint_every: Annotated[
        int | None, _train("checkpoint_every", "--checkpoint-every", "Steps between checkpoints.")
    ] = None,
    keep_checkpoints: Annotated[
        int | None, _train("keep_checkpoints", "--keep-checkpoints", "How many checkpoints stay.")
    ] = None,
    log_every: Annotated[int | None, _train("log_every", "--log-every", "Record every n-th step.")] = None,
    watch_every: Annotated[
        int | None, _train("watch_every", "--watch-every", "Steps between samples of every signal.")
    ] = None,
    no_watch: Annotated[bool, _train("", "--no-watch", "Do not watch for what goes wrong.")] = False,
) -> None:
    """Train a small transformer on real text, on bytes or BPE tokens.

    Started by torchrun, all processes train one model, each on its share of every batch. With --parallel ddp each has
    the whole model, with fsdp a part of every tensor of it. Any number of processes, either way, can --resume a run.

    Ctrl-C stops after the current step with a checkpoint, and prints the command to go on.
    """
    given = _given(context.params)
    with joined(parallel) as processes:
        if not processes.first:
            try:
                _follow(processes, text)
            except SilentExit:
                raise typer.Exit(2) from None
            return
        opened = _open_for_all(processes, resume, out, threads, given, context.obj)
        if opened is None:
            assert resume is not None
            console().print(f"The run in {resume} is finished. Try it: {generate_command(resume)}")
            return
        with opened as run:
            _introduce(run)
            try:
                result = show_progress(run)
            except KeyboardInterrupt:
                _give_up(run)
            page = _report(run)
    _conclude(result, run, page)


def _open_for_all(
    processes: Processes,
    resume: Path | None,
    out: Path | None,
    threads: int | None,
    given: dict[str, Any],
    command: Sequence[str],
) -> Run | None:
    """Opens the run, and tells the other processes where it is; None where it is finished."""
    opened: list[Run] = []

    def open_and_tell() -> str | None:
        if resume is not None and is_finished(resume):
            return None
        plan = _PLAN if resume is None else read_plan(resume)
        processes.check_batch(given.get("batch_size", plan.train.batch_size))  # before there is a folder
        opened.append(_open(resume, out, threads, given, command))
        return str(opened[0].folder.path)

    if processes.from_first(open_and_tell) is None:
        return None
    opened[0].processes = processes
    return opened[0]


def _follow(processes: Processes, text: str | None) -> None:
    """Trains along with the first process, which speaks for all."""
    folder = processes.from_first(lambda: None)
    if folder is None:
        return
    with open_run(Path(folder), text, processes) as run:
        run.train()


def _given(params: Mapping[str, Any]) -> dict[str, Any]:
    """The settings on the command line, by the library's names."""
    apart = ("out", "resume", "threads", "parallel", "no_grad_clip", "no_watch")
    given = {name: value for name, value in params.items() if name not in apart and value is not None}
    if params["no_grad_clip"]:
        if "grad_clip" in given:
            received = f"--grad-clip {given['grad_clip']} with --no-grad-clip"
            raise ConfigError("gradients are either clipped or not", received, "give one of the two")
        given["grad_clip"] = None
    if params["no_watch"]:
        if "watch_every" in given:
            received = f"--watch-every {given['watch_every']} with --no-watch"
            raise ConfigError("a run is either watched or not", received, "give one of the two")
        given["watch_every"] = None
    return given


def _open(
    resume: Path | None, out: Path | None, threads: int | None, given: dict[str, Any], command: Sequence[str]
) -> Run:
    if resume is None:
        _use_threads(threads)
        return create_run(Plan().change(**given), out, command)
    text = given.pop("text", None)
    recorded = read_config(resume).get("threads")
    if out is not None:
        given["out"] = str(out)
    if threads is not None and threads != recorded:
        given["threads"] = threads
    _refuse_changes(read_plan(resume), given)
    _use_threads(recorded)
    return open_run(resume, text)


def _refuse_changes(plan: Plan, given: Mapping[str, Any]) -> None:
    for name, value in given.items():
        if name in ("out", "threads") or plan.change(**{name: value}) != plan:
            received = f"another {name.replace('_', ' ')}, {value}"
            raise ConfigError("--resume goes on with the run's own settings", received, "leave it out or start anew")


def _use_threads(threads: int | None) -> None:
    if threads is not None:
        check_count("threads", threads)
        if threads > _MOST_THREADS:
            raise ConfigError(
                f"threads must be at most {_MOST_THREADS}", str(threads), "choose as many as there are cores"
            )
        torch.set_num_threads(threads)


def _introduce(run: Run) -> None:
    corpus, screen = run.corpus, console()
    files = "" if corpus.files == 1 else f"{corpus.files} files, "
    size = f"{len(corpus.train):,} bytes to train on, {len(corpus.held_out):,} held out"
    screen.print(f"Text   {corpus.source}: {files}{size}")
    for skipped in corpus.skipped[:_SHOWN]:
        screen.print(f"       left out: {harmless(skipped, one_line=True)}")
    if len(corpus.skipped) > _SHOWN:
        screen.print(f"       left out: {len(corpus.skipped) - _SHOWN} more")
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    norm = run.plan.model.norm
    shape = f"{run.plan.model.n_layers} blocks of width {run.plan.model.d_model}, {parameters:,} parameters"
    screen.print(f"Model  {shape}, {norm.normalization}, placement {norm.norm_placement}")
    screen.print(f"Run    {run.folder.path}, {torch.get_num_threads()} threads")
    for notice in run.notices:
        screen.print(f"Note   {harmless(notice, one_line=True)}")


def _give_up(run: Run) -> NoReturn:
    """A second Ctrl-C came before the step was done."""
    step = run.folder.newest() or 0
    command = resume_command(run.folder.path)
    console().print(f"Stopped at once; what came after step {step} is lost. Go on with:\n  {command}")
    raise typer.Exit(128 + signal.SIGINT)


def _report(run: Run) -> Path | None:
    """The run's report.html, if it was watched."""
    if run.plan.train.watch_every is None:
        return None
    return write_report(run.folder.path, run.folder.path / REPORT_FILE)


def _conclude(result: TrainResult, run: Run, page: Path | None) -> None:
    screen, folder = console(), run.folder.path
    if page is not None:
        screen.print(f"Report: {page}")
    if result.status == "interrupted":
        screen.print(f"Stopped after step {result.steps} with a checkpoint. Go on with:\n  {resume_command(folder)}")
        raise typer.Exit(128 + (result.signal or signal.SIGINT))
    if result.status == "diverged":
        screen.print(f"Diverged at step {result.steps}: loss, gradient or weights are no longer finite.")
        screen.print(
            f"Try a smaller learning rate, gradient clipping, or another norm or placement. Recorded in {folder}"
        )
        raise typer.Exit(1)
    speed = f"{result.tokens_per_second:,.0f} tokens/s"
    screen.print(f"Done: {result.bits_per_byte:.3f} bits per byte on held-out text, {speed}. Written to {folder}")
    screen.print(f"Try it: {generate_command(folder)}")
