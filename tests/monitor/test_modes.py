"""Modes of training: monitoring changes no bit, leaves nothing behind, and counts every step once."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.watched_models import (
    WIDTH,
    Decoder,
    adamw,
    close_to,
    perturbed,
    signal,
    some_tokens,
    token_loss,
    tokens_of,
    train,
    train_watched,
)
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from omninorm import NormConfig, Thinker, ThinkerConfig
from omninorm.kernels import probe
from omninorm.layers import LayerNorm, RMSNorm
from omninorm.monitor import watch
from omninorm.monitor.stats_buffer import StatsBuffer

# Not a bit is changed -------------------------------------------------------------------------------------------------


def thinker(kind: str, placement: str) -> Thinker:
    norm = NormConfig(normalization=kind, norm_placement=placement)
    return Thinker(
        ThinkerConfig(vocab_size=23, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=16, norm=norm)
    )


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    return Logits(LlamaForCausalLM(LlamaConfig(vocab_size=23, num_hidden_layers=2, attention_dropout=0.1, **shape)))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=23, n_embd=16, n_layer=2, n_head=4, n_positions=16, bos_token_id=0, eos_token_id=0)
    return Logits(GPT2LMHeadModel(config))


class Logits(nn.Module):
    """transformers' models return more than logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(tokens).logits
        return logits


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(23, 16)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32), 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 23)

    def forward(self, tokens: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        x = self.encoder(self.embedding(tokens).transpose(0, 1), mask=mask, is_causal=True)
        logits: Tensor = self.head(x).transpose(0, 1)
        return logits


MODELS: dict[str, Callable[[], nn.Module]] = {
    f"Thinker, {kind}, {placement}": lambda kind=kind, placement=placement: thinker(kind, placement)
    for kind, placement in [
        ("rmsnorm", "pre"),
        ("layernorm", "post"),
        ("crmsnorm", "sandwich"),
        ("scalenorm", "hybrid"),
        ("dyt", "reordered"),
        ("derf", "normformer"),
        ("rmsnorm", "residual"),
        ("none", "none"),
    ]
} | {
    "decoder with dropout": lambda: Decoder(dropout=0.2),
    "decoder with our norms": lambda: Decoder(lambda: LayerNorm(WIDTH), dropout=0.2),
    "Llama": llama,
    "GPT-2": gpt2,
    "nn.TransformerEncoder": Encoder,
}


@pytest.mark.parametrize("name", MODELS)
def test_training_is_bit_identical_with_a_watch(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    model.train()
    twin = copy.deepcopy(model)
    torch.manual_seed(1)
    train(model, adamw(model, fused=True), 4)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    watched = train_watched(twin, adamw(twin, fused=True), 4)
    assert len(watched.history.samples) == 4
    assert torch.equal(torch.get_rng_state(), state)
    pairs = list(zip(model.parameters(), twin.parameters(), strict=True))
    assert len(pairs) > 5
    assert all(torch.equal(a, b) for a, b in pairs)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))


def test_global_state_is_unchanged_by_a_watch() -> None:
    model = Decoder(dropout=0.1)
    torch.manual_seed(4)
    state = torch.get_rng_state()
    watched = watch(model, adamw(model), every=1, rules=[]).open()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()
    assert torch.get_default_dtype() == torch.float32
    watched.step()
    watched.flush()
    watched.close()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()
    with torch.no_grad():
        watched = watch(Decoder(), every=1, rules=[]).open()
        assert not torch.is_grad_enabled()
        watched.close()


# Nothing is left behind -----------------------------------------------------------------------------------------------


HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


def hooks_on(model: nn.Module, *optimizers: torch.optim.Optimizer) -> int:
    on_modules = sum(len(getattr(module, name)) for module in model.modules() for name in HOOKS)
    on_parameters = sum(len(p._backward_hooks or ()) for p in model.parameters())
    after = sum(len(getattr(p, "_post_accumulate_grad_hooks", None) or ()) for p in model.parameters())
    names = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
    return on_modules + on_parameters + after + sum(len(getattr(o, name)) for o in optimizers for name in names)


def stack_of_modes() -> int:
    return int(torch._C._len_torch_function_stack())


class PlannedError(Exception):
    """What the user's code raises."""


