"""Scenarios of training on the simulated accelerator, each run in a separate process:
`python simulated_training.py NAME FOLDER`. It prints the result as JSON."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from helpers.cli import SENTENCE, SMALL
from helpers.simulated_accelerator import NAME, counting, counts, install

from omninorm.cli import main
from omninorm.experiments import TrainConfig, build_model, create_run, open_run, stream_text, train
from omninorm.experiments.corpus import Corpus, tokenize
from omninorm.experiments.runs import Plan, load_run
from omninorm.experiments.tokenizer import ByteTokenizer
from omninorm.record import read_history
from omninorm.thinker import ThinkerConfig

TEXT = (SENTENCE * 80).encode()
CORPUS = Corpus("text", "text", TEXT[:7000], TEXT[7000:])
SHAPE = ThinkerConfig(d_model=32, n_layers=2, n_heads=2, max_seq_len=16)
SETTINGS = TrainConfig(steps=8, batch_size=4, seq_len=16, eval_every=4, checkpoint_every=4)
DEVICES = ("cpu", NAME)


def trained(folder: Path) -> dict[str, Any]:
    """Train on both devices, in every precision and with accumulation; count the waits of each step."""
    found: dict[str, Any] = {}
    for precision in ("float32", "bfloat16", "float16"):
        config = replace(SETTINGS, precision=precision, grad_accumulation=2)
        for device in DEVICES:
            model = build_model(SHAPE, 0).to(device)
            with counting() as waited:
                result = train(model, tokenize(CORPUS, ByteTokenizer(), 16), config)
            numbers = {"losses": result.losses, "norms": result.grad_norms, "bits": result.bits_per_byte}
            found[f"{precision} {device}"] = {**numbers, "waits": sum(waited.waits.values())}
    return found


def waits(folder: Path) -> list[list[Any]]:
    """Return (event, waits since the event before) of a run without evaluations between the first and last step."""
    model, config = build_model(SHAPE, 0).to(NAME), replace(SETTINGS, eval_every=100, grad_accumulation=3)
    found: list[list[Any]] = []
    counts.clear()

    def on_event(event: Any) -> None:
        found.append([f"{type(event).__name__} {event.step}", {name: n for name, n in counts.waits.items() if n}])
        counts.clear()

    train(model, tokenize(CORPUS, ByteTokenizer(), 16), config, on_event=on_event)
    return found


def plan(folder: Path, **settings: Any) -> Plan:
    """Return the plan of a small run on a text in the folder."""
    text = folder / "text.txt"
    text.write_bytes(TEXT)
    small = {"d_model": 32, "n_layers": 2, "n_heads": 2, "seq_len": 16, "batch_size": 4, "eval_bytes": 400}
    often = {"steps": 8, "eval_every": 4, "checkpoint_every": 4, "watch_every": 3}
    return Plan(text=str(text)).change(**{**small, **often, **settings})


def run_on(devices: list[str], path: Path, chosen: Plan) -> dict[str, Any]:
    """Run four steps on the first device and, if there is another, four more there."""
    first = chosen.change(steps=8 // len(devices), warmup_steps=2, schedule="constant")
    with create_run(first, path, device=devices[0]) as run:
        result = run.train()
    notices: tuple[str, ...] = ()
    if len(devices) > 1:
        with open_run(path, steps=8, device=devices[1]) as run:
            notices = run.notices
            result = run.train()
    events = read_history(path / "record.jsonl")
    samples = [event["signals"] for event in events if event["kind"] == "sample"]
    signals = {name: values for sample in samples for name, values in sample.items()}
    final = torch.cat([each.detach().cpu().flatten() for each in run.model.parameters()])
    return {
        "losses": result.losses,
        "bits": result.bits_per_byte,
        "weights": final.tolist(),
        "signals": signals,
        "notices": notices,
        "device": json.loads((path / "config.json").read_text())["device"],
    }


def resumed(folder: Path) -> dict[str, Any]:
    """Run on each device, and half on each."""
    chosen = plan(folder)
    ways = {"cpu": ["cpu"], "gpu": [NAME], "cpu-gpu": ["cpu", NAME], "gpu-cpu": [NAME, "cpu"], "gpu-gpu": [NAME] * 2}
    return {name: run_on(devices, folder / name, chosen) for name, devices in ways.items()}


def diverged(folder: Path) -> dict[str, Any]:
    """Train with a learning rate at which the weights overflow, on both devices, with a checkpoint after every step."""
    found = {}
    for device in DEVICES:
        chosen = plan(folder, lr=1e30, warmup_steps=0, schedule="constant", checkpoint_every=1, eval_every=100)
        with create_run(chosen, folder / device, device=device) as run:
            result = run.train()
        saved = sorted(path.name for path in (folder / device / "checkpoints").glob("*"))
        found[device] = {"status": result.status, "steps": result.steps, "losses": result.losses, "saved": saved}
    return found


def late(folder: Path) -> dict[str, Any]:
    """Let a gradient become NaN in step 4 of a run with a checkpoint after step 8."""
    chosen = plan(folder, checkpoint_every=8, eval_every=8)
    with create_run(chosen, folder / "run", device=NAME) as run:
        head, passes = run.model.final_norm, []

        def spoil(gradient: torch.Tensor) -> torch.Tensor:
            passes.append(None)
            return gradient * float("nan") if len(passes) == 4 else gradient

        def look(module: Any, args: Any, output: torch.Tensor) -> None:
            if output.requires_grad:
                output.register_hook(spoil)

        head.register_forward_hook(look)
        result = run.train()
    saved = [path.name for path in (folder / "run" / "checkpoints").glob("*")]
    return {"status": result.status, "step": result.steps, "passes": len(passes), "saved": saved}


def generated(folder: Path) -> dict[str, Any]:
    """Generate greedily with a trained model on both devices; count what a forward pass with a cache waits for."""
    with create_run(plan(folder, steps=20), folder / "run", device="cpu") as run:
        run.train()
    found: dict[str, Any] = {}
    for device in DEVICES:
        model, tokenizer, _ = load_run(folder / "run")
        model = model.to(device)
        found[device] = "".join(stream_text(model, tokenizer, "In the", 30, temperature=0.0))
    prompts = [[1, 2, 3], [4]]
    for device in DEVICES:
        found[f"batch {device}"] = load_run(folder / "run")[0].to(device).generate(prompts, 20, temperature=0.0)
    tokens, cache = torch.zeros(1, 3, dtype=torch.long).to(NAME), model.new_cache(1)
    with torch.no_grad(), counting() as inside:
        model(tokens, cache=cache)
        model(tokens[:, :1], cache=cache)
        model(tokens)
    found["waits"] = sum(inside.waits.values())
    return found


def commanded(folder: Path) -> dict[str, Any]:
    """Train, resume and generate on the command line, which prefers the accelerator."""
    text, out = plan(folder).text, folder / "run"
    options = ["--text", text, *SMALL, "--precision", "float32"]
    found: dict[str, Any] = {}
    commands = {
        "train": ["train", *options, "--steps", 4, "--out", out],
        "resume": ["train", "--resume", out, "--steps", 6],
        "moved": ["train", "--resume", out, "--steps", 8, "--device", "cpu"],
        "generate": ["generate", out, "--temperature", 0, "--max-new-tokens", 5],
        "absent": ["train", *options, "--device", f"{NAME}:7", "--out", folder / "none"],
    }
    for name, arguments in commands.items():
        with redirect_stdout(StringIO()) as printed, redirect_stderr(StringIO()) as errors:
            try:
                main([str(each) for each in arguments])
            except SystemExit as end:
                found[name] = {"code": end.code or 0, "out": printed.getvalue(), "err": errors.getvalue()}
    return {**found, "written": (folder / "none").exists()}


if __name__ == "__main__":
    install()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    scenarios = {each.__name__: each for each in (trained, waits, resumed, diverged, late, generated, commanded)}
    print(json.dumps(scenarios[sys.argv[1]](Path(sys.argv[2]))))
