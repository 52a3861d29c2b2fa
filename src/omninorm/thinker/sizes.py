"""Compares the sizes in a file's metadata with its tensors, before anything of these sizes is allocated."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from math import prod
from pathlib import Path

from omninorm.errors import ConfigError, RunError
from omninorm.thinker.config import ThinkerConfig

_REMEDY = "check that the settings belong to the weights and that every file is whole"


def matrix_shapes(config: ThinkerConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every matrix of a Thinker, by name. They do not depend on the norm and its placement."""
    block, shapes = _block_shapes(config), _outer_shapes(config)
    for number in range(config.n_layers):
        shapes |= {f"blocks.{number}.{name}.weight": shape for name, shape in block.items()}
    return shapes


def count_weights(config: ThinkerConfig) -> int:
    """Return the number of elements in all matrices of a Thinker, without building it."""
    block = sum(map(prod, _block_shapes(config).values()))
    return config.n_layers * block + sum(map(prod, _outer_shapes(config).values()))


def _block_shapes(config: ThinkerConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a block's matrices."""
    width, hidden = config.d_model, config.hidden_width
    queries, keys = config.n_heads * config.head_width, config.kv_heads * config.head_width
    block: dict[str, tuple[int, ...]] = {
        "attention.q": (queries, width),
        "attention.k": (keys, width),
        "attention.v": (keys, width),
        "attention.out": (width, queries),
        "feed_forward.up": (hidden, width),
        "feed_forward.down": (width, hidden),
    }
    if config.feed_forward == "swiglu":
        block["feed_forward.gate"] = (hidden, width)
    return block


def _outer_shapes(config: ThinkerConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the matrices outside the blocks."""
    names = ("embedding",) if config.tied_head else ("embedding", "head")
    return {f"{name}.weight": (config.vocab_size, config.d_model) for name in names}


def parameter_shapes(config: ThinkerConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter of a Thinker with pre-norm and RMSNorm, by name."""
    width, head = config.d_model, config.head_width
    block: dict[str, tuple[int, ...]] = {"around_attention.norm": (width,), "around_feed_forward.norm": (width,)}
    if config.norm.qk_norm:
        block |= {"attention.q_norm": (head,), "attention.k_norm": (head,)}
    shapes = matrix_shapes(config)
    for number in range(config.n_layers):
        shapes |= {f"blocks.{number}.{name}.weight": shape for name, shape in block.items()}
    return {**shapes, "final_norm.norm.weight": (width,)}


def check_sizes(
    path: Path,
    config: ThinkerConfig,
    found: Mapping[str, tuple[int, ...]],
    rename: Callable[[str], str],
    layers: int,
    ignored: Collection[str] = (),
    source: str = "the metadata",
) -> dict[str, str]:
    """Return a dictionary from Thinker's parameter names to the file's tensor names.

    Args:
        path: the file or folder, for messages.
        config: the config that its metadata describes.
        found: the shapes of its tensors, by name.
        rename: returns the file's name for one of Thinker's names.
        layers: the number of layers according to the tensors' names.
        ignored: names of tensors that are allowed although the model has no such parameters.
        source: the part of the file that holds the config, for messages.

    Raises:
        RunError: a tensor is missing, unexpected or of another shape, or the numbers of layers differ.
    """
    if config.n_layers != layers:  # first, because the shapes of a huge number of layers would fill the memory
        said = f"{config.n_layers} layer{'' if config.n_layers == 1 else 's'}"
        raise RunError(f"In {path}, {source} says {said}, but the weights have {layers}", "", _REMEDY)
    shapes = parameter_shapes(config)
    names = {ours: rename(ours) for ours in shapes}
    if missing := sorted(set(names.values()) - found.keys()):
        raise RunError(f"{path} lacks tensors of its model: {_some(missing)}", "", _REMEDY)
    if extra := sorted(found.keys() - set(names.values()) - set(ignored)):
        raise RunError(f"{path} has tensors that do not belong to its model: {_some(extra)}", "", _REMEDY)
    for ours, shape in shapes.items():
        if found[names[ours]] != shape:
            invariant = f"{names[ours]} in {path} must have the shape {shape}"
            raise RunError(invariant, f"the shape {found[names[ours]]}", _REMEDY)
    return names


def in_terms_of(keys: Mapping[str, str], path: Path, error: ConfigError) -> ConfigError:
    """Return an error about a config that was read from a file, worded with the keys of that file.

    Args:
        keys: the file's keys by the names of ThinkerConfig and NormConfig.
        path: the file.
        error: the error that the config raised.
    """
    pattern = re.compile(rf"\b({'|'.join(keys)})\b")
    parts = (error.invariant, f"{error.received!s:.200}", error.remedy)
    invariant, received, remedy = (pattern.sub(lambda found: keys[found[0]], part) for part in parts)
    return ConfigError(f"{path}: {invariant}", received, remedy)


def count_layers(names: Collection[str], prefix: str) -> int:
    """Return the number of different integers that follow `prefix`, such as `model.layers.`, in the names."""
    rests = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    return len({rest.partition(".")[0] for rest in rests})


def _some(names: list[str]) -> str:
    shown = ", ".join(f"{name:.100}" for name in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")
