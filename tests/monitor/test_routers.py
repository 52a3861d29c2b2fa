"""The load of experts in models of different libraries and styles, against counts of the choices themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.watched_models import VOCAB, WIDTH, Attention, adamw, some_tokens, token_loss
from torch import Tensor, nn

from omninorm.monitor import Watch, watch
from omninorm.monitor.history import Load
from omninorm.monitor.hooks.routers import load_of

EXPERTS = 4


class Mixture(nn.Module):
    """A mixture of experts whose router is a linear layer, or a module around one."""

    def __init__(self, choose: Callable[[Tensor], Tensor], wrapped: bool) -> None:
        super().__init__()
        gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.router = nn.Sequential(nn.Dropout(0.0), gate) if wrapped else gate
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(EXPERTS))
        self.choose, self.chosen = choose, list[Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        logits = self.router(x)
        if isinstance(logits, tuple):
            logits, chosen = logits
            if chosen.is_floating_point():
                chosen = self.choose(chosen)
        else:
            chosen = self.choose(logits)
        self.chosen.append(chosen.reshape(x.shape[0] * x.shape[1], -1))
        weights = logits.softmax(-1)
        y = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            used = (chosen == index).reshape(*x.shape[:2], -1).any(-1, keepdim=True)
            y = y + used * weights[..., index : index + 1] * expert(x)
        return y


class Block(nn.Module):
    def __init__(self, choose: Callable[[Tensor], Tensor], wrapped: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention, self.mixture = Attention(), Mixture(choose, wrapped)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mixture(self.norm2(x))


class MixtureDecoder(nn.Module):
    def __init__(self, choose: Callable[[Tensor], Tensor], wrapped: bool = False) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)
        self.blocks = nn.ModuleList(Block(choose, wrapped) for _ in range(2))

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x)
        return logits

    def shares(self, kept: Tensor | None = None) -> list[list[float]]:
        """Return the share of the tokens that chose each expert, for each block, from the choices themselves."""
        found = []
        for block in self.blocks:
            chosen = torch.cat(block.mixture.chosen)  # type: ignore[arg-type, union-attr]
            chosen = chosen if kept is None else chosen[kept.reshape(-1)]
            found.append([float((chosen == index).any(-1).double().mean()) for index in range(EXPERTS)])
        return found


def by_topk(logits: Tensor) -> Tensor:
    return torch.topk(logits, 2).indices


def by_method(logits: Tensor) -> Tensor:
    return logits.softmax(-1).topk(3, dim=-1)[1]


def by_argmax(logits: Tensor) -> Tensor:
    return logits.argmax(dim=-1)


def train(model: nn.Module, loss: Callable[[int], Tensor], steps: int = 1, every: int = 1) -> Watch:
    optimizer = adamw(model)
    with watch(model, optimizer, every=every) as watched:
        for step in range(1, steps + 1):
            value = loss(step)
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
            watched.step(value)
    return watched


def loads_of(watched: Watch) -> list[Load | None]:
    return list(watched.history.samples[-1].loads)


def assert_loads(found: list[Load | None], expected: list[list[float]], choices: int, tokens: int) -> None:
    assert len(found) == len(expected)
    for load, shares in zip(found, expected, strict=True):
        assert load is not None
        assert (load.tokens, load.choices) == (tokens, choices)
        assert load.shares == pytest.approx(shares, abs=1e-6)
        assert sum(load.shares) == pytest.approx(choices, abs=1e-6)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(("choose", "choices"), [(by_topk, 2), (by_method, 3), (by_argmax, 1)])
def test_choices_of_plain_code_are_counted(choose: Callable[[Tensor], Tensor], choices: int, wrapped: bool) -> None:
    torch.manual_seed(0)
    model = MixtureDecoder(choose, wrapped)
    watched = train(model, lambda step: token_loss(model, some_tokens(step, 4, 8)))
    router = "blocks.1.mixture.router"
    assert watched.history.facts.routers[1] == router
    assert_loads(loads_of(watched), model.shares(), choices, tokens=32)


def test_loads_are_in_the_record() -> None:
    torch.manual_seed(0)
    model = MixtureDecoder(by_topk)
    watched = train(model, lambda step: token_loss(model, some_tokens(step, 4, 8)))
    (sample,) = [event for event in watched.record if event["kind"] == "sample"]
    shares = [sorted(each) for each in model.shares()]
    assert sample["signals"]["expert_load"] == pytest.approx([sum(each[2:]) / 2 for each in shares], rel=1e-3)
    assert sample["signals"]["expert_least"] == pytest.approx([each[0] / (2 / EXPERTS) for each in shares], rel=1e-3)


class Probabilities(nn.Module):
    """Returns logits and the probabilities of all experts, from which the block chooses."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, WIDTH))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = x @ self.weight.T
        return logits, logits.softmax(-1)


def test_choices_from_a_routers_probabilities_replace_them() -> None:
    torch.manual_seed(0)
    model = MixtureDecoder(by_topk)
    for block in model.blocks:
        block.mixture.router = Probabilities()  # type: ignore[union-attr]
    watched = train(model, lambda step: token_loss(model, some_tokens(step, 4, 8)))
    assert_loads(loads_of(watched), model.shares(), 2, tokens=32)


