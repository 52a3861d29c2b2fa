"""Benchmarks of whole models in which every norm is replaced: Qwen3 from transformers, and the Thinker.

The variants of a model have the same initial weights and alternate, one step each per round. The norms' share of a step
is the number of norms times the time of a single norm (forward and backward, at the model's size), divided by the time
of a step.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import omninorm
from omninorm.bench import peers
from omninorm.bench.config import DTYPES
from omninorm.bench.peers import Unavailable
from omninorm.thinker import Thinker, ThinkerConfig
from omninorm.timing import OURS, Case, Contestant

QWEN_TRAINING, QWEN_PREFILL, THINKER_TRAINING = "Qwen3 training step", "Qwen3 prefill", "Thinker training step"
QWEN_WIDTH, QWEN_TOKENS = 1024, 512
THINKER_WIDTH, THINKER_TOKENS, THINKER_NORMS = 512, 2048, 17
_VOCABULARY = 4096
ROUNDS = 13
_LEARNING_RATE = 1e-5


def replace_norms(model: nn.Module, kind: type[nn.Module], make: Callable[[Any], nn.Module]) -> int:
    """Replace every norm of type `kind` by make(norm), and return their number."""
    found = [name for name, module in model.named_modules() if isinstance(module, kind)]
    for name in found:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, make(model.get_submodule(name)))
    return len(found)


def our_qwen3_norm(norm: Any) -> nn.Module:
    """Return our RMSNorm with Llama's rounding order, sharing the weight of a Qwen3RMSNorm."""
    ours = omninorm.RMSNorm(norm.weight.shape[0], norm.variance_epsilon, dtype=norm.weight.dtype, cast="llama")
    ours.weight = norm.weight
    return ours


def qwen3_training(dtype: torch.dtype) -> Case:
    """Compute forward pass, loss, backward pass and AdamW step on 512 tokens."""
    tokens = torch.randint(0, _VOCABULARY, (1, QWEN_TOKENS))

    def step_of(model: nn.Module) -> Callable[[int], None]:
        return _training_step(model, lambda: model(input_ids=tokens, labels=tokens).loss)

    stock, ours = _qwen3_pair(dtype)
    contestants = [Contestant(OURS, step_of(ours), "ours"), Contestant("transformers", step_of(stock), "peer")]
    return Case(QWEN_TRAINING, contestants, 1, grad=True)


def qwen3_prefill(dtype: torch.dtype) -> Case:
    """Process 512 tokens with a cache and return the logits of the last one, without a graph."""
    tokens = torch.randint(0, _VOCABULARY, (1, QWEN_TOKENS))

    def prefill_of(model: nn.Module) -> Callable[[int], None]:
        def prefill(_: int) -> None:
            model(input_ids=tokens, use_cache=True, logits_to_keep=1)

        return prefill

    stock, ours = (model.eval() for model in _qwen3_pair(dtype))
    contestants = [Contestant(OURS, prefill_of(ours), "ours"), Contestant("transformers", prefill_of(stock), "peer")]
    return Case(QWEN_PREFILL, contestants, 1, grad=False)


