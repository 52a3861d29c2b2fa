"""Streaming of generated text."""

from __future__ import annotations

import codecs
from collections.abc import Collection, Iterator, Sequence

from omninorm.errors import InputError
from omninorm.experiments.settings import check_seed
from omninorm.experiments.tokenizer import Tokenizer
from omninorm.thinker import Thinker


def stream_text(
    model: Thinker,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop: Sequence[str] = (),
    stop_tokens: Collection[int] | None = None,
) -> Iterator[str]:
    """Continue a prompt; yield new text, without the prompt, as soon as it is final.

    Bytes are decoded as UTF-8 across tokens; invalid bytes become U+FFFD. A prompt longer than the model's context is
    cut to its last tokens. The text ends before the first stop text in `stop` or token in `stop_tokens`. By default,
    `stop_tokens` are the end-of-text tokens of a pretrained model's tokenizer; the tokenizers that omninorm trains have
    none. Special tokens are left out of the text.

    Raises:
        InputError: an empty prompt or stop text, or a sampling setting out of range. The call raises it, not the first
            iteration.
        ConfigError: a seed outside [0, 2⁶³).
    """
    if not prompt:
        raise InputError("The prompt must have at least one character", "''", "start with a line break")
    if seed is not None:
        check_seed(seed)
    if not all(stop):
        raise InputError("A stop text must have at least one character", "''", "leave it out")
    tokens = tokenizer.encode(prompt.encode("utf-8", errors="replace")).tolist()[-model.config.max_seq_len :]
    if stop_tokens is None:  # a file may name tokens that its model does not have, such as -1 for none
        ends: Collection[int] = getattr(tokenizer, "end_tokens", ())
        stop_tokens = [token for token in ends if 0 <= token < model.config.vocab_size]
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    steps = model.stream([tokens], max_new_tokens, stop_tokens=stop_tokens, **sampling)  # type: ignore[arg-type]
    hidden = {*stop_tokens, *getattr(tokenizer, "special_tokens", ())}
    pieces = (
        tokenizer.decode([token for token in step if token is not None and token not in hidden]) for step in steps
    )
    return _decode(_until(pieces, [text.encode() for text in stop]))


def _until(pieces: Iterator[bytes], stops: Sequence[bytes]) -> Iterator[bytes]:
    """Yield bytes until a stop text; bytes that may be the start of one are held back."""
    held = b""
    for piece in pieces:
        held += piece
        found = [position for stop in stops if (position := held.find(stop)) >= 0]
        if found:
            yield held[: min(found)]
            return
        sure = len(held) - max((_overlap(held, stop) for stop in stops), default=0)
        yield held[:sure]
        held = held[sure:]
    yield held


def _overlap(text: bytes, stop: bytes) -> int:
    """Return the length of the longest proper prefix of `stop` that `text` ends with."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)


def _decode(pieces: Iterator[bytes]) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for piece in pieces:
        if text := decoder.decode(piece):
            yield text
    if text := decoder.decode(b"", final=True):
        yield text
