"""The architectures that faults are injected into: model, task, places of its parts, and a learning rate that works.

Half of them are for calibration and half are held out while rules are written. Relatives are on both sides, such as
Llama and Qwen3, Gemma 2 and 3, BERT and ModernBERT, or ViT and ConvNeXt.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from faults import hugging_face, tasks
from faults.plain_models import GPT, Encoder, Probe, add_lora
from faults.tasks import IGNORED, Batch, Task
from torch import Tensor, nn

from omninorm import NormConfig, Thinker, ThinkerConfig

CALIBRATION, HELD_OUT = "calibration", "held-out"


@dataclass(frozen=True)
class Layout:
    """The names of a model's parts. Those of a block are relative to it; None if there is no such module.

    Args:
        blocks: the list of blocks.
        attention, feed_forward: the sublayers.
        norm: the first norm of the block.
        query: the projection of the queries, or of queries, keys and values together.
        hidden: the projection to the feed-forward's hidden units, if it has a bias and no gate.
        router: the router of a mixture of experts.
        embedding, head: the first and last layer of the model.
        residual: whether the block's output is its input plus its branches.
    """

    blocks: str
    attention: str | None
    feed_forward: str | None
    norm: str | None
    query: str | None
    embedding: str
    head: str | None
    hidden: str | None = None
    router: str | None = None
    residual: bool = True


def tokens_only(model: nn.Module, batch: Batch) -> Tensor:
    """Return the logits of a model that takes tokens."""
    logits: Tensor = model(batch.inputs)
    return logits


def with_mask(model: nn.Module, batch: Batch) -> Tensor:
    """Return the logits of a transformers language model."""
    logits: Tensor = model(input_ids=batch.inputs, attention_mask=batch.mask).logits
    return logits


def both_halves(model: nn.Module, batch: Batch) -> Tensor:
    """Return the logits of an encoder and decoder, which get half of the tokens each."""
    first, second = batch.inputs.chunk(2, dim=1)
    logits: Tensor = model(input_ids=first, decoder_input_ids=second).logits
    return logits


def from_images(model: nn.Module, batch: Batch) -> Tensor:
    """Return the logits of an image classifier."""
    logits: Tensor = model(pixel_values=batch.images).logits
    return logits


def from_pairs(model: nn.Module, batch: Batch) -> Tensor:
    """Return the similarity of every image and every caption of the batch."""
    logits: Tensor = model(input_ids=batch.inputs, pixel_values=batch.images).logits_per_image
    return logits


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean loss of the labelled positions."""
    return F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORED)


@dataclass(frozen=True)
class Architecture:
    """A model to train.

    Args:
        name: a short name.
        split: "calibration" or "held-out".
        build: the function that returns a model of a width, with weights drawn from the global generator.
        layout: the names of its parts.
        lr: a learning rate of AdamW at which it learns.
        task: its data.
        forward: the function that returns its logits.
        width, length, batch: its sizes.
        masks: whether it takes an attention mask, so that batches can be padded.
    """

    name: str
    split: str
    build: Callable[[int], nn.Module]
    layout: Layout
    lr: float = 3e-3
    task: Task = tasks.causal
    forward: Callable[[nn.Module, Batch], Tensor] = tokens_only
    width: int = 64
    length: int = 32
    batch: int = 4
    masks: bool = False

    @property
    def mixture(self) -> bool:
        """Return whether blocks have a router."""
        return self.layout.router is not None

    @property
    def next_token(self) -> bool:
        """Return whether the labels are the inputs, shifted by one position."""
        return self.task in (tasks.causal, tasks.shifted_alphabet)

    @property
    def on_images(self) -> bool:
        """Return whether the model takes images."""
        return self.task in (tasks.images, tasks.pairs)


def hugging(name: str, head: str = "ForCausalLM", **options: object) -> Callable[[int], nn.Module]:
    """Return the builder of a transformers model."""
    return lambda width: hugging_face.build(name, width, head, **options)


def mixture(name: str) -> Callable[[int], nn.Module]:
    """Return the builder of a mixture of experts."""
    return lambda width: hugging_face.mixture(name, width)


def thinker(placement: str) -> Callable[[int], nn.Module]:
    """Return the builder of a Thinker of one placement."""
    norm = NormConfig(norm_placement=placement)
    return lambda width: Thinker(ThinkerConfig(d_model=width, n_layers=4, n_heads=4, max_seq_len=64, norm=norm))


