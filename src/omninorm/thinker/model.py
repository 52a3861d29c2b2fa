"""Thinker: embedding, blocks around attention and feed-forward, final norm, head."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omninorm.errors import InputError
from omninorm.layers import build_norm
from omninorm.placement import Block, FinalNorm, enter, inner_norms
from omninorm.placement.ngpt import Scale, UnitEmbedding, unit
from omninorm.thinker.attention import build_attention
from omninorm.thinker.cache import KVCache
from omninorm.thinker.config import ThinkerConfig
from omninorm.thinker.feed_forward import build_feed_forward
from omninorm.thinker.init import init_weights
from omninorm.thinker.linear import build_linear
from omninorm.thinker.rotary import Rotary


class Thinker(nn.Module):
    """A decoder-only transformer: logits = head(final_norm(block_L(… block_1(embedding(tokens))))).

    Its weights are drawn from torch's global generator (`torch.manual_seed`), in the same order for every norm and
    placement.

    Args:
        config: the model's shape, norms and initialization.

    Example:
        >>> model = Thinker(ThinkerConfig(d_model=32, n_layers=2))
        >>> model(torch.tensor([[72, 101, 108]])).shape
        torch.Size([1, 3, 256])
    """

    def __init__(self, config: ThinkerConfig) -> None:
        super().__init__()
        self.config = config
        # The constructors draw weights that `init_weights` overwrites. The generator's state is restored after that, so
        # the final weights depend only on the seed.
        with torch.random.fork_rng(devices=[]):
            self.is_unit = "unit" in inner_norms(config.norm)
            self.embedding = (UnitEmbedding if self.is_unit else nn.Embedding)(config.vocab_size, config.d_model)
            self.embedding_norm = build_norm(config.norm, config.d_model) if config.norm.embedding_norm else None
            self.rotary = Rotary(config.head_width, config.max_seq_len, config.rope_theta)
            self.blocks = nn.ModuleList(self._block(number) for number in range(1, config.n_layers + 1))
            self.final_norm = FinalNorm(config.norm, config.d_model)
            self.head = None if config.tied_head else build_linear(config, config.d_model, config.vocab_size)
            self.logit_scale = Scale(config.vocab_size, 1.0, config.d_model**-0.5) if self.is_unit else None
        init_weights(self, config)

    def _block(self, number: int) -> Block:
        config = self.config
        attention, feed_forward = build_attention(config), build_feed_forward(config)
        return Block(config.norm, config.d_model, attention, feed_forward, block=number, blocks=config.n_layers)

    def forward(self, tokens: Tensor, *, cache: KVCache | None = None) -> Tensor:
        """Return the logits of the next token after every token.

        Args:
            tokens: int64 or int32, (batch, sequence). Pad rows of different lengths on the right and ignore the logits
                of padding; it does not affect the logits of earlier tokens. With a cache, pad on the left (see
                `KVCache`).
            cache: keys and values of the preceding tokens; those of these tokens are appended to it. For inference
                only.

        Returns:
            (batch, sequence, vocab_size) in the dtype of the weights, or in autocast's.

        Raises:
            InputError: tokens of another type or shape, more than max_seq_len of them, or tokens outside the vocabulary
                (checked only on the CPU, where it needs no synchronization); a cache that is full, has another batch
                size, or is used with gradients enabled.
        """
        self._check(tokens, cache)
        start, count = (0 if cache is None else cache.used), tokens.shape[1]
        rotation = self.rotary(start, start + count, None if cache is None else cache.padding)
        mask = None if cache is None else cache.mask(count)
        stream = enter(self.config.norm, self._embed(tokens))
        for index, block in enumerate(self.blocks):
            stream = block(stream, rotation, mask, None if cache is None else cache.layer(index))
        if cache is not None:
            cache.advance(count)
        return self._logits(self.final_norm(stream))

    def _embed(self, tokens: Tensor) -> Tensor:
        x: Tensor = self.embedding(tokens)
        return x if self.embedding_norm is None else self.embedding_norm(x)

    def untie_head(self) -> Callable[[], None]:
        """Give the head a separate copy of the embedding's weight; return a function that ties them again.

        Operations that change only one of the two need this, such as `omninorm.surgery.center`. If the head is not
        tied, nothing changes.
        """
        if self.head is not None:
            return lambda: None
        before, weight = self.config, self.embedding.weight
        with torch.device("meta"):
            self.head = build_linear(before, before.d_model, before.vocab_size)
        self.head.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
        self.config = replace(before, tied_head=False)

        def tie() -> None:
            self.head, self.config = None, before

        return tie

    def _logits(self, x: Tensor) -> Tensor:
        weight = self.embedding.weight
        if self.logit_scale is None:
            return F.linear(x, weight) if self.head is None else self.head(x)
        y = F.linear(x, unit(weight, self.config.norm.norm_eps)) if self.head is None else self.head(x)
        logits: Tensor = y * self.logit_scale().to(y.dtype)
        return logits

    def _check(self, tokens: Tensor, cache: KVCache | None) -> None:
        if not isinstance(tokens, Tensor):
            remedy = "encode text first, for example with torch.tensor([list(text.encode())])"
            raise InputError("tokens must be a torch.Tensor", type(tokens).__name__, remedy)
        if tokens.dtype not in (torch.int64, torch.int32):
            remedy = "convert them, for example with tokens.long()"
            raise InputError("tokens must be int64 or int32", str(tokens.dtype), remedy)
        if tokens.ndim != 2:
            remedy = "add the batch dimension with tokens.unsqueeze(0)" if tokens.ndim == 1 else "reshape them"
            raise InputError("tokens must have the shape (batch, sequence)", tuple(tokens.shape), remedy)
        if tokens.shape[1] > self.config.max_seq_len:
            remedy = "pass fewer tokens, or build the Thinker with a larger max_seq_len"
            invariant = f"This Thinker takes at most max_seq_len={self.config.max_seq_len} tokens at once"
            raise InputError(invariant, str(tokens.shape[1]), remedy)
        if not torch.compiler.is_compiling() and tokens.device.type == "cpu" and tokens.numel():
            self._check_range(tokens)
        if cache is not None:
            if torch.is_grad_enabled():
                invariant = "A cache works only with gradients disabled, because none flow into its keys and values"
                raise InputError(invariant, "", "wrap the call in torch.no_grad()")
            cache.check_room(tokens.shape[0], tokens.shape[1])

    def _check_range(self, tokens: Tensor) -> None:
        least, largest = (int(value) for value in torch.aminmax(tokens))
        if least < 0 or largest >= self.config.vocab_size:
            invariant = f"tokens must be between 0 and vocab_size − 1 = {self.config.vocab_size - 1}"
            received = f"values from {least} to {largest}"
            raise InputError(invariant, received, "use the tokenizer that this Thinker was built for")

    def new_cache(self, batch: int, capacity: int | None = None, *, padding: Sequence[int] | None = None) -> KVCache:
        """Return an empty `KVCache` with the device and dtype of this Thinker's weights."""
        weight = self.embedding.weight
        return KVCache(self.config, batch, capacity, padding=padding, device=weight.device, dtype=weight.dtype)

    def stream(
        self,
        prompts: Tensor | Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop_tokens: Collection[int] = (),
        seed: int | None = None,
    ) -> Iterator[list[int | None]]:
        """Yield a list of new tokens per step, one for every prompt; see `omninorm.thinker.generate.stream`."""
        from omninorm.thinker.generate import stream

        return stream(
            self,
            prompts,
            max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            stop_tokens=stop_tokens,
            seed=seed,
        )

    def generate(
        self,
        prompts: Tensor | Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop_tokens: Collection[int] = (),
        seed: int | None = None,
    ) -> list[list[int]]:
        """Return the continuation of every prompt, without the prompt; if a stop token ends it, it is the last token.

        `omninorm.thinker.generate.stream` documents the arguments, the errors and the treatment of long contexts.

        Example:
            >>> len(Thinker(ThinkerConfig(d_model=32, n_layers=2)).generate([[72, 105]], 5)[0])
            5
        """
        steps = self.stream(
            prompts,
            max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            stop_tokens=stop_tokens,
            seed=seed,
        )
        return [[token for token in row if token is not None] for row in zip(*steps, strict=True)]

    @classmethod
    def from_pretrained(cls, path: str | Path, *, dtype: torch.dtype = torch.float32) -> Thinker:
        """Load a Llama or Qwen3 model: a folder in Hugging Face's format, or a .gguf file.

        See `omninorm.thinker.pretrained.load` and `omninorm.thinker.gguf.load`.
        """
        from omninorm.thinker import gguf, pretrained

        if Path(path).suffix == ".gguf":
            return gguf.load(path, dtype=dtype)
        return pretrained.load(path, dtype=dtype)
