"""Each placement against an independent, literal transcription of its formula: forward and every gradient."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from omninorm import Block, NormConfig
from omninorm.config import PLACEMENTS
from omninorm.errors import ConfigError, InputError
from omninorm.placement import PLACEMENT_TYPES, FinalNorm, Position, enter, init_gain, inner_norms

WIDTH, BLOCKS, EPS = 6, 8, 1e-6
INNER = frozenset({"q", "k", "v", "heads", "hidden", "unit"})


class Bend(nn.Module):
    """A sublayer that is neither linear nor odd, so that no misplaced norm, sign or scale goes unseen."""

    inner_norms = INNER

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return torch.exp(0.3 * torch.tanh(self.linear(x)))


class Stack(nn.Module):
    def __init__(self, config: NormConfig, blocks: int = BLOCKS) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(
            Block(config, WIDTH, Bend(), Bend(), block=number, blocks=blocks) for number in range(1, blocks + 1)
        )
        self.final = FinalNorm(config, WIDTH)
        self.double()
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))

    def forward(self, x: Tensor) -> Tensor:
        stream = enter(self.config, x)
        for block in self.blocks:
            stream = block(stream)
        return self.final(stream)


def flat_norm(x: Tensor) -> Tensor:
    """All streams as one vector, with a root mean square of 1."""
    flat = torch.cat([x[..., j, :] for j in range(4)], -1)
    return flat / torch.sqrt((flat**2).mean(-1, keepdim=True) + EPS)


def mhc_gates(x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """H_pre, H_post and H_res of four streams: arXiv 2512.24880, with the ε of DeepSeek V4."""
    z = flat_norm(x) @ phi.T
    read = 1 / (1 + torch.exp(-(alpha[0] * z[..., :4] + bias[:4]))) + 1e-6
    write = 2 / (1 + torch.exp(-(alpha[1] * z[..., 4:8] + bias[4:8])))
    raw = torch.exp(alpha[2] * z[..., 8:] + bias[8:]).unflatten(-1, (4, 4))
    mix = raw / raw.sum(-1, keepdim=True) + 1e-6
    mix = mix / (mix.sum(-2, keepdim=True) + 1e-6)
    for _ in range(19):
        mix = mix / (mix.sum(-1, keepdim=True) + 1e-6)
        mix = mix / (mix.sum(-2, keepdim=True) + 1e-6)
    return read, write, mix


def gated_mean(normed: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Qwen4's mean of four normalized streams, gated per feature."""
    low = normed @ down.T / 4
    gate = torch.sigmoid((low * torch.sigmoid(low)) @ up.T)
    return sum((gate * normed)[..., j * WIDTH : (j + 1) * WIDTH] for j in range(4)) / 4


def attend(sources: list[Tensor], query: Tensor, norm: Callable[[Tensor], Tensor]) -> Tensor:
    """Softmax attention over depth with one query, arXiv 2603.15031. The norm's gain is used for all sources at once."""
    keys = norm(torch.stack(sources))
    weights = [torch.exp((key * query).sum(-1, keepdim=True)) for key in keys]
    return sum(weight * source for weight, source in zip(weights, sources, strict=True)) / sum(weights)


