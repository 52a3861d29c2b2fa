"""Rotates the residual stream and the values of attention heads by orthogonal matrices, with the same outputs.

RMSNorm without a gain commutes with a rotation Q, since ‖Q x‖ = ‖x‖. So if every parameter that writes to the stream
is multiplied by Q and every parameter that reads it by Qᵀ, the outputs stay the same, while outlier features are spread
over all others (QuaRot, Ashkboos et al. 2024, arXiv 2404.00456). Gains are folded into the readers first.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from omninorm.errors import ConfigError
from omninorm.surgery.fold import (
    MORE_INPUTS,
    Plans,
    fold,
    plan_folds,
    probe,
    undone_by_errors,
    untie_head,
)
from omninorm.surgery.gains import Gain, find_gains
from omninorm.surgery.orthogonal import KINDS, BlockRotation, rotation
from omninorm.surgery.proof import could_consume
from omninorm.surgery.report import Surgery
from omninorm.surgery.settle import Probed, settle
from omninorm.surgery.spaces import Slot, Space, slot_name
from omninorm.surgery.streamed_map import StreamedMap
from omninorm.surgery.walk import find_spaces

SPACES = ("residual", "head")
_NAMES = {"residual": "residual stream", "head": "values of heads"}
_MISSING = {
    "residual": "the model has no vectors to which several linear layers or embeddings write",
    "head": "the model has no attention whose values are computed and read by linear layers",
}
# Kinds of norms that treat all features of a vector alike, but for their gains.
_WHOLE = ("RMSNorm", "LayerNorm", "LayerNorm1P")


def rotate(
    model: nn.Module,
    inputs: Sequence[Any] | None = None,
    *,
    kind: str = "hadamard",
    which: Sequence[str] = SPACES,
    seed: int = 0,
) -> Surgery:
    """Rotate the residual stream, the values of attention heads, or both, in place, with the same outputs.

        stream x → Q x:  W → Q W, b → Q b for writers W x + b,  E → E Qᵀ for embeddings,  W → W Qᵀ for readers W x

    Norms of the stream must be RMSNorm; a gain that is not the same for all features is folded into the readers first
    (see `fold_gains`). Heads are rotated between their values and the output projection; with grouped queries, all
    query heads of a key-value head share its rotation. Products are computed in float64 and rounded to the weights'
    dtype once. Writers and readers are found by running a copy of the model. A space is refused unless everything that
    touches it commutes with a rotation and the outputs of the copy in float64 stay the same. In training mode, dropout
    within the stream would no longer act on the same features: rotate models for inference.

    Args:
        model: a model with RMSNorm before its sublayers; call `center` first for one with LayerNorm.
        inputs: probes as in `verify`; None means random tokens.
        kind: "hadamard" (with random signs) or "random" (uniform among orthogonal matrices).
        which: "residual", "head", or both.
        seed: of the signs or the matrices.

    Returns:
        A report: `changed` (norm → consumers, weight → what it was rotated with), `refused` (space → reason), `error`,
        `table()`, `undo()`. If nothing can be rotated, nothing is changed.

    Raises:
        ConfigError: an unknown kind, or something else in `which`.
        InputError: as in `fold_gains`.

    Example:
        >>> from omninorm import Thinker, ThinkerConfig
        >>> model = Thinker(ThinkerConfig(d_model=32, n_layers=2, n_heads=2))
        >>> rotate(model).error < 1e-12
        True
    """
    chosen = check_choices(kind, which)
    before = probe(model, inputs)
    done = Surgery(operation="rotated", device=before.device)
    with undone_by_errors(done):
        untie_head(model, done)
        rotate_all(before, model, done, kind, chosen, seed)
        done.finish()
    return done


def check_choices(kind: str, which: Sequence[str]) -> tuple[str, ...]:
    """Return which spaces are rotated.

    Raises:
        ConfigError: an unknown kind, or something else than a choice of spaces.
    """
    if kind not in KINDS:
        raise ConfigError(f"kind must be one of {', '.join(KINDS)}", f"{kind!r:.80}", "choose one of them")
    chosen = (which,) if isinstance(which, str) else tuple(which)
    if not chosen or any(each not in SPACES for each in chosen):
        raise ConfigError('which must hold "residual", "head", or both', f"{which!r:.80}", "correct it")
    return chosen


@dataclass(frozen=True)
class Turn:
    """The rotation of one space.

    Args:
        role: "residual" or "head".
        places: a parameter's dimension → the rotation of its indices.
        folds: norms whose gains must be folded first.
    """

    role: str
    places: Mapping[Slot, BlockRotation]
    folds: tuple[str, ...]

    def described(self, slot: Slot) -> str:
        """Describe what a dimension of a parameter is rotated with."""
        heads = self.places[slot].count
        what = "the residual stream" if self.role == "residual" else f"{heads} head{'s' if heads > 1 else ''}"
        return f"along dimension {slot[2]} with {what}"


def rotate_all(
    before: Probed, model: nn.Module | None, done: Surgery, kind: str, which: Sequence[str], seed: int = 0
) -> None:
    """Rotate a float64 copy, and the original model, if any."""
    made = before.model
    turns, plans = _plan(before, done.refused, kind, which, seed)

    def attempt(names: Sequence[str], trial: Surgery) -> float:
        for name in names:
            for norm in turns[name].folds:
                fold(made, norm, plans[norm], trial, made)
            _turn(made, turns[name], trial)
        return before.distance()

    accepted, rejected = settle(list(turns), attempt)
    for name, error in rejected.items():
        done.refused[name] = f"the outputs would change by {error:.1e}"
    for name, error in accepted.items():
        done.error = max(done.error, error)
        for norm in turns[name].folds:
            done.changed[norm] = str(plans[norm])
            if model is not None:
                fold(model, norm, plans[norm], done, made)
        for slot in turns[name].places:
            what, key = turns[name].described(slot), slot_name(slot)
            done.changed[key] = f"{done.changed[key]}, {what}" if key in done.changed else f"rotated {what}"
        if model is not None:
            _copy(made, model, turns[name], done)
    done.proof = before.proof
    if not done.changed:
        done.undo()


# Planning --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Model:
    """What is known of the copy before a rotation is planned."""

    before: Probed
    gains: Mapping[str, Gain]
    plans: Plans
    unfolded: Mapping[str, str]


def _plan(
    before: Probed, refused: dict[str, str], kind: str, which: Sequence[str], seed: int
) -> tuple[dict[str, Turn], Plans]:
    """Return the rotations that the flow of data allows, and the folds of gains; record why others are refused."""
    unfolded: dict[str, str] = {}
    plans = plan_folds(before, unfolded, new_biases=False)
    gains = find_gains(before.model, before.main)
    known = _Model(before, gains, plans, unfolded)
    found, turns = set(), {}
    whole = [name for name, gain in gains.items() if gain.kind in _WHOLE]
    for space in find_spaces(before.model, whole, before.runs).spaces:
        role = "head" if space.mixed else "residual"
        blocks = _blocks(space, role)
        if role not in which or not blocks:
            continue
        found.add(role)
        name = f"{_NAMES[role]} ({space.name})"
        intact = [block for block in blocks if not space.why_not(block)]
        turn = _plan_turn(known, space, role, blocks, intact, kind, seed)
        if isinstance(turn, Turn):
            turns[name] = turn
            if len(intact) < len(blocks):
                refused[name] = (
                    f"{len(blocks) - len(intact)} of {len(blocks)}: {space.why_not(itertools.chain(*blocks))}"
                )
        else:
            refused[name] = turn
    refused |= {_NAMES[role]: _MISSING[role] for role in which if role not in found}
    return turns, plans


def _blocks(space: Space, role: str) -> list[list[int]]:
    """Return the sets of features that are rotated: of heads, those that are averaged over tokens.

    A residual stream is what at least two matrices or tables write to, and others read.
    """
    if role == "head":
        return [each for each in space.blocks() if len(each) > 1 and any(row.issuperset(each) for row in space.mixed)]
    matrices = [slot for slot, ndim in space.writers.items() if ndim > 1]
    return space.blocks() if len(matrices) > 1 and len(space.slots) > len(space.writers) else []


def _plan_turn(
    known: _Model,
    space: Space,
    role: str,
    blocks: Sequence[Sequence[int]],
    intact: Sequence[Sequence[int]],
    kind: str,
    seed: int,
) -> Turn | str:
    """Return the rotation of the intact blocks of a space, or why it is refused."""
    made = known.before.model
    norms = [norm for norm, features in space.norms.items() if not features.isdisjoint(itertools.chain(*blocks))]
    for norm in norms:
        if known.gains[norm].kind != "RMSNorm":
            kind_of_norm = known.gains[norm].kind
            return f"{norm} is a {kind_of_norm}, which subtracts the mean: call center first, which may refuse it too"
    if not intact or (role == "residual" and len(intact) < len(blocks)):
        return space.why_not(itertools.chain(*blocks))
    for width in sorted({len(row) for row in space.slots.values()}):
        if beyond := could_consume(made, known.before.proof.unreached, width, writing=True):
            return f"no run reached {', '.join(beyond[:3])}, which could read or write it: {MORE_INPUTS}"
    folds = tuple(norm for norm in norms if not _is_even(made.get_submodule(norm), known.gains[norm]))
    for norm in folds:
        if norm not in known.plans:
            return f"the gain of {norm} differs between features and cannot be folded: {known.unfolded[norm]}"
    places = {slot: _places(row, intact) for slot, row in space.slots.items()}
    if scattered := [slot_name(slot) for slot, found in places.items() if found is None]:
        return f"{scattered[0]} takes its features in another order"
    try:
        rotations = {len(block): rotation(kind, len(block), seed) for block in intact}
    except ConfigError as error:
        return str(error)
    return Turn(role, {slot: BlockRotation(rotations, found) for slot, found in places.items() if found}, folds)


def _is_even(norm: nn.Module, gain: Gain) -> bool:
    """Return whether γ is the same for all features; β, if any, must be folded."""
    if gain.bias is not None and bool(norm.get_parameter(gain.bias).any()):
        return False
    weight = None if gain.gain is None else norm.get_parameter(gain.gain)
    return weight is None or bool((weight == weight[0]).all())


def _places(row: Sequence[int], blocks: Sequence[Sequence[int]]) -> dict[int, Tensor] | None:
    """Return where a parameter has each block, by width; None if its copies of a block are not next to each other."""
    where: dict[int, list[int]] = {}
    for index, feature in enumerate(row):
        where.setdefault(feature, []).append(index)
    found: dict[int, list[list[int]]] = {}
    for block in blocks:
        columns = [where.get(feature, []) for feature in block]
        copies = len(columns[0])
        if any(len(column) != copies for column in columns):
            return None
        for copy in range(copies):
            place = [column[copy] for column in columns]
            if copies > 1 and max(place) - min(place) >= len(place):
                return None
            found.setdefault(len(block), []).append(place)
    return {width: torch.tensor(places) for width, places in found.items()}


# Applying --------------------------------------------------------------------------------------------------------


def _turn(model: nn.Module, turn: Turn, done: Surgery) -> None:
    """Rotate the parameters of one space in a float64 copy."""
    turned: set[tuple[int, int]] = set()
    for (name, own, dim), rotated in turn.places.items():
        module = model.get_submodule(name)
        if isinstance(module, StreamedMap) and own == "weight":
            module.turn(dim, rotated, done)
            continue
        parameter = module.get_parameter(own)
        if (id(parameter), dim) in turned:  # tied
            continue
        turned.add((id(parameter), dim))
        done.keep(parameter)
        with torch.no_grad():
            parameter.copy_(rotated(parameter, dim))


def _copy(made: nn.Module, model: nn.Module, turn: Turn, done: Surgery) -> None:
    """Round the rotated parameters of the copy to the model's dtype."""
    for name, own, _ in turn.places:
        parameter = model.get_submodule(name).get_parameter(own)
        done.keep(parameter)
        done.rely_on(model, name, own)
        with torch.no_grad():
            parameter.copy_(made.get_submodule(name).get_parameter(own))
