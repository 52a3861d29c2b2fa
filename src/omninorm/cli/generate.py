"""`omninorm generate`: text from a run, as it is made."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from omninorm.cli.harmless import harmless
from omninorm.errors import ConfigError
from omninorm.experiments.pretrained import load_gguf
from omninorm.experiments.runs import load_run
from omninorm.experiments.sample import stream_text
from omninorm.experiments.tokenizer import Tokenizer
from omninorm.thinker import Thinker


def generate(
    run: Annotated[Path, typer.Argument(help="The folder of a run, or a .gguf file.", show_default=False)],
    prompt: Annotated[str, typer.Option(help="The text to continue.", show_default="a line break")] = "\n",
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add at most.")] = 400,
    temperature: Annotated[float, typer.Option(help="0 takes the most probable token each time.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k most probable tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the fewest tokens of this total probability.")] = None,
    seed: Annotated[int | None, typer.Option(help="For the same text again.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.")] = None,
    step: Annotated[int | None, typer.Option(help="Which checkpoint.", show_default="the newest")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object at the end instead of a stream.")] = False,
) -> None:
    """Continue a text with the model of a run, or with one that others have trained (llama or qwen3, as GGUF)."""
    model, tokenizer, chosen = _load(run, step)
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed, "stop": stop or ()}
    pieces = stream_text(model, tokenizer, prompt, max_new_tokens, **sampling)  # type: ignore[arg-type]
    if as_json:
        values = {"run": str(run), "step": chosen, "prompt": prompt, "text": "".join(pieces), **sampling}
        typer.echo(json.dumps(values, ensure_ascii=False, indent=2))
        return
    _write(prompt)
    for piece in pieces:
        _write(piece)
    _write("\n")


def _load(path: Path, step: int | None) -> tuple[Thinker, Tokenizer, int | None]:
    if path.suffix != ".gguf":
        return load_run(path, step)
    if step is not None:
        raise ConfigError("--step chooses a checkpoint of a run", f"{step} for {path}", "leave it out")
    return (*load_gguf(path), None)


def _write(text: str) -> None:
    sys.stdout.write(harmless(text))
    sys.stdout.flush()
