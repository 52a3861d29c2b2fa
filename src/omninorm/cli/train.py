"""`omninorm train`: train a Thinker on real text. Torch is imported only once a run is about to start."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from omninorm.cli.console import DEVICE_HELP
from omninorm.cli.training import conclude, give_up, introduce, print_finished, report
from omninorm.config import NORMALIZATIONS, PLACEMENTS, check_count
from omninorm.errors import ConfigError
from omninorm.thinker.config import FEED_FORWARDS

if TYPE_CHECKING:
    from omninorm.experiments.processes import Processes
    from omninorm.experiments.runs import Plan, Run

_MOST_THREADS = 4096
# The library's choices and defaults, repeated here because importing them would import torch. A test compares both.
TOKENIZERS, SCHEDULES, PARALLEL = ("byte", "bpe"), ("cosine", "constant"), ("ddp", "fsdp")
OPTIMIZERS = ("adamw", "muon")
PRECISIONS = ("auto", "float32", "bfloat16", "float16")
DEFAULTS: dict[str, object] = {
    "held_out": 0.1, "tokenizer": "byte", "d_model": 128, "n_layers": 4, "n_heads": 4, "feed_forward": "swiglu",
    "normalization": "rmsnorm", "norm_placement": "pre", "norm_eps": 1e-6, "steps": 600, "batch_size": 16,
    "seq_len": 128, "lr": 0.003, "schedule": "cosine", "min_lr_ratio": 0.1, "optimizer": "adamw", "weight_decay": 0.1,
    "adam_eps": 1e-8, "grad_clip": 1.0, "grad_accumulation": 1, "precision": "auto", "seed": 0, "eval_every": 100,
    "eval_bytes": 65536, "checkpoint_every": 100, "keep_checkpoints": 2, "log_every": 1, "watch_every": 10,
}  # fmt: skip
# Options that are not settings of the run, so they are not compared with it when it is resumed.
_APART = ("text", "out", "resume", "device", "threads", "parallel", "no_grad_clip", "no_watch")


def _option(name: str, flag: str, panel: str, text: str, default: str | None = None, metavar: str | None = None) -> Any:
    """Return an option whose default is None, so that the command knows whether it was given.

    The help page shows the library's default."""
    shown = default or (str(DEFAULTS[name]) if name in DEFAULTS else None)
    return typer.Option(flag, help=text, rich_help_panel=panel, show_default=shown or False, metavar=metavar)


def _text(name: str, flag: str, text: str, default: str | None = None) -> Any:
    return _option(name, flag, "Text", text, default)


def _model(name: str, flag: str, text: str, default: str | None = None) -> Any:
    return _option(name, flag, "Model", text, default)


def _norm(name: str, flag: str, text: str, default: str | None = None) -> Any:
    return _option(name, flag, "Norm", text, default)


def _train(name: str, flag: str, text: str, default: str | None = None, metavar: str | None = None) -> Any:
    return _option(name, flag, "Training", text, default, metavar)


def _one_of(choices: tuple[str, ...]) -> str:
    return f"one of {', '.join(choices)}."