class Raises(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        raise PlannedError


def raise_in(place: str, model: Decoder) -> None:
    if place == "attention":
        hook = lambda *args: (_ for _ in ()).throw(PlannedError)  # noqa: E731
        model.blocks[1].attention.q.register_forward_hook(hook)
    elif place == "norm":
        norm = model.blocks[1].norm2
        norm.forward = lambda x: (_ for _ in ()).throw(PlannedError)  # type: ignore[method-assign]
    elif place == "backward":
        model.blocks[1].attention.register_forward_hook(lambda module, args, y: Raises.apply(y))


@pytest.mark.usefixtures("few_objects")
@pytest.mark.parametrize("norm", [None, lambda: RMSNorm(WIDTH)], ids=["torch's norms", "our norms"])
@pytest.mark.parametrize("place", ["nowhere", "loop", "attention", "norm", "backward"])
def test_closed_watch_leaves_no_hooks_or_references(place: str, norm: Callable[[], nn.Module] | None) -> None:
    model = Decoder(norm)
    optimizer = adamw(model)
    raise_in(place, model)
    user = model.blocks[0].register_forward_hook(lambda *args: None)
    before, modes = hooks_on(model, optimizer), stack_of_modes()
    alive: list[weakref.ref[Tensor]] = []
    note = [
        module.register_forward_hook(lambda module, args, y: alive.append(weakref.ref(y))) for module in model.modules()
    ]

    def loop() -> None:
        with watch(model, optimizer, every=1, rules=[]) as watched:
            assert hooks_on(model, optimizer) > before + len(note)
            for step in (1, 2):
                loss = token_loss(model, some_tokens(step))
                loss.backward()
                if place == "loop":
                    raise PlannedError
                optimizer.step()
                watched.step(loss)

    if place == "nowhere":
        loop()
    else:
        with pytest.raises(PlannedError):
            loop()
    for handle in note:
        handle.remove()
    assert hooks_on(model, optimizer) == before
    assert stack_of_modes() == modes
    assert probe.current is None
    gc.collect()
    assert len(alive) > 10
    assert not any(ref() is not None for ref in alive)
    user.remove()


@pytest.fixture
def few_objects() -> Iterator[None]:
    """The garbage collector leaves alone what was there before, which is much."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def activations() -> list[Tensor]:
    """What Python holds of tensors of three dimensions or more; autograd's own are not among them."""
    gc.collect()
    return [item for item in gc.get_objects() if type(item) is Tensor and item.ndim >= 3]


@pytest.mark.usefixtures("few_objects")
@pytest.mark.parametrize("how", ["plain", "reentrant", "non-reentrant"])
@pytest.mark.parametrize("place", ["nowhere", "attention", "norm", "backward"])
def test_activations_are_not_kept_alive(place: str, how: str) -> None:
    """Also if the user catches an exception and continues."""
    model = Decoder(lambda: LayerNorm(WIDTH))
    checkpointed(model, how)
    raise_in(place, model)
    with watch(model, adamw(model), every=1, rules=[]) as watched:
        for step in (1, 2):
            if place == "nowhere":
                token_loss(model, some_tokens(step)).backward()
            else:
                with pytest.raises(PlannedError):
                    token_loss(model, some_tokens(step)).backward()
            watched.step()
            model.zero_grad()
            assert not activations(), [tuple(item.shape) for item in activations()]


@pytest.mark.usefixtures("few_objects")
@pytest.mark.parametrize("norm", [None, lambda: LayerNorm(WIDTH)], ids=["torch's norms", "our norms"])
def test_activation_checkpointing_still_saves_memory(norm: Callable[[], nn.Module] | None) -> None:
    """Between forward and backward nothing of the inside of a block is alive, as if nobody watched."""
    held = []
    for watches in (False, True):
        model = Decoder(norm)
        checkpointed(model, "non-reentrant")
        watched = watch(model, adamw(model), every=1, rules=[])
        if watches:
            watched.open()
        loss = token_loss(model, some_tokens(1))
        held.append(len(activations()))
        loss.backward()
        watched.close()
    assert held[1] <= held[0] + 1  # an alias of what autograd keeps of the final norm, which is not checkpointed


def test_torch_function_modes_can_exit_in_any_order() -> None:
    class Mode(TorchFunctionMode):
        seen = 0

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            Mode.seen += 1
            return func(*args, **(kwargs or {}))

    model = Decoder()
    with watch(model, every=1, rules=[]) as watched:
        for step in (1, 2, 3):
            with Mode(), torch.device("cpu"):
                loss = token_loss(model, some_tokens(step))
                loss.backward()
                watched.step(loss)
            seen = Mode.seen
            torch.ones(2) + 1
            assert Mode.seen == seen, "the user's mode is still active"
        raise_in("attention", model)
        with pytest.raises(PlannedError), Mode():
            tokens_of(model, 4)
        seen = Mode.seen
        torch.ones(2) + 1
        assert Mode.seen == seen, "the user's mode is still active after an exception"
    assert stack_of_modes() == 0
    assert all("attention_logit" in sample.signals for sample in watched.history.samples)


def test_two_models_are_watched_alternately() -> None:
    """As in a GAN: each sees its own attention, once."""
    alone = [signal(train_watched(perturbed(seeded_decoder(seed)), None, 2), "attention_logit") for seed in (1, 2)]
    models = [perturbed(seeded_decoder(seed)) for seed in (1, 2)]
    with watch(models[0], every=1, rules=[]) as first, watch(models[1], every=1, rules=[]) as second:
        for step in (1, 2):
            losses = [tokens_of(model, step) for model in models]
            sum(losses).backward()  # type: ignore[union-attr]
            first.step(losses[0])
            second.step(losses[1])
    assert [signal(first, "attention_logit"), signal(second, "attention_logit")] == alone


def seeded_decoder(seed: int, **options: Any) -> Decoder:
    torch.manual_seed(seed)
    return Decoder(**options)


# Every step is seen once ----------------------------------------------------------------------------------------------


def checkpointed(model: Decoder, how: str) -> None:
    if how != "plain":
        reentrant = how == "reentrant"
        model.around = lambda block, x, mask: checkpoint(block, x, mask, use_reentrant=reentrant)


@pytest.mark.parametrize("how", ["reentrant", "non-reentrant"])
@pytest.mark.parametrize(
    "norm", [None, lambda: LayerNorm(WIDTH), lambda: RMSNorm(WIDTH)], ids=["torch's", "our LN", "our RMS"]
)
def test_activation_checkpointing(how: str, norm: Callable[[], nn.Module] | None) -> None:
    found = []
    for kind in ("plain", how):
        model = perturbed(seeded_decoder(3, norm=norm))
        checkpointed(model, kind)
        found.append(train_watched(model, adamw(model), 2, similar).history.samples)
    for plain, repeated in zip(*found, strict=True):
        assert set(plain.signals) == set(repeated.signals)
        assert "noise_scale" in plain.signals
        for name, values in plain.signals.items():
            close_to(repeated.signals[name], values, rel=1e-6)


@pytest.mark.parametrize("how", ["plain", "reentrant", "non-reentrant"])
def test_forward_passes_repeated_by_checkpointing_are_not_counted(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its numbers are the same, so a mean would not tell."""
    counted: list[str] = []
    add = StatsBuffer.add

    def counting(buffer: StatsBuffer, key: str, index: int | Sequence[int], value: Tensor) -> None:
        counted.extend([key] * value.numel())
        add(buffer, key, index, value)

    monkeypatch.setattr(StatsBuffer, "add", counting)
    model = Decoder()
    checkpointed(model, how)
    train_watched(model, adamw(model), 2)
    for key, places in (("stream_ms", 2), ("attention_ms", 2), ("attention_entropy", 2), ("norm_ms", 5), ("logz", 1)):
        assert counted.count(key) == 2 * places, key


def similar(model: nn.Module, step: int) -> Tensor:
    tokens = some_tokens(step, 1).repeat(3, 1)
    tokens[:, -2:] = some_tokens(step + 50)[:, -2:]
    return token_loss(model, tokens)


def test_gradient_accumulation() -> None:
    """Means are taken over the micro-batches; gradients are those of their sum."""
    parts = [some_tokens(step) for step in (1, 2)]
    model = perturbed(Decoder())
    whole, halves = copy.deepcopy(model), [copy.deepcopy(model) for _ in parts]
    with watch(model, every=1, rules=[]) as watched:
        for tokens in parts:
            (token_loss(model, tokens) / 2).backward()
        watched.step()
    each = [
        train_watched(half, None, 1, lambda m, s, t=t: token_loss(m, t)) for half, t in zip(halves, parts, strict=True)
    ]
    together = train_watched(whole, None, 1, lambda m, s: token_loss(m, torch.cat(parts)))
    for name in ("grad_norm", "gain_max", "weight_rms"):
        close_to(signal(watched, name), signal(together, name))
    close_to([watched.history.steps[-1].grad_norm], [together.history.steps[-1].grad_norm])
    for name in ("angle", "logz_mean", "eps_share", "mean_share", "attention_entropy", "stream_median"):
        means = [(a + b) / 2 for a, b in zip(*(signal(part, name) for part in each), strict=True)]  # type: ignore[operator]
        close_to(signal(watched, name), means)
    for name in ("stream_rms", "norm_rms"):
        pairs = zip(*(signal(part, name) for part in each), strict=True)
        close_to(signal(watched, name), [math.sqrt((a * a + b * b) / 2) for a, b in pairs])  # type: ignore[operator]
    for name in ("stream_max", "attention_logit"):
        close_to(signal(watched, name), [max(pair) for pair in zip(*(signal(p, name) for p in each), strict=True)])  # type: ignore[type-var]


@pytest.mark.parametrize("inside", [False, True], ids=["the model", "a part"])
def test_evaluation_is_not_counted(inside: bool) -> None:
    found = []
    for evaluates in (False, True):
        model = perturbed(seeded_decoder(5))

        def loss_of(model: nn.Module, step: int, evaluates: bool = evaluates) -> Tensor:
            loss = tokens_of(model, step)
            if evaluates:
                with torch.no_grad():
                    if inside:
                        model.blocks[1](100 * torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(1)))
                    else:
                        model.eval()(some_tokens(99, batch=9))
                model.train()
            return loss

        found.append(train_watched(model, adamw(model), 2, loss_of))
    assert found[0].history.samples == found[1].history.samples


def test_autocast() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        model = perturbed(seeded_decoder(6))
        plain = train_watched(copy.deepcopy(model), None, 1)

        def loss_of(model: nn.Module, step: int, dtype: torch.dtype = dtype) -> Tensor:
            with torch.autocast("cpu", dtype):
                return tokens_of(model, step)

        watched = train_watched(model, adamw(model), 1, loss_of)
        wanted = plain.history.samples[0].signals
        assert set(wanted) <= set(watched.history.samples[0].signals)
        for name, values in wanted.items():
            if name != "noise_scale":  # small differences of gradients
                close_to(watched.history.samples[0].signals[name], values, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("norm", [None, lambda: LayerNorm(WIDTH)], ids=["torch's norms", "our norms"])
def test_weights_of_other_dtypes_are_measured(dtype: torch.dtype, norm: Callable[[], nn.Module] | None) -> None:
    model = perturbed(seeded_decoder(7, norm=norm))
    plain = train_watched(copy.deepcopy(model), None, 1)
    watched = train_watched(model.to(dtype), None, 1)
    assert watched.history.dtype == str(dtype).removeprefix("torch.")
    for name, values in plain.history.samples[0].signals.items():
        if name != "noise_scale":
            rel = 1e-5 if dtype == torch.float64 else 0.15
            close_to(watched.history.samples[0].signals[name], values, rel=rel)


def test_several_optimizers() -> None:
    model = Decoder()
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizers = [torch.optim.SGD(matrices, lr=0.1), torch.optim.Adam(vectors, lr=0.01)]
    with watch(model, optimizers, every=1, rules=[]) as watched:
        loss = tokens_of(model, 1)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        watched.step(loss)
    assert all(v is not None for v in signal(watched, "update_ratio")[:2])
    assert watched.history.steps[-1].lr == 0.1
    assert watched.history.facts.adam_eps == 1e-8
    close_to(signal(watched, "adam_ratio")[:2], [1.0, 1.0], rel=1e-3)


def test_parameter_that_becomes_trainable_later_is_measured() -> None:
    """Its second moment has made fewer steps than the others'."""
    model = Decoder()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.999))
    with watch(model, optimizer, every=1, rules=[]) as watched:
        for step in range(1, 4):
            loss = tokens_of(model, 1)
            loss.backward()
            if step < 3:
                model.blocks[0].norm1.weight.grad = None
            optimizer.step()
            optimizer.zero_grad()
            watched.step(loss)
    assert optimizer.state[model.blocks[0].norm1.weight]["step"] == 1
    assert max(v for v in signal(watched, "adam_ratio") if v is not None) < 1.5