def gpt2(width: int) -> nn.Module:
    """Return GPT-2 without dropout."""
    return hugging_face.build("GPT2", width, "Model", scaled=True, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


def bert(width: int) -> nn.Module:
    """Return BERT without dropout."""
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return hugging_face.build("Bert", width, "ForMaskedLM", scaled=True, **dropout)


@functools.lru_cache(maxsize=4)
def _pretrained_weights(name: str, head: str, width: int, seed: int) -> dict[str, Tensor]:
    """Return weights after 60 steps of training on the Bible."""
    model = hugging_face.build(name, width, head)
    task = tasks.causal if head == "ForCausalLM" else tasks.masked
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(1, 61):
        batch = task(seed, step, 4, 32)
        cross_entropy(model(input_ids=batch.inputs).logits, batch.labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def pretrained(name: str, head: str, width: int) -> nn.Module:
    """Return a model that has been trained a little, the same one for the same state of the generator."""
    seed = int(torch.randint(2**31, ()))
    model = hugging_face.build(name, width, head)
    with torch.random.fork_rng():
        model.load_state_dict(_pretrained_weights(name, head, width, seed))
    return model


def lora(width: int) -> nn.Module:
    """Return a pretrained Llama with LoRA on all linear layers of its blocks."""
    return add_lora(
        pretrained("Llama", "ForCausalLM", width),
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    )


def linear_probe(width: int) -> nn.Module:
    """Return a pretrained, frozen BERT with a new head."""
    return Probe(pretrained("Bert", "ForMaskedLM", width).bert, width, 4)


_GPT = Layout("blocks", "attn", "mlp", "ln_1", "attn.c_attn", "wte", "lm_head", "mlp.c_fc")
_THINKER = Layout("blocks", "attention", "feed_forward", "around_attention.norm", "attention.q", "embedding", None)
_WEIGHTLESS = Layout("blocks", "attn", "mlp", None, "attn.c_attn", "wte", "lm_head")
_SANDWICH = Layout("blocks", "attention", "feed_forward", None, "attention.q", "embedding", None)
_TORCH = Layout("encoder.layers", "self_attn", None, "norm1", None, "embedding", "head", "linear1")
_TORCH_POST = Layout("encoder.layers", "self_attn", None, "norm1", None, "embedding", "head", "linear1", residual=False)
_LLAMA = Layout(
    "model.layers", "self_attn", "mlp", "input_layernorm", "self_attn.q_proj", "model.embed_tokens", "lm_head"
)
_MOE = Layout(
    "model.layers", "self_attn", "mlp", "input_layernorm", "self_attn.q_proj", "model.embed_tokens", "lm_head",
    router="mlp.gate",
)  # fmt: skip
_OLMO = Layout(
    "model.layers", "self_attn", "mlp", "post_attention_layernorm", "self_attn.q_proj", "model.embed_tokens", "lm_head"
)
_GPT2 = Layout("transformer.h", "attn", "mlp", "ln_1", "attn.c_attn", "transformer.wte", "lm_head", "mlp.c_fc")
_BERT = Layout(
    "bert.encoder.layer", "attention.self", None, "attention.output.LayerNorm", "attention.self.query",
    "bert.embeddings.word_embeddings", "cls.predictions.decoder", "intermediate.dense", residual=False,
)  # fmt: skip
_NEOX = Layout(
    "gpt_neox.layers", "attention", "mlp", "input_layernorm", "attention.query_key_value", "gpt_neox.embed_in",
    "lm_head", "mlp.dense_h_to_4h",
)  # fmt: skip
_MODERN_BERT = Layout(
    "model.layers", "attn", "mlp", "mlp_norm", "attn.Wqkv", "model.embeddings.tok_embeddings", "decoder"
)
_T5 = Layout(
    "decoder.block", "layer.0.SelfAttention", "layer.2.DenseReluDense", "layer.0.layer_norm", "layer.0.SelfAttention.q",
    "shared", "lm_head",
)  # fmt: skip
_MAMBA = Layout("backbone.layers", "mixer", None, "norm", None, "backbone.embeddings", "lm_head")
_QWEN_NEXT = Layout(
    "model.layers", None, "mlp", "input_layernorm", None, "model.embed_tokens", "lm_head", router="mlp.gate"
)
_DEEPSEEK = Layout(
    "model.layers", "self_attn", "mlp", "input_layernorm", "self_attn.q_b_proj", "model.embed_tokens", "lm_head",
    router="mlp.gate",
)  # fmt: skip
_VIT = Layout(
    "vit.layers", "attention", "mlp", "layernorm_before", "attention.q_proj", "vit.embeddings", "classifier", "mlp.fc1"
)
_CONVNEXT = Layout(
    "convnext.encoder.stages.1.layers", None, None, "layernorm", None, "convnext.embeddings", "classifier", "pwconv1"
)
_CLIP = Layout(
    "vision_model.encoder.layers", "self_attn", "mlp", "layer_norm1", "self_attn.q_proj", "vision_model.embeddings",
    "visual_projection", "mlp.fc1",
)  # fmt: skip
_PROBE = Layout(
    "backbone.encoder.layer", "attention.self", None, "attention.output.LayerNorm", "attention.self.query",
    "backbone.embeddings.word_embeddings", "head", "intermediate.dense", residual=False,
)  # fmt: skip


def _language(name: str, split: str, build: Callable[[int], nn.Module], layout: Layout, **sizes: Any) -> Architecture:
    return Architecture(name, split, build, layout, forward=with_mask, masks=True, **sizes)


_MASKED: dict[str, Any] = {"task": tasks.masked, "forward": with_mask, "batch": 8, "masks": True}
ARCHITECTURES: dict[str, Architecture] = {
    each.name: each
    for each in (
        Architecture("nanogpt", CALIBRATION, GPT, _GPT),
        Architecture("weightless-gpt", HELD_OUT, functools.partial(GPT, weightless=True), _WEIGHTLESS),
        Architecture("thinker", CALIBRATION, thinker("pre"), _THINKER),
        Architecture("thinker-sandwich", HELD_OUT, thinker("sandwich"), _SANDWICH),
        Architecture("encoder-post", CALIBRATION, functools.partial(Encoder, pre=False), _TORCH_POST, lr=2e-3),
        Architecture("encoder-pre", HELD_OUT, functools.partial(Encoder, pre=True), _TORCH),
        _language("llama", CALIBRATION, hugging("Llama"), _LLAMA),
        _language("qwen3", HELD_OUT, hugging("Qwen3"), _LLAMA),
        _language("gpt2", CALIBRATION, gpt2, _GPT2),
        _language("gpt-neox", HELD_OUT, hugging("GPTNeoX"), _NEOX),
        _language("gemma2", CALIBRATION, hugging("Gemma2", scaled=True), _LLAMA),
        _language("gemma3", HELD_OUT, hugging("Gemma3", scaled=True), _LLAMA),
        _language("olmo2", CALIBRATION, hugging("Olmo2"), _OLMO),
        _language("glm4", HELD_OUT, hugging("Glm4", scaled=True), _LLAMA),
        _language("mixtral", CALIBRATION, mixture("Mixtral"), _MOE),
        _language("qwen3-moe", HELD_OUT, mixture("Qwen3Moe"), _MOE),
        _language("deepseek-v3", CALIBRATION, hugging_face.deepseek_v3, _DEEPSEEK),
        _language("qwen3-next", HELD_OUT, hugging_face.qwen3_next, _QWEN_NEXT, length=16),
        _language("mamba", CALIBRATION, hugging_face.mamba, _MAMBA, length=16),
        Architecture("bert", CALIBRATION, bert, _BERT, 2e-3, **_MASKED),
        Architecture("modernbert", HELD_OUT, hugging_face.modern_bert, _MODERN_BERT, **_MASKED),
        Architecture("vit", CALIBRATION, hugging_face.vit, _VIT, 1e-3, tasks.images, from_images, batch=16),
        Architecture("convnext", HELD_OUT, hugging_face.conv_next, _CONVNEXT, 3e-3, tasks.images, from_images, batch=8),
        Architecture("clip", HELD_OUT, hugging_face.clip, _CLIP, 1e-3, tasks.pairs, from_pairs, length=8, batch=8),
        Architecture("t5", CALIBRATION, hugging_face.t5, _T5, 3e-3, tasks.continued, both_halves, batch=8),
        Architecture("lora", CALIBRATION, lora, _LLAMA, 1e-2, tasks.shifted_alphabet, with_mask),
        Architecture("linear-probe", HELD_OUT, linear_probe, _PROBE, 3e-3, tasks.next_kind),
        _language("llama-256", CALIBRATION, hugging("Llama"), _LLAMA, width=256, lr=1e-3),
        _language("gpt2-256", HELD_OUT, gpt2, _GPT2, width=256, lr=1e-3),
    )
}  # fmt: skip