def train(
    context: typer.Context,
    text: Annotated[
        str | None,
        _text("text", "--text", "Text to train on: a UTF-8 file (also .gz) or a folder of files.", "King James Bible"),
    ] = None,
    held_out: Annotated[
        float | None, _text("held_out", "--held-out", "Fraction of the text to hold out, taken from its end.")
    ] = None,
    tokenizer: Annotated[str | None, _text("tokenizer", "--tokenizer", f"Tokenizer: {_one_of(TOKENIZERS)}")] = None,
    vocab_size: Annotated[
        int | None, _text("", "--vocab-size", "Vocabulary size of the BPE tokenizer.", "1024")
    ] = None,
    out: Annotated[Path | None, _option("", "--out", "Run", "Folder of the run, new or empty.", "runs/NAME-N")] = None,
    resume: Annotated[
        Path | None, _option("", "--resume", "Run", "Resume the run in this folder; --steps may extend it.")
    ] = None,
    device: Annotated[
        str | None,
        _option("", "--device", "Run", DEVICE_HELP, "auto; with --resume, that of the run"),
    ] = None,
    threads: Annotated[
        int | None, _option("", "--threads", "Run", "Number of CPU threads.", "PyTorch's default")
    ] = None,
    parallel: Annotated[
        str,
        _option("", "--parallel", "Run", f"How processes under torchrun share the model: {_one_of(PARALLEL)}", "ddp"),
    ] = PARALLEL[0],
    d_model: Annotated[int | None, _model("d_model", "--d-model", "Width of the residual stream.")] = None,
    n_layers: Annotated[int | None, _model("n_layers", "--layers", "Number of blocks.")] = None,
    n_heads: Annotated[int | None, _model("n_heads", "--heads", "Number of query heads.")] = None,
    n_kv_heads: Annotated[
        int | None, _model("", "--kv-heads", "Number of key and value heads.", "same as --heads")
    ] = None,
    head_dim: Annotated[int | None, _model("", "--head-dim", "Width of a head.", "d_model / heads")] = None,
    feed_forward: Annotated[
        str | None, _model("feed_forward", "--feed-forward", f"Feed-forward layer: {_one_of(FEED_FORWARDS)}")
    ] = None,
    d_ff: Annotated[
        int | None,
        _model("", "--d-ff", "Hidden width of the feed-forward layer.", "8/3 d_model for swiglu, else 4 d_model"),
    ] = None,
    tied_head: Annotated[
        bool | None,
        _model("tied_head", "--tied-head/--untied-head", "Share the output head with the embedding.", "tied"),
    ] = None,
    normalization: Annotated[str | None, _norm("normalization", "--norm", f"Norm: {_one_of(NORMALIZATIONS)}")] = None,
    norm_placement: Annotated[
        str | None, _norm("norm_placement", "--placement", f"Norm placement: {_one_of(PLACEMENTS)}")
    ] = None,
    norm_eps: Annotated[float | None, _norm("norm_eps", "--eps", "Epsilon of the norm.")] = None,
    qk_norm: Annotated[
        bool | None,
        _norm("", "--qk-norm/--no-qk-norm", "Normalize queries and keys.", "only for reordered and hybrid"),
    ] = None,
    v_norm: Annotated[bool | None, _norm("", "--v-norm/--no-v-norm", "Normalize values.", "only for hybrid")] = None,
    embedding_norm: Annotated[
        bool | None,
        _norm("", "--embedding-norm/--no-embedding-norm", "Normalize the embeddings.", "no-embedding-norm"),
    ] = None,
    steps: Annotated[
        int | None,
        _train(
            "steps", "--steps", "Number of optimizer steps; with --resume, another number extends or shortens the run."
        ),
    ] = None,
    batch_size: Annotated[int | None, _train("batch_size", "--batch-size", "Sequences per micro-batch.")] = None,
    seq_len: Annotated[int | None, _train("seq_len", "--seq-len", "Tokens per sequence.")] = None,
    lr: Annotated[float | None, _train("lr", "--lr", "Peak learning rate.")] = None,
    warmup_steps: Annotated[
        int | None,
        _train("", "--warmup-steps", "Steps of linear warm-up.", "10% of the steps, at most 100"),
    ] = None,
    schedule: Annotated[
        str | None, _train("schedule", "--schedule", f"Learning rate schedule: {_one_of(SCHEDULES)}")
    ] = None,
    min_lr_ratio: Annotated[
        float | None, _train("min_lr_ratio", "--min-lr-ratio", "Final learning rate as a fraction of --lr.")
    ] = None,
    optimizer: Annotated[
        str | None,
        _train(
            "optimizer",
            "--optimizer",
            f"Optimizer: {_one_of(OPTIMIZERS)} muon: for hidden matrices; AdamW for the rest.",
        ),
    ] = None,
    weight_decay: Annotated[
        float | None, _train("weight_decay", "--weight-decay", "Weight decay, applied to matrices only.")
    ] = None,
    decay_norms: Annotated[
        bool | None,
        _train("", "--decay-norms/--no-decay-norms", "Decay the norms' gains too.", "no-decay-norms"),
    ] = None,
    betas: Annotated[
        tuple[float, float] | None, _train("", "--betas", "AdamW betas.", "0.9 0.95", metavar="<float> <float>")
    ] = None,
    adam_eps: Annotated[float | None, _train("adam_eps", "--adam-eps", "AdamW epsilon.")] = None,
    grad_clip: Annotated[
        float | None, _train("grad_clip", "--grad-clip", "Clip the total gradient norm to this value.")
    ] = None,
    no_grad_clip: Annotated[bool, _train("", "--no-grad-clip", "Disable gradient clipping.")] = False,
    grad_accumulation: Annotated[
        int | None, _train("grad_accumulation", "--grad-accumulation", "Micro-batches per step.")
    ] = None,
    precision: Annotated[
        str | None,
        _train(
            "precision",
            "--precision",
            f"Precision: {_one_of(PRECISIONS)} auto: bfloat16 on GPUs with bfloat16, else float16; float32 on the CPU.",
        ),
    ] = None,
    compile: Annotated[bool | None, _train("", "--compile/--no-compile", "Compile the model.", "no-compile")] = None,
    tf32: Annotated[
        bool | None, _train("", "--tf32/--no-tf32", "Allow TF32 in float32 matrix products on GPUs.", "no-tf32")
    ] = None,
    seed: Annotated[int | None, _train("seed", "--seed", "Random seed for weights and batches.")] = None,
    eval_every: Annotated[int | None, _train("eval_every", "--eval-every", "Steps between evaluations.")] = None,
    eval_bytes: Annotated[
        int | None, _train("eval_bytes", "--eval-bytes", "Bytes of held-out text to evaluate on.")
    ] = None,
    checkpoint_every: Annotated[
        int | None, _train("checkpoint_every", "--checkpoint-every", "Steps between checkpoints.")
    ] = None,
    keep_checkpoints: Annotated[
        int | None, _train("keep_checkpoints", "--keep-checkpoints", "Number of newest checkpoints to keep.")
    ] = None,
    log_every: Annotated[int | None, _train("log_every", "--log-every", "Steps between recorded steps.")] = None,
    watch_every: Annotated[
        int | None, _train("watch_every", "--watch-every", "Steps between samples of all monitored signals.")
    ] = None,
    no_watch: Annotated[bool, _train("", "--no-watch", "Disable monitoring.")] = False,
) -> None:
    """Train a small transformer on real text, on bytes or BPE tokens.

    The run uses a GPU if PyTorch sees one, and otherwise the CPU. Training steps were measured on GPUs, this command
    not yet. Ctrl-C stops after the current step, saves a checkpoint and prints the command to resume.

    --resume continues a run with its own settings, on any device. A larger --steps extends the run, whether it is
    finished or not: from the resumed step on, the learning rate follows the schedule for the new number of steps, and
    the warm-up stays as it was. A smaller --steps shortens the run, but not below its newest checkpoint.

    Under torchrun, each process uses a different GPU, or all share the CPU. --parallel ddp replicates the model in
    every process, and --parallel fsdp shards it. A run can be resumed with any number of processes and either option.
    """
    from omninorm.cli.progress import show_progress
    from omninorm.experiments.processes import joined

    context.params |= {"out": out, "resume": resume}  # Typer < 0.29 makes paths of texts only for this function
    given = _given(context.params)
    with _ended_by_others(), joined(parallel, _device(device, resume)) as processes:
        if not processes.first:
            _follow(processes, text)
            return
        opened = _open_for_all(processes, context, given)
        if opened is None:
            assert resume is not None
            print_finished(resume)
            return
        with opened as run:
            introduce(run)
            try:
                result = show_progress(run)
            except KeyboardInterrupt:
                give_up(run)
            page = report(run)
    conclude(result, run, page)


