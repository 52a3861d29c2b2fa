"""Every signal against its definition, computed here in float64 by other means."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.watched_models import (
    HEADS,
    VOCAB,
    WIDTH,
    Decoder,
    adamw,
    causal_bias,
    close_to,
    perturbed,
    signal,
    some_tokens,
    token_loss,
    train_watched,
)
from torch import Tensor, nn

import omninorm
from omninorm.layers import CRMSNorm, DynamicTanh, LayerNorm, RMSNorm, ScaleNorm
from omninorm.monitor import Watch, watch

BIG_EPS = 1e-3


class ForeignRMSNorm(nn.Module):
    """As transformers writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))
        self.variance_epsilon = BIG_EPS

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))


class ForeignOffsetNorm(ForeignRMSNorm):
    """As Gemma's: the gain is stored as γ − 1."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return (1 + self.weight) * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))


NORMS = {
    "torch LayerNorm": lambda: nn.LayerNorm(WIDTH, eps=BIG_EPS),
    "torch RMSNorm": lambda: nn.RMSNorm(WIDTH, eps=BIG_EPS),
    "our LayerNorm": lambda: LayerNorm(WIDTH, eps=BIG_EPS),
    "our RMSNorm": lambda: RMSNorm(WIDTH, eps=BIG_EPS),
    "our RMSNorm, stored as γ − 1": lambda: RMSNorm(WIDTH, eps=BIG_EPS, gain_offset=1.0),
    "our RMSNorm, stored as γ − 1/2": lambda: RMSNorm(WIDTH, eps=BIG_EPS, gain_offset=0.5),
    "foreign RMSNorm": ForeignRMSNorm,
    "foreign γ − 1": ForeignOffsetNorm,
    "CRMSNorm": lambda: CRMSNorm(WIDTH, eps=BIG_EPS),
    "ScaleNorm": lambda: ScaleNorm(WIDTH, eps=BIG_EPS),
    "DyT": lambda: DynamicTanh(WIDTH, alpha=1.5),
}


def watched_once(model: nn.Module, tokens: Tensor, optimizer: Any = None, **inputs: Any) -> Watch:
    """One step; nothing is zeroed, so that the gradients can be looked at."""
    with watch(model, optimizer, every=1, rules=[]) as watched:
        loss = token_loss(model, tokens, **inputs)
        loss.backward()
        if optimizer is not None:
            optimizer.step()
        watched.step(loss)
    return watched


# What a block does to its stream --------------------------------------------------------------------------------------


def rms(x: Tensor) -> float:
    return float(x.detach().double().square().mean().sqrt())


class Forward:
    """The decoder once more in float64, written out: what every part reads and makes, with gradients."""

    def __init__(self, model: Decoder, tokens: Tensor) -> None:
        model = copy.deepcopy(model).double()
        self.model = model
        stream = model.embedding(tokens[:, :-1])
        self.inputs, self.outputs, self.attended, self.fed, self.hidden = [], [], [], [], []
        self.norm_inputs, self.logits, self.probabilities = [], [], []
        for block in model.blocks:
            self.inputs.append(stream)
            self.norm_inputs.append(stream)
            self.attended.append(self._attend(block.attention, block.norm1(stream)))
            middle = stream + self.attended[-1]
            self.norm_inputs.append(middle)
            self.hidden.append(block.feed_forward.up(block.norm2(middle)).clamp_min(0))
            self.fed.append(block.feed_forward.down(self.hidden[-1]))
            stream = middle + self.fed[-1]
            stream.retain_grad()
            self.outputs.append(stream)
        self.norm_inputs.append(stream)
        scores = model.head(model.final_norm(stream))
        self.logz = scores.exp().sum(-1).log()
        chosen = scores.gather(-1, tokens[:, 1:, None]).squeeze(-1)
        self.losses = (self.logz - chosen).mean(dim=1)  # per example
        self.losses.mean().backward(retain_graph=True)

    def _attend(self, attention: nn.Module, x: Tensor) -> Tensor:
        heads = []
        logits, probabilities = [], []
        size = WIDTH // HEADS
        q, k, v = attention.q(x), attention.k(x), attention.v(x)
        for head in range(HEADS):
            of_key = head * attention.kv_heads // HEADS
            ours, theirs = slice(head * size, (head + 1) * size), slice(of_key * size, (of_key + 1) * size)
            scores = torch.einsum("bqd,bkd->bqk", q[..., ours], k[..., theirs]) / size**0.5
            length = x.shape[1]
            visible = torch.arange(length)[:, None] >= torch.arange(length)[None]
            p = torch.softmax(scores.masked_fill(~visible, -math.inf), dim=-1)
            logits.append(scores.masked_fill(~visible, 0))
            probabilities.append(p)
            heads.append(p @ v[..., theirs])
        self.logits.append(torch.stack(logits, 1))
        self.probabilities.append(torch.stack(probabilities, 1))
        return attention.out(torch.cat(heads, -1))


def pairs(values: list[Tensor], others: list[Tensor]) -> list[float]:
    return [rms(a) / rms(b) for a, b in zip(values, others, strict=True)]


@pytest.mark.parametrize("style", ["sdpa", "eager"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_block_signals_match_their_formulas(kv_heads: int, style: str) -> None:
    model = perturbed(Decoder(kv_heads=kv_heads, style=style, blocks=3))
    with torch.no_grad():
        model.blocks[1].feed_forward.up.bias[:12] = -100.0  # a quarter of the units is dead
    tokens = some_tokens(1)
    watched = watched_once(model, tokens)
    truth = Forward(model, tokens)

    close_to(signal(watched, "stream_rms"), [rms(y) for y in truth.outputs])
    close_to(signal(watched, "stream_max"), [y.abs().max() for y in truth.outputs])
    close_to(signal(watched, "stream_median"), [y.detach().abs().flatten().median() for y in truth.outputs])
    differences = [y - x for y, x in zip(truth.outputs, truth.inputs, strict=True)]
    close_to(signal(watched, "branch_ratio"), pairs(differences, truth.inputs))
    close_to(signal(watched, "attention_ratio"), pairs(truth.attended, truth.inputs))
    close_to(signal(watched, "feed_forward_ratio"), pairs(truth.fed, truth.inputs))
    angles = []
    for y, x in zip(truth.outputs, truth.inputs, strict=True):
        cosine = (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))
        angles.append(float(cosine.detach().arccos().mean()) / math.pi)
    close_to(signal(watched, "angle"), angles)
    close_to(signal(watched, "stream_grad"), [rms(y.grad) for y in truth.outputs])
    dead = [(h.abs() <= 1e-3 * rms(h)).flatten(0, 1).all(0).double().mean() for h in truth.hidden]
    assert float(dead[1]) >= 0.25
    close_to(signal(watched, "dead_units"), dead)
    worst = truth.logz.flatten()[truth.logz.flatten().abs().argmax()]
    close_to(signal(watched, "logz"), [worst])
    close_to(signal(watched, "logz_mean"), [truth.logz.mean()])
    close_to([watched.history.steps[-1].loss], [truth.losses.mean()])


@pytest.mark.parametrize("style", ["sdpa", "eager"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_attention_signals_match_their_formulas(kv_heads: int, style: str) -> None:
    """One example of the batch is looked at: the first."""
    model = perturbed(Decoder(kv_heads=kv_heads, style=style))
    tokens = some_tokens(2)
    watched = watched_once(model, tokens)
    truth = Forward(model, tokens)
    close_to(signal(watched, "attention_logit"), [z[0].abs().max() for z in truth.logits])
    entropies = []
    for p in truth.probabilities:
        share = [entropy(p[0, head, at, : at + 1]) for head in range(HEADS) for at in range(1, p.shape[-1])]
        entropies.append(sum(share) / len(share))
    close_to(signal(watched, "attention_entropy"), entropies)


def entropy(p: Tensor) -> float:
    """−Σ p ln p as a share of its largest value."""
    return float(-(p * p.log()).sum().detach() / math.log(len(p)))


@pytest.mark.parametrize("kind", ["bool", "float", "float, −1e9"])
def test_masked_keys_are_ignored(kind: str) -> None:
    """A key that no query may see, and a bias for those that are seen."""
    model = perturbed(Decoder(blocks=1))
    tokens = some_tokens(3)
    length = tokens.shape[1] - 1
    visible = torch.ones(length, length, dtype=torch.bool).tril()
    visible[1:, 0] = False
    bias = torch.linspace(-1, 1, length).repeat(length, 1) if kind != "bool" else torch.zeros(length, length)
    hidden_as = -1e9 if "1e9" in kind else -math.inf
    mask = visible if kind == "bool" else bias.masked_fill(~visible, hidden_as)
    watched = watched_once(model, tokens, mask=mask)

    plain = copy.deepcopy(model).double()
    x = plain.blocks[0].norm1(plain.embedding(tokens[:1, :-1]))
    attention = plain.blocks[0].attention
    q, k = (f(x)[0].unflatten(-1, (HEADS, -1)).transpose(0, 1) for f in (attention.q, attention.k))
    logits = q @ k.transpose(1, 2) / math.sqrt(WIDTH // HEADS) + bias.double()
    close_to(signal(watched, "attention_logit"), [logits[:, visible].abs().max()])
    share = []
    for row, seen in ((logits.detach()[h, at], visible[at]) for h in range(HEADS) for at in range(length)):
        if seen.sum() > 1:
            share.append(entropy(torch.softmax(row[seen], dim=0)))
    close_to(signal(watched, "attention_entropy"), [sum(share) / len(share)])


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("masked", ["", "causal", "padding"])
def test_multihead_attention_is_measured(batch_first: bool, masked: str) -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, dropout=0.0, batch_first=batch_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    x = torch.randn(3, 6, WIDTH)
    given = x if batch_first else x.transpose(0, 1)
    visible = torch.ones(6, 6, dtype=torch.bool)
    options: dict[str, Any] = {}
    if masked == "causal":
        visible = visible.tril()
        options["mask"] = nn.Transformer.generate_square_subsequent_mask(6)
    elif masked == "padding":
        visible[:, 4:] = False
        options["src_key_padding_mask"] = torch.tensor([[False] * 4 + [True] * 2] + [[False] * 6] * 2)
    with watch(model, every=1, rules=[]) as watched:
        model(given, **options).square().mean().backward()
        watched.step()
    attention = copy.deepcopy(model).double().layers[0].self_attn
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    q, k = (
        F.linear(x[0].double(), weight[at : at + WIDTH], bias[at : at + WIDTH])
        .unflatten(-1, (HEADS, -1))
        .transpose(0, 1)
        for at in (0, WIDTH)
    )
    logits = q @ k.transpose(1, 2) / math.sqrt(WIDTH // HEADS)
    close_to(signal(watched, "attention_logit")[:1], [logits[:, visible].abs().max()])
    share = []
    for head in range(HEADS):
        share += [entropy(torch.softmax(logits[head, at][visible[at]], 0)) for at in range(6) if visible[at].sum() > 1]
    close_to(signal(watched, "attention_entropy")[:1], [sum(share) / len(share)])


@pytest.mark.parametrize("by", ["attn_mask", "key_padding_mask"])
def test_boolean_masks_of_multihead_attention_are_applied(by: str) -> None:
    """True hides a key: each query sees two, and both alike."""

    class Uniform(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.norm = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True), nn.LayerNorm(WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.tensor([False, False, True, True, True])
            mask = hidden.expand(len(x), 5) if by == "key_padding_mask" else hidden.expand(5, 5)
            y: Tensor = x + self.attention(self.norm(x), self.norm(x), self.norm(x), **{by: mask})[0]
            return y

    model = nn.Sequential(Uniform(), Uniform())
    x = 3 * torch.randn(2, 5, WIDTH)
    x[:, :2] = torch.randn(WIDTH)  # the two keys in sight are the same: all entropy that two can have
    with watch(model, every=1, rules=[]) as watched:
        model(x).square().mean().backward()
        watched.step()
    close_to(signal(watched, "attention_entropy")[:1], [1.0])


def test_softmax_over_another_dimension_is_ignored() -> None:
    """A softmax of four dimensions along another one, in a block, is something else."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)
            self.norm = nn.LayerNorm(WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(self.norm(x)).unflatten(-1, (HEADS, -1))
            return x + torch.softmax(y, dim=1).flatten(2)

    model = nn.Sequential(Odd(), Odd())
    with watch(model, every=1, rules=[]) as watched:
        model(torch.randn(2, 5, WIDTH)).square().mean().backward()
        watched.step()
    assert "attention_logit" not in watched.history.samples[-1].signals


def test_stream_whose_squares_overflow_is_measured() -> None:
    """1e25 is a number in float32, its square is not."""
    model = Decoder(blocks=1)
    plain = signal(watched_once(model, some_tokens(1)), "stream_rms")
    model.blocks[0].register_forward_hook(lambda module, args, y: y * 1e25)
    close_to(signal(watched_once(model, some_tokens(1)), "stream_rms"), [1e25 * value for value in plain])  # type: ignore[operator]


def test_attention_to_a_single_key_has_full_entropy() -> None:
    """Attention over a single token is not sharp attention."""
    watched = watched_once(Decoder(blocks=1), some_tokens(1, length=1))
    close_to(signal(watched, "attention_entropy"), [1.0])


# Norms ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", NORMS)
def test_norm_signals_match_their_formulas(kind: str) -> None:
    model = perturbed(Decoder(NORMS[kind]))
    tokens = some_tokens(4)
    watched = watched_once(model, tokens)
    truth = Forward(model, tokens)
    inputs = [x.detach() for x in truth.norm_inputs]
    close_to(signal(watched, "norm_rms"), [rms(x) for x in inputs])
    centred = "LayerNorm" in kind
    if kind != "DyT":
        spread = [(x.var(-1, correction=0) if centred else x.square().mean(-1)) for x in inputs]
        close_to(signal(watched, "eps_share"), [(BIG_EPS / (s + BIG_EPS)).mean() for s in spread])
        assert "saturation" not in watched.history.samples[-1].signals
    else:
        saturated = [(x * 1.5).abs() for x in inputs]
        alphas = [norm.alpha.detach().double() for norm in norms_of(model)]
        saturated = [((x * a).abs() > 2).double().mean() for x, a in zip(inputs, alphas, strict=True)]
        assert any(0.01 < float(share) < 0.99 for share in saturated)
        close_to(signal(watched, "saturation"), saturated)
        assert "eps_share" not in watched.history.samples[-1].signals
    if centred:
        close_to(signal(watched, "mean_share"), [(x.mean(-1) ** 2 / x.square().mean(-1)).mean() for x in inputs])
    else:
        assert "mean_share" not in watched.history.samples[-1].signals


def norms_of(model: Decoder) -> list[nn.Module]:
    return [norm for block in model.blocks for norm in (block.norm1, block.norm2)] + [model.final_norm]


@pytest.mark.parametrize("kind", NORMS)
def test_gain_signals_match_their_formulas(kind: str) -> None:
    model = perturbed(Decoder(NORMS[kind]), scale=0.5)
    offset = {"our RMSNorm, stored as γ − 1": 1, "our RMSNorm, stored as γ − 1/2": 0.5, "foreign γ − 1": 1}.get(kind, 0)
    if kind != "ScaleNorm":
        with torch.no_grad():
            norms_of(model)[1].weight[:3] = -offset  # 3 of 16 gains are silent
    gains = [
        (norm.scale if kind == "ScaleNorm" else norm.weight).detach().double() + offset for norm in norms_of(model)
    ]
    watched = watched_once(model, some_tokens(5))
    close_to(signal(watched, "gain_max"), [gain.abs().max() for gain in gains])
    close_to(signal(watched, "gain_ratio"), [gain.abs().max() / gain.abs().median() for gain in gains])
    close_to(signal(watched, "gain_small"), [(gain.abs() < 1e-3).double().mean() for gain in gains])


def test_variance_next_to_a_large_mean_is_accurate() -> None:
    """The variance of a stream with a large mean, and squares beyond float32."""
    norm = nn.LayerNorm(WIDTH, eps=1.0)
    for factor, shift in ((1.0, 3e3), (1e22, 0.0)):
        model = nn.Sequential(nn.Linear(WIDTH, WIDTH), norm)
        x = torch.randn(5, WIDTH)
        model[0].register_forward_hook(lambda module, args, y, f=factor, s=shift: y * f + s)
        with watch(model, every=1, rules=[]) as watched:
            model(x).square().mean().backward()
            watched.step()
        with torch.no_grad():
            y = model[0](x).double()
        close_to(signal(watched, "norm_rms"), [rms(y)])
        close_to(signal(watched, "eps_share"), [(1 / (y.var(-1, correction=0) + 1)).mean()], rel=1e-4)


@pytest.mark.parametrize(
    "kind", ["torch LayerNorm", "our LayerNorm", "torch RMSNorm", "our RMSNorm", "foreign RMSNorm"]
)
@pytest.mark.parametrize("length", [7, 64])
def test_noise_scale_matches_per_example_gradients(kind: str, length: int) -> None:
    """tr Σ/|G|² by McCandlish's estimators, from the gradients of each example alone."""
    torch.manual_seed(5)
    model = perturbed(Decoder(NORMS[kind]))
    tokens = similar_tokens(5, length)
    watched = watched_once(model, tokens)
    truth = Forward(model, tokens)
    gains = [norm.weight for norm in norms_of(truth.model)]
    single = [
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, gains, retain_graph=True)]) for loss in truth.losses
    ]
    count = len(single)
    small = sum(float(g.square().sum()) for g in single) / count
    big = float(torch.stack(single).mean(0).square().sum())
    noise, squared = (small - big) / (1 - 1 / count), (count * big - small) / (count - 1)
    assert squared > 0, "choose another seed: the gradient is lost in the noise"
    close_to(signal(watched, "noise_scale"), [noise / squared], rel=1e-3)