def transcribe(name: str, kind: str, model: Stack, x: Tensor) -> Tensor:
    """The table of placements, written out once more. Gains are taken from the model by their names."""
    values = dict(model.named_parameters())
    L = len(model.blocks)

    def N(where: str, v: Tensor) -> Tensor:  # noqa: N802 likewise
        if kind == "layernorm":
            v = v - v.mean(-1, keepdim=True)
        y = v / torch.sqrt((v**2).mean(-1, keepdim=True) + EPS) * values.pop(f"{where}.weight")
        return y + values.pop(f"{where}.bias") if kind == "layernorm" else y

    if name == "ngpt":
        x = x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    s = x0 = x
    groups: list[Tensor] = []
    if name in ("mhc", "hyper"):
        x = torch.stack([x] * 4, -2)
    for l in range(1, L + 1):  # noqa: E741 the formula's own letter
        for sublayer in ("attention", "feed_forward"):
            block = model.blocks[l - 1]
            F = getattr(block, sublayer)
            at = f"blocks.{l - 1}.around_{sublayer}"
            if name == "none":
                x = x + F(x)
            elif name == "post":
                x = N(f"{at}.norm", x + F(x))
            elif name == "pre":
                x = x + F(N(f"{at}.norm", x))
            elif name == "sandwich":
                x = x + N(f"{at}.norm_out", F(N(f"{at}.norm_in", x)))
            elif name == "reordered":
                x = x + N(f"{at}.norm", F(x))
            elif name == "deepnorm":
                x = N(f"{at}.norm", (2 * L) ** (1 / 4) * x + F(x))
            elif name == "lns":
                x = x + F(N(f"{at}.norm", x) / math.sqrt(l))
            elif name == "mix":
                is_post = l <= L // 4
                x = N(f"{at}.rule.norm", x + F(x)) if is_post else x + F(N(f"{at}.rule.norm", x))
            elif name == "hybrid" and sublayer == "attention":
                x = x + F(x)
            elif name == "hybrid":
                y = N(f"{at}.norm", x)
                x = y + F(y)
            elif name == "residual":
                f = F(x)
                s = s + f
                x = N(f"{at}.norm", x + f)
            elif name == "keel":
                alpha = 1 if l == 1 else 2 * L
                x = alpha * x + F(N(f"{at}.norm_in", x))
                if not (l == 1 and sublayer == "attention"):
                    x = N(f"{at}.norm_out", x)
            elif name == "normformer" and sublayer == "attention":
                x = x + N(f"{at}.rule.norm_out", F(N(f"{at}.rule.norm_in", x)))
            elif name == "normformer":
                x = x + F(N(f"{at}.rule.norm", x))
            elif name == "x0":
                if sublayer == "attention":
                    kept, recalled = values.pop(f"{at}.lambdas")
                    x = kept * x + recalled * x0
                x = x + F(N(f"{at}.norm", x))
            elif name == "ngpt":
                alpha = 0.05 * values.pop(f"{at}.alpha.value") * math.sqrt(WIDTH)
                h = F(x) / torch.linalg.vector_norm(F(x), dim=-1, keepdim=True)
                x = x + alpha * (h - x)
                x = x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)
            elif name == "mhc":
                gates = values.pop(f"{at}.gates.phi"), values.pop(f"{at}.gates.alpha"), values.pop(f"{at}.gates.bias")
                read, write, mix = mhc_gates(x, *gates)
                f = F(N(f"{at}.norm", sum(read[..., j : j + 1] * x[..., j, :] for j in range(4))))
                streams = []
                for k in range(4):
                    kept = sum(mix[..., j, k].unsqueeze(-1) * x[..., j, :] for j in range(4))
                    streams.append(kept + write[..., k : k + 1] * f)
                x = torch.stack(streams, -2)
            elif name == "hyper":
                normed = torch.cat([N(f"{at}.reader.norms.{j}", x[..., j, :]) for j in range(4)], -1)
                y = gated_mean(normed, values.pop(f"{at}.reader.down"), values.pop(f"{at}.reader.up"))
                write = 2 * torch.sigmoid(normed @ values.pop(f"{at}.inject").T / 4)
                x = torch.stack([x[..., j, :] + write[..., j : j + 1] * F(y) for j in range(4)], -2)
            elif name == "attention_residual":
                if l > 1 or sublayer == "feed_forward":
                    sources = [x0, *groups]
                    h = attend(sources, values.pop(f"{at}.attend.query"), partial(N, f"{at}.attend.key_norm"))
                else:
                    h = x0
                f = F(N(f"{at}.norm", h))
                if sublayer == "attention":  # 16 sublayers in 8 groups of two
                    groups.append(f)
                else:
                    groups[-1] = groups[-1] + f
            else:
                raise AssertionError(name)
    if name == "residual":
        x = x + N("final.norm", s)
    elif name == "hyper":
        normed = torch.cat([N(f"final.exit.norms.{j}", x[..., j, :]) for j in range(4)], -1)
        x = gated_mean(normed, values.pop("final.exit.down"), values.pop("final.exit.up"))
    elif name == "mhc":
        phi, bias, alpha = (values.pop(f"final.exit.gates.{key}") for key in ("phi", "bias", "alpha"))
        read = torch.sigmoid(alpha * (flat_norm(x) @ phi.T) + bias) + 1e-6
        x = N("final.norm", sum(read[..., j : j + 1] * x[..., j, :] for j in range(4)))
    elif name == "attention_residual":
        x = attend([x0, *groups], values.pop("final.exit.query"), partial(N, "final.exit.key_norm"))
        x = N("final.norm", x)
    elif name not in ("none", "post", "deepnorm", "keel", "ngpt"):
        x = N("final.norm", x)
    left = [key for key in values if "linear" not in key]
    assert not left, f"the formula does not know {left}"
    return x


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in PLACEMENTS for kind in ("rmsnorm", "layernorm") if (name, kind) != ("ngpt", "layernorm")],
)
def test_forward_and_gradients_are_the_formulas(name: str, kind: str) -> None:
    model = Stack(NormConfig(kind, name, 0.0 if name == "ngpt" else EPS))
    x = torch.randn(2, 3, WIDTH, dtype=torch.float64, requires_grad=True)
    y, expected = model(x), transcribe(name, kind, model, x)
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
    leaves, dy = [x, *model.parameters()], torch.randn_like(y)
    ours = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    theirs = torch.autograd.grad(expected, leaves, dy)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_muomnis_block_is_pre_norm() -> None:
    """x = x + attention(norm1(x)); x = x + ffn(norm2(x))."""
    config = NormConfig.from_dict({"normalization": "rmsnorm", "norm_placement": "pre", "norm_eps": 1e-6})
    attention, ffn = nn.Linear(5, 5), nn.Linear(5, 5)
    block = Block(config, 5, attention, ffn, block=1, blocks=1)
    norm1 = norm2 = torch.nn.RMSNorm(5, 1e-6)
    x = torch.randn(4, 5)
    expected = x + attention(norm1(x))
    expected = expected + ffn(norm2(expected))
    torch.testing.assert_close(block(x), expected)