@contextlib.contextmanager
def _ended_by_others() -> Iterator[None]:
    """End this process with exit code 2 if another process has reported why all of them end."""
    from omninorm.experiments.processes import SilentExit

    try:
        yield
    except SilentExit:
        raise typer.Exit(2) from None


def _open_for_all(processes: Processes, context: typer.Context, given: dict[str, Any]) -> Run | None:
    """Open the run and send its folder to the other processes; return None if the run is finished."""
    from omninorm.experiments.run_folder import is_finished
    from omninorm.experiments.runs import Plan, load_text, read_plan

    resume = context.params["resume"]
    opened: list[Run] = []

    def open_and_send() -> str | None:
        plan = Plan() if resume is None else read_plan(resume)
        if resume is not None:
            _check_same(context, plan, given)
            if is_finished(resume) and given.get("steps", plan.train.steps) == plan.train.steps:
                if (text := context.params["text"]) is not None:
                    load_text(resume, text)  # only to check it: the run is finished
                return None
        processes.check_batch(given.get("batch_size", plan.train.batch_size))  # before the folder is created
        opened.append(_open(context, given, processes))
        return str(opened[0].folder.path)

    return None if processes.from_first(open_and_send) is None else opened[0]


def _device(given: str | None, resume: Path | None) -> str:
    """Return the name of the device. Under torchrun it is only the type, and each process chooses a device of it."""
    from omninorm.experiments.processes import launched
    from omninorm.experiments.runs import usual_device

    if given is not None or resume is None:
        return given or "auto"
    name = usual_device(resume)
    return name.split(":")[0] if launched() else name


