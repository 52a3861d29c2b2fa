"""Text generation, token by token, for batches of prompts of different lengths."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from omninorm.config import python_number
from omninorm.errors import InputError
from omninorm.thinker.cache import KVCache
from omninorm.thinker.sampling import Sampling, is_integer, sample

if TYPE_CHECKING:
    from omninorm.thinker.model import Thinker


def stream(
    model: Thinker,
    prompts: Tensor | Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_tokens: Collection[int] = (),
    seed: int | None = None,
) -> Iterator[list[int | None]]:
    """Yield a list per step with one new token for every prompt, or None after a prompt's stop token.

    With temperature 0 the continuation of a prompt does not depend on the other prompts (up to rounding of the logits).
    When the context of a row would exceed max_seq_len, it is cut to its last max_seq_len // 2 tokens, which are
    processed again.

    Args:
        model: the Thinker.
        prompts: one or more lists of 1 to max_seq_len tokens each, or a tensor (batch, sequence).
        max_new_tokens: maximum number of tokens to add to each prompt.
        temperature, top_k, top_p: see `Sampling`.
        stop_tokens: tokens that end a continuation; the stop token itself is also yielded.
        seed: random seed for sampling; None uses torch's global generator.

    Raises:
        InputError: no prompts, an empty or too long prompt, a token outside the vocabulary, or a setting out of range.
            The call raises it, not the first step.
    """
    sampling = Sampling(temperature, top_k, top_p)
    rows = _check_prompts(prompts, model.config.vocab_size, model.config.max_seq_len)
    max_new_tokens, seed = python_number(max_new_tokens), python_number(seed)
    if not is_integer(max_new_tokens) or max_new_tokens < 1:
        raise InputError("max_new_tokens must be an integer ≥ 1", repr(max_new_tokens), "use at least 1")
    if not isinstance(stop_tokens, Collection):
        raise InputError(
            "stop_tokens must be a list or set of tokens", repr(stop_tokens), "put a single token into a list"
        )
    stops = frozenset(_check_tokens("stop_tokens", list(stop_tokens), model.config.vocab_size))
    generator = None if seed is None else _generator(seed, model.embedding.weight.device)
    return _steps(model, rows, max_new_tokens, sampling, stops, generator)


@torch.no_grad()
def _steps(
    model: Thinker,
    rows: list[list[int]],
    remaining: int,
    sampling: Sampling,
    stops: frozenset[int],
    generator: torch.Generator | None,
) -> Iterator[list[int | None]]:
    count, alive = len(rows), list(range(len(rows)))
    logits, cache = _read(model, rows, remaining)
    while True:
        tokens = sample(logits, sampling, generator).tolist()
        step: list[int | None] = [None] * count
        for row, index, token in zip(rows, alive, tokens, strict=True):
            step[index] = token
            row.append(token)
        yield step
        remaining -= 1
        going = [position for position, token in enumerate(tokens) if token not in stops]
        if not going or not remaining:
            return
        if len(going) < len(rows):
            rows, alive = [rows[position] for position in going], [alive[position] for position in going]
            cache.select(going)
        logits, cache = _next(model, rows, cache, remaining)


def _next(model: Thinker, rows: list[list[int]], cache: KVCache, remaining: int) -> tuple[Tensor, KVCache]:
    """Return the logits (batch, vocab_size) after each row's last token, which is not in the cache yet."""
    limit = model.config.max_seq_len
    if any(len(row) > limit for row in rows):
        for row in rows:
            if len(row) > limit:
                del row[: len(row) - max(1, limit // 2)]
        return _read(model, rows, remaining)
    newest = torch.tensor([row[-1:] for row in rows], device=cache.keys.device)
    return model(newest, cache=cache)[:, -1], cache


def _read(model: Thinker, rows: list[list[int]], remaining: int) -> tuple[Tensor, KVCache]:
    """Process whole rows, padded on the left, with a new cache that also has room for the `remaining` tokens."""
    longest = max(len(row) for row in rows)
    padding = [longest - len(row) for row in rows]
    cache = model.new_cache(len(rows), min(longest + remaining, model.config.max_seq_len), padding=padding)
    padded = [[0] * missing + row for missing, row in zip(padding, rows, strict=True)]
    logits = model(torch.tensor(padded, device=cache.keys.device), cache=cache)
    return logits[:, -1], cache


def _generator(seed: int, device: torch.device) -> torch.Generator:
    if not is_integer(seed) or not 0 <= seed < 2**63:
        remedy = "leave it out for a different text each time"
        raise InputError("seed must be an integer from 0 to 2⁶³ − 1", repr(seed), remedy)
    return torch.Generator(device).manual_seed(seed)


def _check_prompts(prompts: Tensor | Sequence[Sequence[int]], vocab_size: int, max_seq_len: int) -> list[list[int]]:
    rows = prompts.tolist() if isinstance(prompts, Tensor) else prompts
    if not isinstance(rows, Sequence) or isinstance(rows, (str, bytes)) or not len(rows):
        received = "none" if isinstance(rows, Sequence) and not len(rows) else type(prompts).__name__
        remedy = "pass a list of prompts, each a list of tokens"
        raise InputError("prompts must be one or more lists of tokens", received, remedy)
    return [_check_prompt(number, row, vocab_size, max_seq_len) for number, row in enumerate(rows)]


def _check_prompt(number: int, prompt: object, vocab_size: int, max_seq_len: int) -> list[int]:
    row = prompt.tolist() if isinstance(prompt, Tensor) else prompt
    if not isinstance(row, Sequence) or isinstance(row, str):
        remedy = "put a single prompt into a list, and encode text with a tokenizer first"
        raise InputError(f"Prompt {number} must be a list of tokens", f"{row!r:.80}", remedy)
    if not 1 <= len(row) <= max_seq_len:
        remedy = "start with at least one token, such as a line break" if not len(row) else "keep its last tokens"
        invariant = f"Prompt {number} must have between 1 and max_seq_len={max_seq_len} tokens"
        raise InputError(invariant, str(len(row)), remedy)
    return _check_tokens(f"Prompt {number}", list(row), vocab_size)


def _check_tokens(what: str, tokens: list[int], vocab_size: int) -> list[int]:
    wrong = [token for token in tokens if not is_integer(token) or not 0 <= token < vocab_size]
    if wrong:
        remedy = "use the tokenizer that this Thinker was built for"
        raise InputError(f"{what} must hold integers from 0 to {vocab_size - 1}", f"{wrong[0]!r:.80}", remedy)
    return tokens