def thinker_training(dtype: torch.dtype) -> Case:
    """Compute a training step on 2,048 tokens, with our RMSNorm, torch.nn.RMSNorm and torch.nn.LayerNorm."""
    config = ThinkerConfig(d_model=THINKER_WIDTH, n_layers=8, n_heads=8)
    first = Thinker(config).to(dtype)
    # All variants are copies. The original was up to 5 % slower than a copy, because its memory layout differs.
    variants: dict[str, Any] = {name: copy.deepcopy(first) for name in (OURS, "torch.nn", "torch.nn.LayerNorm")}
    kind = omninorm.RMSNorm
    replace_norms(variants["torch.nn"], kind, lambda _: peers.torch_rms_norm(THINKER_WIDTH, dtype))
    replace_norms(variants["torch.nn.LayerNorm"], kind, lambda _: peers.torch_layer_norm(THINKER_WIDTH, dtype))
    tokens = torch.randint(0, config.vocab_size, (THINKER_TOKENS // config.max_seq_len, config.max_seq_len))
    roles = {OURS: "ours", "torch.nn": "peer", "torch.nn.LayerNorm": "other"}
    contestants = [Contestant(name, _thinker_step(model, tokens), roles[name]) for name, model in variants.items()]
    return Case(THINKER_TRAINING, contestants, 1, grad=True)


# The operations per step count a multiply-add as two, and the backward pass as two forward passes.
_QWEN_WEIGHTS = 6 * (2 * 1024 * 2048 + 2 * 1024 * 1024 + 3 * 1024 * 3072) + _VOCABULARY * QWEN_WIDTH
_THINKER_WEIGHTS = 8 * (4 * 512 * 512 + 3 * 512 * 1376) + 256 * 512
MODELS: dict[str, tuple[Callable[[torch.dtype], Case], tuple[str, ...], int, int, float]] = {
    # For each case: the function that builds it, dtypes, rows, width, and operations of one step.
    QWEN_TRAINING: (qwen3_training, ("bf16",), QWEN_TOKENS, QWEN_WIDTH, 6.0 * _QWEN_WEIGHTS * QWEN_TOKENS),
    QWEN_PREFILL: (qwen3_prefill, ("bf16",), QWEN_TOKENS, QWEN_WIDTH, 2.0 * _QWEN_WEIGHTS * QWEN_TOKENS),
    THINKER_TRAINING: (
        thinker_training,
        ("fp32", "bf16"),
        THINKER_TOKENS,
        THINKER_WIDTH,
        6.0 * _THINKER_WEIGHTS * THINKER_TOKENS,
    ),
}


def check_patience(case: str, dtype: str, patience: float) -> None:
    """Raise Unavailable if the model would take longer than `patience` seconds.

    Some CPUs multiply bf16 matrices a hundred times more slowly than fp32 matrices, so that one step takes minutes.
    """
    variants = 3 if case == THINKER_TRAINING else 2
    training = case != QWEN_PREFILL
    speed = matmul_speed(DTYPES[dtype], training)
    step = MODELS[case][4] / speed
    total = variants * (1 + ROUNDS) * step
    if total > patience:
        times = (
            f"a step takes about {step:.0f} s here (matrices at {speed / 1e9:.1f} GFLOP/s) and the case {total:.0f} s"
        )
        raise Unavailable(f"{times}; to run it, pass --patience {total * 1.5:.0f}")


def matmul_speed(dtype: torch.dtype, training: bool) -> float:
    """Return the operations per second of a linear layer, with its backward pass if `training`."""
    tokens, width = 256, 512
    x, weight = torch.randn(tokens, width).to(dtype), torch.randn(width, width).to(dtype)
    x.requires_grad_(training)
    weight.requires_grad_(training)
    elapsed = 0.0
    for _ in range(2):  # the first call is a warm-up
        start = time.perf_counter()
        y = F.linear(x, weight)
        if training:
            torch.autograd.grad(y, (x, weight), torch.ones_like(y))
        elapsed = time.perf_counter() - start
    return (6 if training else 2) * tokens * width * width / elapsed


def _qwen3_pair(dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """Return the stock model and a copy with our norms."""
    peers.need_transformers()
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    config = Qwen3Config(
        vocab_size=_VOCABULARY,
        hidden_size=QWEN_WIDTH,
        intermediate_size=3072,
        num_hidden_layers=6,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=QWEN_TOKENS,
    )
    first: nn.Module = nn.Module.to(Qwen3ForCausalLM(config), dtype)
    stock, ours = copy.deepcopy(first), copy.deepcopy(first)  # see thinker_training
    replace_norms(ours, Qwen3RMSNorm, our_qwen3_norm)
    return stock, ours


def _thinker_step(model: nn.Module, tokens: Tensor) -> Callable[[int], None]:
    targets = tokens.roll(-1, 1).flatten()
    return _training_step(model, lambda: F.cross_entropy(model(tokens).flatten(0, 1).float(), targets))


def _training_step(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[int], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, fused=True)

    def step(_: int) -> None:
        loss().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    return step
