"""Continuing prompts token by token, in batches of any lengths."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

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
    """Yields, step by step, one new token for every prompt; None for a prompt that has come to its stop token.

    A prompt's continuation under temperature 0 does not depend on the prompts beside it (up to rounding of the logits).
    A row whose context would pass max_seq_len is cut to its newest max_seq_len // 2 tokens and read again, so
    generation goes on, and the model never sees more than max_seq_len tokens nor fewer than half of them.

    Args:
        model: the Thinker.
        prompts: one or several, each of 1 to max_seq_len tokens, of any lengths; or a tensor (batch, sequence).
        max_new_tokens: how many tokens to add to each prompt at most.
        temperature, top_k, top_p: see `Sampling`.
        stop_tokens: tokens that end a continuation; the one that does is yielded.
        seed: for the draws, so that they repeat; None draws from torch's global generator.

    Raises:
        InputError: at the call, not at the first step: no prompt, an empty or too long one, a token outside the
            vocabulary, or a setting out of its range.
    """
    sampling = Sampling(temperature, top_k, top_p)
    rows = _check_prompts(prompts, model.config.vocab_size, model.config.max_seq_len)
    if not is_integer(max_new_tokens) or max_new_tokens < 1:
        raise InputError("max_new_tokens must be an integer ≥ 1", repr(max_new_tokens), "ask for at least one token")
    if not isinstance(stop_tokens, Collection):
        raise InputError("stop_tokens are a list or a set of tokens", repr(stop_tokens), "put a single one into a list")
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
    """Logits (batch, vocab_size) after each row's last token, which the cache does not hold yet."""
    limit = model.config.max_seq_len
    if any(len(row) > limit for row in rows):
        for row in rows:
            if len(row) > limit:
                del row[: len(row) - max(1, limit // 2)]
        return _read(model, rows, remaining)
    newest = torch.tensor([row[-1:] for row in rows], device=cache.keys.device)
    return model(newest, cache=cache)[:, -1], cache


def _read(model: Thinker, rows: list[list[int]], remaining: int) -> tuple[Tensor, KVCache]:
    """Reads whole rows, padded at the left, into a new cache with room for what will follow."""
    longest = max(len(row) for row in rows)
    padding = [longest - len(row) for row in rows]
    cache = model.new_cache(len(rows), min(longest + remaining, model.config.max_seq_len), padding=padding)
    padded = [[0] * missing + row for missing, row in zip(padding, rows, strict=True)]
    logits = model(torch.tensor(padded, device=cache.keys.device), cache=cache)
    return logits[:, -1], cache


def _generator(seed: int, device: torch.device) -> torch.Generator:
    if not is_integer(seed) or not 0 <= seed < 2**63:
        remedy = "leave it out for another text each time"
        raise InputError("seed must be an integer from 0 to 2⁶³ − 1", repr(seed), remedy)
    return torch.Generator(device).manual_seed(seed)


def _check_prompts(prompts: Tensor | Sequence[Sequence[int]], vocab_size: int, max_seq_len: int) -> list[list[int]]:
    rows = prompts.tolist() if isinstance(prompts, Tensor) else prompts
    if not isinstance(rows, Sequence) or isinstance(rows, (str, bytes)) or not len(rows):
        received = "no prompt" if isinstance(rows, Sequence) and not len(rows) else repr(type(prompts).__name__)
        remedy = "pass a list of prompts, each a list of tokens"
        raise InputError("prompts are one or several lists of tokens", received, remedy)
    return [_check_prompt(number, row, vocab_size, max_seq_len) for number, row in enumerate(rows)]


def _check_prompt(number: int, prompt: object, vocab_size: int, max_seq_len: int) -> list[int]:
    row = prompt.tolist() if isinstance(prompt, Tensor) else prompt
    if not isinstance(row, Sequence) or isinstance(row, str):
        remedy = "put a single prompt into a list and text through the tokenizer"
        raise InputError(f"prompt {number} must be a list of tokens", repr(row), remedy)
    if not 1 <= len(row) <= max_seq_len:
        remedy = "begin with at least one token, e.g. a line break" if not len(row) else "keep its newest tokens"
        invariant = f"prompt {number} must have between 1 and max_seq_len={max_seq_len} tokens"
        raise InputError(invariant, str(len(row)), remedy)
    return _check_tokens(f"prompt {number}", list(row), vocab_size)


def _check_tokens(what: str, tokens: list[int], vocab_size: int) -> list[int]:
    wrong = [token for token in tokens if not is_integer(token) or not 0 <= token < vocab_size]
    if wrong:
        remedy = "use the tokenizer that this Thinker was built for"
        raise InputError(f"{what} must hold integers from 0 to {vocab_size - 1}", repr(wrong[0]), remedy)
    return tokens