def similar_tokens(batch: int, length: int) -> Tensor:
    """Examples whose gradients have much in common."""
    tokens = some_tokens(6, 1, length).repeat(batch, 1)
    tokens[:, -(length // 4 + 1) :] = some_tokens(7, batch, length)[:, -(length // 4 + 1) :]
    return tokens


def test_noise_scale_counts_examples_where_the_sequence_comes_first() -> None:
    """nn.TransformerEncoder's default puts the batch second."""
    found = []
    x = torch.randn(4, 6, WIDTH) + 1
    for batch_first in (True, False):
        torch.manual_seed(1)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, dropout=0.0, batch_first=batch_first)
        model = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        perturbed(model)
        with watch(model, every=1, rules=[]) as watched:
            (model(x if batch_first else x.transpose(0, 1)) - 1).square().mean().backward()
            watched.step()
        found += signal(watched, "noise_scale")
    close_to(found[1:], found[:1], rel=1e-3)


# Gradients, weights, optimizers ---------------------------------------------------------------------------------------


def groups_of(model: nn.Module, watched: Watch) -> list[list[tuple[str, nn.Parameter]]]:
    """The parameters of each group that the facts name, by their names alone."""
    named = list(model.named_parameters())
    return [[item for item in named if item[0].startswith(f"{group}.")] for group in watched.history.facts.groups]


@pytest.mark.parametrize("scaled", [False, True])
def test_gradient_norms_are_measured_before_clipping(scaled: bool) -> None:
    model = perturbed(Decoder())
    optimizer = adamw(model)
    # The scale grows before the step ends.
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1, enabled=scaled)
    with watch(model, optimizer, every=1, scaler=scaler, rules=[]) as watched:
        for step in range(1, 4):
            truth = Forward(model, some_tokens(step))
            wanted = {name: float(p.grad.norm()) for name, p in truth.model.named_parameters()}
            loss = token_loss(model, some_tokens(step))
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            watched.step(loss)
            total = math.hypot(*wanted.values())
            close_to([watched.history.steps[-1].grad_norm], [total], rel=1e-4)
            close_to(signal(watched, "stream_grad"), [rms(y.grad) for y in truth.outputs], rel=1e-4)
            groups = groups_of(model, watched)
            assert sum(map(len, groups)) == len(wanted)
            norms = [math.hypot(*(wanted[name] for name, _ in group)) for group in groups]
            close_to(signal(watched, "grad_norm"), norms, rel=1e-4)