def test_frozen_and_unused_parameters_have_no_gradient_norm() -> None:
    model = Decoder(blocks=3)
    model.embedding.requires_grad_(False)
    model.blocks[0].requires_grad_(False)
    model.final_norm.weight.requires_grad_(False)
    model.unused = nn.Linear(3, 3)
    watched = train_watched(model, adamw(model), 2)
    groups = watched.history.facts.groups
    norms = dict(zip(groups, signal(watched, "grad_norm"), strict=True))
    assert norms["embedding"] is norms["blocks.0"] is norms["unused"] is None
    assert all(norms[name] is not None for name in ("blocks.1", "blocks.2", "final_norm", "head"))
    assert signal(watched, "stream_grad")[0] is None
    assert all(v is not None for v in signal(watched, "stream_grad")[1:])
    assert [norm.frozen for norm in watched.history.facts.norms] == [True, True] + [False] * 5
    assert all(v is not None for v in signal(watched, "weight_rms")[:3])


def test_gradients_zeroed_instead_of_none_are_measured() -> None:
    model = Decoder()
    twin = copy.deepcopy(model)
    wanted = train_watched(twin, adamw(twin), 3)
    optimizer = adamw(model)
    with watch(model, optimizer, every=1, rules=[]) as watched:
        for step in (1, 2, 3):
            loss = tokens_of(model, step)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            watched.step(loss)
    assert watched.history.samples == wanted.history.samples


