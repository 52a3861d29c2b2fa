"""`omninorm generate`: stream text from a model. Torch is imported only once a model is about to be loaded."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from omninorm.cli.console import DEVICE_HELP
from omninorm.cli.harmless import harmless
from omninorm.errors import ConfigError, RunError

if TYPE_CHECKING:
    from omninorm.experiments.tokenizer import Tokenizer
    from omninorm.thinker import Thinker

_MODELS = "pass the folder of a run, a Hugging Face folder of a Llama or Qwen3 model, or a .gguf file"


def generate(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL",
            help="Folder of a run, Hugging Face folder (Llama or Qwen3), or .gguf file.",
            show_default=False,
        ),
    ],
    prompt: Annotated[str, typer.Option(help="Text to continue.", show_default="a line break")] = "\n",
    max_new_tokens: Annotated[int, typer.Option(help="Maximum number of tokens to generate.")] = 400,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Sample from the k most probable tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus (top-p) sampling threshold.")] = None,
    seed: Annotated[int | None, typer.Option(help="Random seed.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop before this text. Can be repeated.")] = None,
    step: Annotated[
        int | None, typer.Option(help="Step of the run's checkpoint to use.", show_default="the newest")
    ] = None,
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of streaming.")] = False,
) -> None:
    """Continue a text with the model of a run, or with a Llama or Qwen3 model from Hugging Face or in GGUF format."""
    from omninorm.device import find_device
    from omninorm.experiments.memory import fitting
    from omninorm.experiments.sample import stream_text

    place = find_device(device)
    loaded, tokenizer, chosen = _load(model, step)
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed, "stop": stop or ()}
    with fitting(ConfigError("The model must fit in the memory of the device", str(place), "use --device cpu")):
        loaded = loaded.to(place)
    pieces = stream_text(loaded, tokenizer, prompt, max_new_tokens, **sampling)  # type: ignore[arg-type]
    if as_json:
        values = {"run": str(model), "step": chosen, "prompt": prompt, "text": "".join(pieces), **sampling}
        typer.echo(json.dumps(values, ensure_ascii=False, indent=2))
        return
    _write(prompt)
    for piece in pieces:
        _write(piece)
    _write("\n")


def _load(path: Path, step: int | None) -> tuple[Thinker, Tokenizer, int | None]:
    from omninorm.experiments.pretrained import is_pretrained, load_folder, load_gguf
    from omninorm.experiments.runs import load_run

    if not os.path.lexists(path):
        raise RunError(f"No such file or folder: {path}", "", _MODELS)
    if path.is_file() and path.suffix != ".gguf":
        raise RunError(f"{path} is a file, but not a .gguf file", "", _MODELS)
    foreign = load_gguf if path.suffix == ".gguf" else load_folder if is_pretrained(path) else None
    if foreign is None:
        return load_run(path, step)
    if step is not None:
        invariant = f"--step chooses a checkpoint of a run, and {path} is not a run"
        raise ConfigError(invariant, f"--step {step}", "leave --step out")
    return (*foreign(path), None)


def _write(text: str) -> None:
    sys.stdout.write(harmless(text))
    sys.stdout.flush()
