"""Models in plain PyTorch: nanoGPT, a GPT with weightless norms, torch.nn's encoder, LoRA and a linear probe."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SPREAD = 0.64
"""The initial std of weights times √width: 0.02 at width 1,024, where it is customary, and 0.08 at width 64."""


class Attention(nn.Module):
    """Causal self-attention with one projection for queries, keys and values."""

    def __init__(self, width: int, heads: int, qk_norm: bool = False) -> None:
        super().__init__()
        self.heads, self.qk_norm = heads, qk_norm
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (z.unflatten(-1, (self.heads, -1)).transpose(1, 2) for z in self.c_attn(x).chunk(3, dim=-1))
        if self.qk_norm:
            q, k = (F.rms_norm(z, z.shape[-1:]) for z in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        output: Tensor = self.c_proj(y.transpose(1, 2).flatten(2))
        return output


class FeedForward(nn.Module):
    """Two linear layers around an activation."""

    def __init__(self, width: int, squared: bool = False) -> None:
        super().__init__()
        self.squared = squared
        self.c_fc, self.c_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.c_fc(x)
        hidden = F.relu(hidden).square() if self.squared else F.gelu(hidden)
        output: Tensor = self.c_proj(hidden)
        return output


class Block(nn.Module):
    """A pre-norm block with LayerNorm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp = Attention(width, heads), FeedForward(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class WeightlessBlock(nn.Module):
    """A pre-norm block whose norms are calls of F.rms_norm, without gains, as in modded-nanogpt."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(width, heads, qk_norm=True), FeedForward(width, squared=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(F.rms_norm(x, x.shape[-1:]))
        return x + self.mlp(F.rms_norm(x, x.shape[-1:]))


class GPT(nn.Module):
    """Token and position embeddings, blocks, a final norm, and a head that is tied or not."""

    def __init__(self, width: int, weightless: bool = False, depth: int = 4, heads: int = 4, length: int = 64) -> None:
        super().__init__()
        self.weightless = weightless
        self.wte, self.wpe = nn.Embedding(256, width), nn.Embedding(length, width)
        kind = WeightlessBlock if weightless else Block
        self.blocks = nn.ModuleList(kind(width, heads) for _ in range(depth))
        self.ln_f = nn.Identity() if weightless else nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, 256, bias=False)
        self.apply(functools.partial(initialize, std=SPREAD / math.sqrt(width)))
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=SPREAD / math.sqrt(2 * depth * width))
        if not weightless:
            self.lm_head.weight = self.wte.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        x = F.rms_norm(x, x.shape[-1:]) if self.weightless else self.ln_f(x)
        logits: Tensor = self.lm_head(x)
        return logits


def initialize(module: nn.Module, std: float) -> None:
    """Draw weights from a normal distribution, as GPT-2 does."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=std)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


class Encoder(nn.Module):
    """torch.nn.TransformerEncoder as a language model, pre-norm or post-norm."""

    def __init__(self, width: int, pre: bool, depth: int = 4, length: int = 64) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=pre)
        norm = nn.LayerNorm(width) if pre else None
        self.embedding, self.position = nn.Embedding(256, width), nn.Parameter(0.02 * torch.randn(length, width))
        self.encoder = nn.TransformerEncoder(layer, depth, norm=norm, enable_nested_tensor=False)
        for parameter in self.encoder.parameters():
            if parameter.ndim > 1:  # the layers are copies, so each needs other weights
                nn.init.xavier_uniform_(parameter)
        self.head = nn.Linear(width, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position[: tokens.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], dtype=x.dtype)
        logits: Tensor = self.head(self.encoder(x, mask=mask, is_causal=True))
        return logits


class LoRA(nn.Module):
    """A frozen linear layer plus a trainable product of two low-rank matrices; the second starts at 0."""

    def __init__(self, base: nn.Linear, rank: int = 4, scale: float = 2.0) -> None:
        super().__init__()
        self.base, self.scale = base.requires_grad_(False), scale
        self.lora_A = nn.Linear(base.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.base(x) + self.scale * self.lora_B(self.lora_A(x))
        return output


def add_lora(model: nn.Module, names: tuple[str, ...]) -> nn.Module:
    """Freeze the model and put LoRA around its linear layers of these names."""
    model.requires_grad_(False)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if name in names and isinstance(child, nn.Linear):
                setattr(module, name, LoRA(child))
    return model


class Probe(nn.Module):
    """A frozen backbone and a new linear head on its last hidden states."""

    def __init__(self, backbone: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.backbone, self.head = backbone.requires_grad_(False), nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.backbone(input_ids=tokens).last_hidden_state)
        return logits