def test_quantized_and_complex_parameters_are_supported() -> None:
    """Integers that stand for frozen weights, as adapters on quantized models have; and complex numbers."""
    model = Decoder()
    model.codes = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    model.phases = nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))

    def loss_of(model: nn.Module, step: int) -> Tensor:
        return tokens_of(model, step) + model.phases.abs().sum()

    watched = train_watched(model, adamw(model), 2, loss_of)
    norms = dict(zip(watched.history.facts.groups, signal(watched, "grad_norm"), strict=True))
    assert norms["codes"] is None
    assert norms["phases"] == pytest.approx(2.0)
    assert watched.history.nonfinite is None


def test_sparse_gradients_are_measured() -> None:
    model = Decoder()
    model.embedding = nn.Embedding(23, WIDTH, sparse=True)
    dense = copy.deepcopy(model)
    dense.embedding.sparse = False
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, dense)]
    found = [train_watched(m, o, 2) for m, o in zip((model, dense), optimizers, strict=True)]
    close_to(signal(found[0], "grad_norm"), signal(found[1], "grad_norm"))


def test_tied_weights_and_shared_blocks_are_counted_once() -> None:
    model = Decoder()
    model.head.weight = model.embedding.weight
    model.blocks = nn.ModuleList([model.blocks[0]] * 4)
    watched = train_watched(model, adamw(model), 1)
    assert watched.history.facts.blocks == ("blocks.0",)
    assert watched.history.facts.parameters == sum(p.numel() for p in model.parameters())
    total = math.hypot(*(v for v in signal(watched, "grad_norm") if v is not None))
    assert watched.history.steps[-1].grad_norm == pytest.approx(total)