def test_every_block_wraps_foreign_sublayers_and_their_arguments() -> None:
    """torch.nn.MultiheadAttention in a two-line adapter, causal or bidirectional by an argument of the call."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor, mask: Tensor | None = None, *, factor: float = 1.0) -> Tensor:
            return factor * self.inner(x, x, x, attn_mask=mask, need_weights=False)[0]

    block = Block(NormConfig(norm_placement="sandwich"), 8, Attention(), nn.Linear(8, 8), block=1, blocks=1)
    x = torch.randn(2, 4, 8)
    mask = nn.Transformer.generate_square_subsequent_mask(4)
    changed = x.clone()
    changed[:, -1] += 1.0
    causal, bidirectional = block(x, mask, factor=2.0), block(x)
    torch.testing.assert_close(block(changed, mask, factor=2.0)[:, :-1], causal[:, :-1])
    assert not torch.allclose(block(changed)[:, :-1], bidirectional[:, :-1])


def test_mix_fraction_moves_the_border() -> None:
    for fraction, posts in [(0.0, 0), (0.25, 2), (0.5, 4), (1.0, 8)]:
        model = Stack(NormConfig(norm_placement="mix", mix_fraction=fraction))
        kinds = [type(block.around_attention.rule).__name__ for block in model.blocks]
        assert kinds == ["PostNorm"] * posts + ["PreNorm"] * (8 - posts)


def test_mix_rounds_the_number_of_post_blocks_down() -> None:
    for fraction, blocks, posts in [(0.25, 6, 1), (0.25, 3, 0), (0.29, 100, 29)]:
        config = NormConfig(norm_placement="mix", mix_fraction=fraction)
        positions = [Position(block, blocks, "attention") for block in range(1, blocks + 1)]
        kinds = [type(PLACEMENT_TYPES["mix"](config, 2, position).rule) for position in positions]
        assert [kind.__name__ for kind in kinds] == ["PostNorm"] * posts + ["PreNorm"] * (blocks - posts)


def test_residual_scale_overrides_the_papers() -> None:
    deepnorm, keel = (Stack(NormConfig(norm_placement=name, residual_scale=3.0)) for name in ("deepnorm", "keel"))
    assert {block.around_attention.alpha for block in deepnorm.blocks} == {3.0}
    assert [block.around_feed_forward.alpha for block in keel.blocks] == [1.0] + [3.0] * 7


def test_deepnorm_shrinks_values_outputs_and_feed_forward() -> None:
    config = NormConfig(norm_placement="deepnorm")
    assert [init_gain(config, 32, role) for role in ("q", "k")] == [1.0, 1.0]
    for role in ("v", "out", "feed_forward"):
        assert init_gain(config, 32, role) == pytest.approx((8 * 32) ** -0.25)
    others = [name for name in PLACEMENTS if name != "deepnorm"]
    assert {init_gain(NormConfig(norm_placement=name), 32, "v") for name in others} == {1.0}
    with pytest.raises(ConfigError, match="role must be one of q, k, v, out, feed_forward, got 'head'"):
        init_gain(config, 32, "head")
    with pytest.raises(ConfigError, match="blocks must be an integer ≥ 1, got 0"):
        init_gain(config, 0, "v")


def test_inner_norms() -> None:
    wanted = {"reordered": {"q", "k"}, "hybrid": {"q", "k", "v"}, "normformer": {"heads", "hidden"}, "ngpt": {"unit"}}
    for name in PLACEMENTS:
        assert inner_norms(NormConfig(norm_placement=name)) == wanted.get(name, set())
    assert inner_norms(NormConfig("none", "hybrid")) == set()
    assert inner_norms(NormConfig("none", "normformer")) == {"heads"}
    assert inner_norms(NormConfig(qk_norm=True)) == {"q", "k"}
    assert inner_norms(NormConfig(v_norm=True)) == {"v"}
    assert inner_norms(NormConfig(norm_placement="reordered", v_norm=True)) == {"q", "k", "v"}
    assert inner_norms(NormConfig(norm_placement="reordered", qk_norm=False)) == set()
    assert inner_norms(NormConfig(norm_placement="normformer", qk_norm=True)) == {"q", "k", "heads", "hidden"}


def test_a_sublayer_without_its_inner_norms_is_refused() -> None:
    def build(config: NormConfig, attention: nn.Module, feed_forward: nn.Module) -> Block:
        return Block(config, WIDTH, attention, feed_forward, block=1, blocks=1)

    plain, bend = nn.Linear(WIDTH, WIDTH), Bend()
    message = (
        r"'hybrid' with qk_norm=None needs the norms k, q, v inside attention, "
        r"got a Linear without k, q, v\..* attribute inner_norms"
    )
    with pytest.raises(ConfigError, match=message):
        build(NormConfig(norm_placement="hybrid"), plain, plain)
    with pytest.raises(ConfigError, match=r"inside feed_forward, got a Linear without hidden"):
        build(NormConfig(norm_placement="normformer"), bend, plain)
    with pytest.raises(ConfigError, match=r"qk_norm=True needs the norms k, q inside attention"):
        build(NormConfig(qk_norm=True), plain, plain)
    with pytest.raises(ConfigError, match=r"v_norm=True needs the norms v inside attention"):
        build(NormConfig(v_norm=True), plain, plain)
    build(NormConfig(norm_placement="normformer"), bend, bend)


@pytest.mark.parametrize(
    ("block", "blocks", "message"),
    [
        (0, 4, "block must be an integer ≥ 1, got 0"),
        (5, 4, "block must be between 1 and the number of blocks, 4, got block 5"),
        (1, 0, "blocks must be an integer ≥ 1, got 0"),
        (1.0, 4, "block must be an integer ≥ 1, got 1.0"),
    ],
)
def test_bad_positions_are_refused(block, blocks, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Position(block, blocks, "attention")


def test_an_unknown_role_is_refused() -> None:
    with pytest.raises(ConfigError, match="role must be one of attention, feed_forward, got 'mlp'"):
        Position(1, 1, "mlp")


def test_a_config_or_a_sublayer_of_another_type_is_refused() -> None:
    with pytest.raises(ConfigError, match="must be a NormConfig, got 'pre'"):
        Block("pre", WIDTH, Bend(), Bend(), block=1, blocks=1)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"attention must be a torch\.nn\.Module, got a function"):
        Block(NormConfig(), WIDTH, lambda x: x, Bend(), block=1, blocks=1)  # type: ignore[arg-type]


def test_a_sublayer_that_changes_the_shape_is_refused() -> None:
    """A width of 1 would broadcast in silence."""
    x = torch.randn(2, 5, WIDTH)
    narrow = Block(NormConfig(), WIDTH, nn.Identity(), nn.Linear(WIDTH, 1), block=1, blocks=1)
    with pytest.raises(
        InputError,
        match=r"feed_forward must return a tensor of its input's shape \(2, 5, 6\), got shape \(2, 5, 1\)",
    ):
        narrow(x)

    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, None]:
            return x, None

    with pytest.raises(InputError, match=r"attention must return a tensor of its input's shape .* got a tuple"):
        Block(NormConfig(), WIDTH, Pair(), nn.Identity(), block=1, blocks=1)(x)


def test_a_stream_that_does_not_come_from_enter_is_refused() -> None:
    x = torch.randn(2, 5, WIDTH)
    block = Block(NormConfig(norm_placement="residual"), WIDTH, nn.Identity(), nn.Identity(), block=1, blocks=1)
    with pytest.raises(
        InputError,
        match=r"'residual' must be a pair of tensors, got a (Simulated)?Tensor\..*omninorm\.placement\.enter",
    ):
        block(x)
    with pytest.raises(InputError, match="stream must be a tensor, got a tuple"):
        Block(NormConfig(), WIDTH, nn.Identity(), nn.Identity(), block=1, blocks=1)((x, x))
