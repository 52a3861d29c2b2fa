"""Key facts about a run, as pairs of a label and a text."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from omninorm.report.story import RunStory, Watched
from omninorm.report.text import plural, short
from omninorm.report.verdict import describe_end

_PLACEMENTS = {
    "pre": "pre-norm (measured)",
    "post": "post-norm (measured)",
    "both": "before each branch and after each sum (measured)",
    "sandwich": "sandwich: before and after each branch (measured)",
    "reordered": "reordered: after each branch (measured)",
    "none": "no norms in the blocks",
}
_TRAINING = {
    "batch_size": "Batch size",
    "seq_len": "Sequence length",
    "weight_decay": "Weight decay",
    "grad_clip": "Gradient clipping",
    "precision": "Precision",
    "seed": "Seed",
    "git_commit": "Commit",
}
_UNKNOWN = "not recorded"


def facts(story: RunStory) -> list[tuple[str, str]]:
    """Return the facts of the page's section "The run"."""
    known = story.watched or Watched()
    optimizer = known.optimizer or _UNKNOWN
    rates = story.series["lr"].values if "lr" in story.series else []
    pairs = [
        ("Model", _model(known)),
        ("Placement", _placement(story)),
        ("Padding", f"left out of the statistics, recognized by: {story.padding}" if story.padding else ""),
        ("Norms", _norms(known)),
        ("Optimizer", f"{optimizer}, ε = {short(known.adam_eps)}" if known.adam_eps is not None else optimizer),
        ("Largest learning rate", short(max(rates)) if rates else _UNKNOWN),
        ("Steps", _steps(story)),
        ("Samples", samples(story)),
        ("Last loss", _loss(story)),
        ("Last evaluation", f"{short(story.evals.values[-1])} bits per byte" if story.evals.values else ""),
        ("Speed", f"{short(story.tokens_per_second)} tokens/s (median)" if story.tokens_per_second else ""),
        ("Ranks", _ranks(story, known)),
        ("Started", _moment(known.started or str(story.config.get("started") or _UNKNOWN))),
        ("Ended", describe_end(story)),
        ("Versions", _versions(story, known)),
        *_chosen(story),
        *settings(known.config),
    ]
    return [(label, text) for label, text in pairs if text]


def _placement(story: RunStory) -> str:
    unknown = f"unknown: {story.placement_reason}" if story.placement_reason else "unknown"
    return _PLACEMENTS.get(story.placement or "", unknown)


def _chosen(story: RunStory) -> list[tuple[str, str]]:
    """Return the settings of `omninorm train` that a reader looks for first; the page has all of them further down."""
    train = story.config.get("train")
    found = {**(train if isinstance(train, dict) else {}), "git_commit": story.config.get("git_commit")}
    pairs = [(label, found.get(name)) for name, label in _TRAINING.items()]
    return [(label, _shown(value)) for label, value in pairs if value is not None]


def samples(story: RunStory) -> str:
    """Return how many samples there are and how many of them the page shows."""
    if not story.samples:
        return "none"
    every = story.watched.every if story.watched else None
    rhythm = f"one every {every:,} steps" if every and every > 1 else "one every step" if every else ""
    shown = len(story.columns)
    if shown == story.samples:
        return f"{story.samples:,}{', ' if rhythm else ''}{rhythm}, all shown"
    stride = _typical_stride(story)
    taken = f" ({rhythm})" if rhythm else ""
    return f"every {_ordinal(stride)} of {story.samples:,} samples shown{taken}, plus those at alarms"


def settings(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Flatten config.json to [("train.lr", "0.003"), …], at most 200 of them."""
    found: list[tuple[str, str]] = []
    for name, value in config.items():
        if isinstance(value, dict) and prefix.count(".") < 3:
            found += settings(value, f"{prefix}{name}.")
        elif value is not None:
            found.append((f"{prefix}{name}", _shown(value)))
    return found[:200]


def _shown(value: Any) -> str:
    try:
        return str(value)
    except RecursionError:
        return "nested too deeply to show"


def loss_unit(story: RunStory) -> str:
    """Return the unit of the loss; "" where it is unknown, as in a custom training loop."""
    trained = story.evals.values or "train" in story.config
    return "nats per token" if trained else ""


def _loss(story: RunStory) -> str:
    if "loss" not in story.series or not story.series["loss"].values:
        return _UNKNOWN
    return f"{short(story.series['loss'].values[-1])} {loss_unit(story)}".strip()


def _typical_stride(story: RunStory) -> int:
    gaps = [after.step - before.step for before, after in zip(story.columns, story.columns[1:], strict=False)]
    every = (story.columns[-1].step - story.columns[0].step) / max(1, story.samples - 1)
    # The most frequent gap: samples at alarms make some gaps smaller.
    return max(1, round(Counter(gaps).most_common(1)[0][0] / every)) if gaps and every > 0 else 1


def _moment(text: str) -> str:
    """Format 2026-03-01T10:00:00+00:00 as 2026-03-01 10:00 UTC; leave any other text unchanged."""
    match = re.fullmatch(r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d)(?::\d\d(?:\.\d+)?)?(Z|\+00:00)?", text)
    return f"{match[1]} {match[2]}{' UTC' if match[3] else ''}" if match else text


def _ordinal(number: int) -> str:
    ending = "th" if 10 <= number % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number:,}{ending}"


def _model(known: Watched) -> str:
    if not known.model and not known.blocks:
        return _UNKNOWN
    size = f", {plural(known.parameters, 'parameter')}" if known.parameters is not None else ""
    blocks = f", {plural(len(known.blocks), 'block')}" if known.blocks else ", no blocks found"
    return f"{known.model or 'unnamed'}{size}{blocks}"


def _norms(known: Watched) -> str:
    if not known.norms:
        return "none found" if known.model else _UNKNOWN
    kinds = Counter((norm.kind or "norm", norm.eps) for norm in known.norms)
    parts = [f"{n} × {kind}" + (f" (ε = {short(eps)})" if eps is not None else "") for (kind, eps), n in kinds.items()]
    frozen = sum(norm.frozen for norm in known.norms)
    ours = sum(norm.ours for norm in known.norms)
    parts += [f"{frozen} frozen"] if frozen else []
    parts += [f"{ours} from omninorm"] if 0 < ours < len(known.norms) else ["all from omninorm"] if ours else []
    return ", ".join(parts[:8])


def _steps(story: RunStory) -> str:
    if not story.last_step:
        return "none"
    return plural(story.last_step, "step") + (
        f", recorded from step {story.first_step:,}" if story.first_step > 1 else ""
    )


def _ranks(story: RunStory, known: Watched) -> str:
    if known.world_size == 1:
        return ""
    raised = sorted({rank for alarm in story.alarms for rank in alarm.ranks})
    alarmed = f"; alarms on ranks {', '.join(map(str, raised))}" if raised else ""
    return f"{known.world_size}; curves and maps show rank 0{alarmed}"


def _versions(story: RunStory, known: Watched) -> str:
    text = known.versions or story.config.get("versions")
    chosen = text if isinstance(text, dict) else {}
    shown = {name: value for name, value in chosen.items() if known.versions or name in ("omninorm", "torch", "python")}
    return ", ".join(f"{name} {value}" for name, value in shown.items() if value) or _UNKNOWN
