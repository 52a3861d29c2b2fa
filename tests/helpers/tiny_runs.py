"""Small real trainings of models that are not Thinkers, with hooks for faults, for the tests of single rules."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from helpers.faulty_runs import corpus
from torch import Tensor, nn

from omninorm.experiments.corpus import windows
from omninorm.monitor import Alarm, Watch, watch

VOCAB, BATCH, SEQ = 256, 8, 32
Act = Callable[[nn.Module, list[torch.optim.Optimizer], int], None]
LossOf = Callable[[nn.Module, Tensor], Tensor]


class TinyBlock(nn.Module):
    """A pre-norm block in the style of nanoGPT."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.attn["qkv"](self.ln_1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(y[0], y[1], y[2], is_causal=True)
        x = x + self.attn["proj"](y.transpose(1, 2).flatten(2))
        branch: Tensor = self.mlp(self.ln_2(x))
        return x + branch


class TinyGPT(nn.Module):
    """A GPT over bytes, with weights of std 0.02."""

    def __init__(self, width: int = 64, blocks: int = 4) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCAB, width), nn.Embedding(SEQ, width)
        self.h = nn.ModuleList(TinyBlock(width) for _ in range(blocks))
        self.ln_f, self.head = nn.LayerNorm(width), nn.Linear(width, VOCAB, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
        for block in self.h:
            x = block(x)
        logits: Tensor = self.head(self.ln_f(x))
        return logits


def next_token_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the cross entropy of the next bytes; `model` may be one of transformers."""
    output = model(tokens[:, :-1])
    logits = output if isinstance(output, Tensor) else output.logits
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def train_tiny(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    lr: float = 2e-3,
    steps: int = 40,
    every: int = 5,
    before: Act | None = None,
    after: Act | None = None,
    batch: Callable[[int], Tensor] | None = None,
    loss_of: LossOf = next_token_loss,
    passes: int = 1,
    clip: float | None = 1.0,
    **options: Any,
) -> tuple[Watch, list[float]]:
    """Train under watch on the King James Bible; return the closed watch and the losses.

    Args:
        before: called before the forward pass of each step, with the model, the optimizers and the step.
        after: called after the optimizer's step.
        batch: returns the tokens of a step.
        passes: backward passes per step, whose gradients are summed without dividing.
        clip: the norm to which gradients are clipped; None for no clipping.
        options: further arguments of `watch`.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizers = [optimizer or torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.95))]
    losses = []
    with watch(model, optimizers, every=every, **options) as watched:
        for step in range(1, steps + 1):
            tokens = batch(step) if batch else windows(corpus(), 0, step, BATCH, SEQ)
            if before:
                before(model, optimizers, step)
            for _ in range(passes):
                loss = loss_of(model, tokens)
                loss.backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(trained, clip)
            for each in optimizers:
                each.step()
                each.zero_grad()
            if after:
                after(model, optimizers, step)
            watched.step(loss)
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                break
    return watched, losses


def named(alarms: Sequence[Alarm]) -> list[tuple[str, str, str | None]]:
    """Return severity, rule and layer of each alarm."""
    return [(alarm.severity, alarm.rule, alarm.layer) for alarm in alarms]


def of_rule(watched: Watch, rule: str) -> list[Alarm]:
    """Return the alarms of one rule."""
    return [alarm for alarm in watched.alarms if alarm.rule == rule]


def transformers_model(kind: str, width: int = 64, blocks: int = 4) -> nn.Module:
    """Return a small causal language model of transformers: "Llama", "Olmo2" or "Qwen3Next"."""
    import transformers

    size = {
        "vocab_size": VOCAB,
        "hidden_size": width,
        "num_hidden_layers": blocks,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 3 * width,
        "max_position_embeddings": 2 * SEQ,
        "pad_token_id": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if kind == "Qwen3Next":
        linear = {"linear_key_head_dim": width // 4, "linear_value_head_dim": width // 4}
        linear |= {"linear_num_key_heads": 4, "linear_num_value_heads": 4, "head_dim": width // 4}
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": width}
        size |= {**linear, **experts, "shared_expert_intermediate_size": width}
    config = getattr(transformers, f"{kind}Config")(**size)
    model: nn.Module = getattr(transformers, f"{kind}ForCausalLM")(config)
    return model