def test_padding_is_not_counted() -> None:
    torch.manual_seed(0)
    model, mask = MixtureDecoder(by_topk), torch.arange(8) < torch.tensor([[2], [3], [8], [5]])
    watched = train(model, lambda step: token_loss(model, some_tokens(step, 4, 8), attention_mask=mask.long()))
    assert_loads(loads_of(watched), model.shares(mask), 2, tokens=18)
    assert model.shares(mask) != model.shares()


def test_micro_batches_add_up_and_evaluations_do_not() -> None:
    torch.manual_seed(0)
    model = MixtureDecoder(by_topk)

    def loss(step: int) -> Tensor:
        token_loss(model, some_tokens(step, 4, 8)).backward()
        second = token_loss(model, some_tokens(step + 50, 4, 8))
        expected.append(model.shares())
        with torch.no_grad():
            model(some_tokens(step + 100, 4, 8))
        return second

    expected: list[list[list[float]]] = []
    watched = train(model, loss)
    assert_loads(loads_of(watched), expected[-1], 2, tokens=64)


def test_only_sampled_steps_are_counted() -> None:
    torch.manual_seed(0)
    model = MixtureDecoder(by_topk)

    def loss(step: int) -> Tensor:
        for block in model.blocks:
            block.mixture.chosen.clear()  # type: ignore[operator, union-attr]
        return token_loss(model, some_tokens(step, 4, 8))

    watched = train(model, loss, steps=4, every=4)
    assert [sample.step for sample in watched.history.samples] == [1, 4]
    assert_loads(loads_of(watched), model.shares(), 2, tokens=32)


SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "head_dim": 8, "use_cache": False,
}  # fmt: skip
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
GROUPED: dict[str, Any] = {**LATENT, "num_key_value_heads": 4, "n_routed_experts": 8, "n_group": 2, "topk_group": 1}
MODELS: dict[str, tuple[str, dict[str, Any], int, int]] = {  # config class, options, experts, choices
    "Mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}, 4, 2),
    "Qwen3Moe": ("Qwen3MoeConfig", {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 16}, 8, 3),
    "DeepseekV3": (
        "DeepseekV3Config",
        {**GROUPED, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 0},
        8, 2,
    ),
    "GptOss": ("GptOssConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}, 4, 2),
    "Llama4": (
        "Llama4TextConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1, "intermediate_size_mlp": 48},
        4, 1,
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_transformers_routers_are_counted(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    kind, options, experts, choices = MODELS[name]
    config = getattr(transformers, kind)(**{**SIZES, **options}, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    seen: dict[int, list[list[float]]] = {}
    with watch(model, adamw(model), every=1) as watched:
        for index, layer in enumerate(model.model.layers):
            router = layer.get_submodule(watched.history.facts.routers[index].split(".", 3)[3])
            router.register_forward_hook(lambda module, args, output, at=index: seen.update({at: choices_of(output)}))
        tokens = some_tokens(1, 3, 12, vocab=64)
        loss = F.cross_entropy(model(input_ids=tokens[:, :-1]).logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        watched.step(loss)

    def choices_share(rows: Tensor) -> list[float]:
        return [float((rows == index).any(-1).double().mean()) for index in range(experts)]

    assert_loads(loads_of(watched), [choices_share(seen[0]), choices_share(seen[1])], choices, tokens=36)


def choices_of(output: Any) -> Tensor:
    """Return the chosen experts: indices, or Llama 4's scores that are not 0."""
    if output[-1].is_floating_point():
        scores: Tensor = output[0]
        return torch.where(scores != 0, torch.arange(scores.shape[-1]), -1)
    indices: Tensor = output[-1]
    return indices


def test_scores_of_all_experts_are_no_load() -> None:
    assert load_of([5.0, 5.0], 5.0, 0) is None
    assert load_of([0.0, 0.0], 0.0, 1) is None
    assert load_of([5.0, 0.0, 5.0], 5.0, 0) == Load((1.0, 0.0, 1.0), 5, 2)


def test_watching_removes_the_interception_of_choices() -> None:
    before = torch.topk, Tensor.topk, torch.argmax, Tensor.argmax
    model = MixtureDecoder(by_topk)
    with watch(model, adamw(model)):
        assert torch.topk is not before[0]
    assert (torch.topk, Tensor.topk, torch.argmax, Tensor.argmax) == before


@pytest.mark.filterwarnings("ignore")
def test_compiled_routers_are_counted() -> None:
    torch.manual_seed(0)
    model = MixtureDecoder(by_topk)
    for block in model.blocks:
        block.mixture.router = Router()  # type: ignore[union-attr]
    compiled = torch.compile(model, backend="eager")
    watched = train(compiled, lambda step: token_loss(compiled, some_tokens(step, 4, 8)))
    for load in loads_of(watched):
        assert load is not None
        assert (load.tokens, load.choices) == (32, 2)


class Router(nn.Module):
    """Returns logits and the chosen experts."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, WIDTH))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = x @ self.weight.T
        return logits, torch.topk(logits, 2).indices