def test_feed_forward_shared_by_blocks_is_measured_in_each() -> None:
    """What passes through it belongs to the block that runs."""
    model = perturbed(Decoder())
    alone = train_watched(copy.deepcopy(model), None, 1)
    model.blocks[1].feed_forward = model.blocks[0].feed_forward
    shared = train_watched(model, None, 1)
    close_to(signal(shared, "feed_forward_ratio")[:1], signal(alone, "feed_forward_ratio")[:1])
    assert signal(shared, "feed_forward_ratio")[1] != pytest.approx(signal(alone, "feed_forward_ratio")[0], rel=1e-3)


def test_parts_called_without_the_model_are_measured() -> None:
    """As in a pipeline, or where a user writes the forward pass himself."""
    model = perturbed(Decoder())
    wanted = train_watched(copy.deepcopy(model), None, 2)

    def by_parts(model: nn.Module, step: int) -> Tensor:
        tokens = some_tokens(step)
        x = model.embedding(tokens[:, :-1])
        for block in model.blocks:
            x = block(x)
        logits = model.head(model.final_norm(x))
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    watched = train_watched(model, None, 2, by_parts)
    missing = {"logz", "logz_mean"}  # of the model's output
    for sample, want in zip(watched.history.samples, wanted.history.samples, strict=True):
        assert set(sample.signals) == set(want.signals) - missing
        for name, values in sample.signals.items():
            close_to(values, want.signals[name], rel=1e-6)