def _follow(processes: Processes, text: str | None) -> None:
    """Train together with the first process, which prints and records for all processes."""
    from omninorm.experiments.runs import open_run

    folder = processes.from_first(lambda: None)
    if folder is None:
        return
    with open_run(Path(folder), text, processes) as run:
        run.train()


def _given(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the run that were given on the command line, by the library's names."""
    given = {name: value for name, value in params.items() if name not in _APART and value is not None}
    for switch, name, option in (
        ("no_grad_clip", "grad_clip", "--grad-clip"),
        ("no_watch", "watch_every", "--watch-every"),
    ):
        if params[switch]:
            if name in given:
                off = f"--{switch.replace('_', '-')}"
                raise ConfigError(
                    f"{option} and {off} exclude each other",
                    f"{option} {given[name]} with {off}",
                    "pass only one of them",
                )
            given[name] = None
    return given


def _open(context: typer.Context, given: dict[str, Any], processes: Processes) -> Run:
    from omninorm.experiments.run_folder import read_config
    from omninorm.experiments.runs import Plan, create_run, open_run

    text, resume, threads = (context.params[name] for name in ("text", "resume", "threads"))
    if resume is None:
        _use_threads(threads)
        plan = Plan().change(**given, **({} if text is None else {"text": text}))
        return create_run(plan, context.params["out"], context.obj, processes)
    _use_threads(read_config(resume).get("threads"))
    return open_run(resume, text, processes, steps=given.get("steps"), command=context.obj)


def _check_same(context: typer.Context, plan: Plan, given: Mapping[str, Any]) -> None:
    """Raise ConfigError if an option differs from the setting of the run that is resumed. `open_run` checks --steps."""
    from omninorm.experiments.precision import SHORT as SHORT_PRECISIONS
    from omninorm.experiments.run_folder import read_config
    from omninorm.experiments.tokenizer import DEFAULT_VOCABULARY

    resume, out, threads = (context.params[name] for name in ("resume", "out", "threads"))
    theirs = plan.settings()
    if given.get("precision") in SHORT_PRECISIONS:
        given = {**given, "precision": SHORT_PRECISIONS[given["precision"]]}
    # A short text may give fewer BPE tokens than were requested.
    requested = DEFAULT_VOCABULARY if plan.vocab_size is None and plan.tokenizer == "bpe" else plan.vocab_size
    for name, value in given.items():
        accepted = name == "steps" or (name == "vocab_size" and value == requested)
        accepted |= name == "precision" and value == "auto"
        if value != theirs[name] and not accepted:
            _refuse(context, name, theirs[name], value)
    recorded = read_config(resume).get("threads")
    if threads is not None and threads != recorded:
        _refuse(context, "threads", recorded, threads)
    if out is not None and out.absolute() != resume.absolute():
        _refuse(context, "out", resume, out)


def _refuse(context: typer.Context, name: str, theirs: object, given: object) -> NoReturn:
    option = next(each for each in context.command.params if each.name == name)
    typed, recorded = _typed(option, given), _typed(option, theirs)
    flag = typed.split()[0]
    invariant = f"{typed} conflicts with the run in {context.params['resume']}, which has {recorded}"
    raise ConfigError(invariant, "", f"leave {flag} out, or start a new run without --resume")


def _typed(option: Any, value: object) -> str:
    """Return a setting as a user types it on the command line."""
    flag = str((option.secondary_opts if value is False else option.opts)[0])
    if value is None:
        return {"grad_clip": "--no-grad-clip", "watch_every": "--no-watch"}.get(option.name, f"no {flag}")
    if isinstance(value, bool):
        return flag
    return f"{flag} {' '.join(map(str, value)) if isinstance(value, tuple) else value}"


def _use_threads(threads: int | None) -> None:
    import torch

    if threads is not None:
        check_count("threads", threads)
        if threads > _MOST_THREADS:
            invariant = f"threads must be at most {_MOST_THREADS}"
            raise ConfigError(invariant, str(threads), "use as many threads as there are cores")
        torch.set_num_threads(threads)