def test_weight_signals_match_their_formulas() -> None:
    model = perturbed(Decoder())
    watched = watched_once(model, some_tokens(1))
    wanted = []
    for group in groups_of(model, watched):
        sizes = [rms(p) for _, p in group if p.ndim >= 2]
        wanted.append(math.sqrt(sum(s * s for s in sizes) / len(sizes)) if sizes else None)
    assert None in wanted  # the final norm has no matrix
    close_to(signal(watched, "weight_rms"), wanted)


EPS = 1e-4
OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, betas=(0.8, 0.9), eps=EPS, weight_decay=0.0, foreach=False),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, betas=(0.8, 0.9), eps=EPS, weight_decay=0.0, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-2, betas=(0.8, 0.9), eps=EPS, weight_decay=0.0, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2, betas=(0.8, 0.9), eps=EPS),
}


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_adam_signals_match_their_formulas(kind: str, scaled: bool) -> None:
    """Adam itself, by its formula in float64: its update, √mean(g²/max(v̂, ε²)) and RMS(g)/ε."""
    model = perturbed(Decoder())
    optimizer = OPTIMIZERS[kind](model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=4096.0, enabled=scaled)
    named = dict(model.named_parameters())
    first = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in named.items()}
    second = copy.deepcopy(first)
    with watch(model, optimizer, every=1, scaler=scaler, rules=[]) as watched:
        for step in range(1, 5):
            loss = token_loss(model, some_tokens(step)) * (5.0 if step == 4 else 1.0)  # Adam is surprised
            scaler.scale(loss).backward()
            scale = scaler.get_scale()
            ratio, of_eps, change = {}, {}, {}
            for name, p in named.items():
                g = p.grad.double() / scale
                first[name] = 0.8 * first[name] + 0.2 * g
                second[name] = 0.9 * second[name] + 0.1 * g * g
                v = second[name] / (1 - 0.9**step)
                ratio[name] = float((g * g / v.clamp_min(EPS**2)).mean().sqrt())
                of_eps[name] = rms(g) / EPS
                update = 1e-2 * first[name] / (1 - 0.8**step) / (v.sqrt() + EPS)
                change[name] = rms(update) / rms(p)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            watched.step(loss)
            groups = groups_of(model, watched)
            close_to(signal(watched, "adam_ratio"), [max(ratio[n] for n, _ in g) for g in groups], rel=1e-3)
            deciding = [[(n, p) for n, p in g if p.ndim >= 2] or g for g in groups]  # matrices, where there are some
            close_to(signal(watched, "adam_eps_ratio"), [min(of_eps[n] for n, _ in g) for g in deciding], rel=1e-3)
            worst = watched.history.samples[-1].worst
            if step == 1:  # all ratios are 1 by definition
                assert max(ratio.values()) < 1.0001
                continue
            assert list(worst["adam_ratio"]) == [max(g, key=lambda item: ratio[item[0]])[0] for g in groups]
            assert list(worst["adam_eps_ratio"]) == [min(g, key=lambda item: of_eps[item[0]])[0] for g in deciding]
            matrices = [sorted(change[n] for n, p in g if p.ndim >= 2) for g in groups]
            medians = [(m[(len(m) - 1) // 2] + m[len(m) // 2]) / 2 if m else None for m in matrices]
            close_to(signal(watched, "update_ratio"), medians, rel=1e-3)
    assert max(signal(watched, "adam_ratio")) > 1.5
    assert watched.history.facts.adam_eps == EPS


def test_sgd_has_no_second_moment() -> None:
    model = Decoder()
    watched = train_watched(model, torch.optim.SGD(model.parameters(), lr=0.1), 2)
    signals = watched.history.samples[-1].signals
    assert "update_ratio" in signals
    assert "adam_ratio" not in signals
    assert "adam_eps_ratio" not in signals
    reasons = next(event for event in watched.record if event["kind"] == "seen")["not_seen"]
    assert "second moment" in reasons["adam_ratio"]
    assert watched.history.facts.adam_eps is None


def test_step_skipped_by_the_scaler_is_no_nan() -> None:
    """An overflow of scaled gradients is the scaler's business: nothing of it is a finding."""
    for fused in (False, True):
        model = Decoder()
        optimizer = adamw(model, fused=fused, foreach=False)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
        with watch(model, optimizer, every=1, scaler=scaler, rules=[]) as watched:
            for step in (1, 2):
                loss = token_loss(model, some_tokens(step))
                scaler.scale(loss * 1e6).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                watched.step(loss)
        assert scaler.get_scale() == 2.0**125, "nothing was skipped"
        assert watched.history.nonfinite is None
        values = [v for sample in watched.history.samples for vs in sample.signals.values() for v in vs]
        assert all(v is None or math.isfinite(v) for v in values)


# Many rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "length"), [(16, 64), (40, 25), (64, 16)])
def test_rows_are_sampled_without_bias(batch: int, length: int) -> None:
    """1024 rows, of which a few hundred are read. The first token's stream is a hundred times larger, as in large models:
    a sample that kept step with the sequences would hold it too often or never."""
    model = perturbed(Decoder(blocks=1))
    tokens = some_tokens(7, batch, length)
    at_first = torch.ones(length, 1)
    at_first[0] = 100.0
    model.embedding.register_forward_hook(lambda module, args, y: y * at_first)
    watched = watched_once(model, tokens)
    seen = {}
    model.blocks[0].register_forward_hook(lambda module, args, y: seen.update(x=args[0], y=y))
    token_loss(model, tokens)
    close_to(signal(watched, "stream_rms"), [rms(seen["y"])], rel=0.25)
    close_to(signal(watched, "norm_rms")[:1], [rms(seen["x"])], rel=0.25)
    close_to(signal(watched, "stream_max"), [seen["y"].abs().max()])
    close_to(signal(watched, "stream_median"), [seen["y"].detach().abs().flatten().median()], rel=0.1)
    close_to(signal(watched, "branch_ratio"), [rms(seen["y"] - seen["x"]) / rms(seen["x"])], rel=0.25)


def test_elements_of_a_matrix_are_sampled_without_bias() -> None:
    """A sample of every 256th of 256 columns would read one column alone."""
    model = nn.Sequential(nn.Linear(256, 4096, bias=False), nn.RMSNorm(4096))
    with torch.no_grad():
        model[0].weight.normal_()
        model[0].weight[:, 0] = 1000.0
    with watch(model, every=1, rules=[]) as watched:
        model(torch.randn(2, 256)).mean().backward()
        watched.step()
    close_to(signal(watched, "weight_rms")[:1], [rms(model[0].weight)], rel=0.25)


# The record -----------------------------------------------------------------------------------------------------------


def test_every_signal_has_values_or_a_reason() -> None:
    from omninorm.record.signals import SIGNALS

    watched = train_watched(Decoder(), None, 1, lambda model, step: token_loss(model, similar_tokens(3, 7)))
    (seen,) = [event for event in watched.record if event["kind"] == "seen"]
    (sample,) = [event for event in watched.record if event["kind"] == "sample"]
    assert set(seen["not_seen"]) | set(sample["signals"]) == set(SIGNALS)
    assert not set(seen["not_seen"]) & set(sample["signals"])
    assert set(seen["not_seen"]) == {
        "saturation",
        "expert_load",
        "expert_least",
        "update_ratio",
        "adam_ratio",
        "adam_eps_ratio",
    }
    lengths = {"run": 1, "block": 2, "norm": 5, "group": len(watched.history.facts.groups)}
    for name, values in sample["signals"].items():
        assert len(values) == lengths[SIGNALS[name].axis]
        assert all(v is None or v == float(f"{v:.4g}") for v in values)


def test_causal_bias_hides_later_keys() -> None:
    """What the eager attention of these tests relies on."""
    assert float(torch.softmax(causal_bias(torch.zeros(1, 3, 1)), -1)[0, 0]) == 1.0
    assert VOCAB == 23
    assert omninorm.__version__