def test_in_place_residual_additions_leave_out_ratios() -> None:
    """Norms that compute in a wider dtype keep a copy of their own, so the stream may be overwritten."""

    class Wide(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return F.layer_norm(x.double(), self.normalized_shape, self.weight.double(), self.bias.double()).float()

    model = perturbed(Decoder(lambda: Wide(WIDTH)))
    wanted = train_watched(copy.deepcopy(model), None, 1).history.samples[0].signals
    for block in model.blocks:
        block.in_place = True
    watched = train_watched(model, None, 1).history.samples[0].signals
    for name in ("stream_rms", "stream_max", "attention_logit", "grad_norm"):
        close_to(watched[name], wanted[name], rel=1e-5)
    for name in ("branch_ratio", "angle"):  # the input is overwritten
        assert name not in watched or all(v is None for v in watched[name])


def test_two_dimensional_inputs_are_measured() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = x + self.down(self.up(self.norm(x)).relu())
            return y

    model = nn.Sequential(nn.Linear(5, WIDTH), Residual(), Residual(), nn.Linear(WIDTH, 1))
    x = torch.randn(6, 5)
    outputs: list[Tensor] = []
    for block in (model[1], model[2]):
        block.register_forward_hook(lambda module, args, y: outputs.append(y.detach()))
    watched = train_watched(model, adamw(model), 1, lambda m, s: m(x).square().mean())
    assert watched.history.facts.blocks == ("1", "2")
    close_to(signal(watched, "stream_rms"), [y.square().mean().sqrt() for y in outputs])
    assert "feed_forward_ratio" in watched.history.samples[0].signals
    assert "attention_logit" not in watched.history.samples[0].signals


def test_samples_are_taken_at_step_1_and_every_interval() -> None:
    model = Decoder()
    optimizer = adamw(model)
    every_step = train_watched(copy.deepcopy(model), adamw(model), 0)
    assert len(every_step.history.samples) == 0
    with watch(model, optimizer, every=4, rules=[]) as watched:
        for step in range(1, 11):
            loss = tokens_of(model, step)
            loss.backward()
            if step == 7:
                watched.flush()  # in the middle of a step
                assert len(watched.history.steps) == 6
            optimizer.step()
            optimizer.zero_grad()
            watched.step(loss)
            if step in (3, 5):
                watched.flush()
                assert len(watched.history.steps) == step
    assert [sample.step for sample in watched.history.samples] == [1, 4, 8]
    assert [step.step for step in watched.history.steps] == list(range(1, 11))
    assert all(step.loss > 0 and step.grad_norm > 0 and step.lr == 1e-2 for step in watched.history.steps)
    events = [event for event in watched.record if event["kind"] == "steps"]
    assert [(event["first"], event["step"]) for event in events] == [
        (1, 1),
        (2, 3),
        (4, 4),
        (5, 5),
        (6, 6),
        (7, 8),
        (9, 10),
    ]
    assert all(len(event["loss"]) == event["step"] - event["first"] + 1 for event in events)


def test_flush_inside_a_sampled_step_keeps_the_sample() -> None:
    found = []
    for flushes in (False, True):
        model = seeded_decoder(8)
        optimizer = adamw(model)
        with watch(model, optimizer, every=2, rules=[]) as watched:
            for step in range(1, 5):
                loss = tokens_of(model, step)
                loss.backward()
                if flushes:
                    watched.flush()
                optimizer.step()
                optimizer.zero_grad()
                watched.step(loss)
        found.append(watched)
    assert list(found[0].history.samples) == list(found[1].history.samples)
    assert list(found[0].history.steps) == list(found[1].history.steps)


def test_losses_may_be_tensors_numbers_or_none() -> None:
    model = Decoder()
    given = [None, 2, 1.5, torch.tensor([1.0, 2.0]), torch.tensor(3), torch.tensor(2.0, dtype=torch.float16), math.inf]
    with watch(model, every=1, rules=[]) as watched:
        for loss in given:
            watched.step(loss)
    losses = [event["loss"][0] for event in watched.record if event["kind"] == "steps"]
    assert losses == [None, 2.0, 1.5, 1.5, 3.0, 2.0, math.inf]


def test_failed_backward_pass_does_not_hide_the_next_gradients() -> None:
    model = Decoder()
    with watch(model, every=1, rules=[]) as watched:
        fails = model.blocks[1].attention.register_forward_hook(lambda module, args, y: Raises.apply(y))
        with pytest.raises(PlannedError):
            tokens_of(model, 1).backward()
        fails.remove()
        model.zero_grad()
        loss = tokens_of(model, 2)
        loss.backward()
        watched.step(loss)
    total = math.hypot(*(float(p.grad.norm()) for p in model.parameters()))
    assert watched.history.steps[-1].grad_norm == pytest.approx(total)
