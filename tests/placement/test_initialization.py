"""The theorems of Xiong et al. 2020 (arXiv 2002.04745) about initialization, measured with confidence intervals.

Their setting: Xavier-normal matrices, all of width d, ReLU, W_Q = W_K = 0 (attention is the average over tokens),
coordinates of the embeddings N(0, 1), LayerNorm.
"""

import math
from statistics import mean, stdev

import torch
from torch import Tensor, nn

from omninorm import Block, NormConfig
from omninorm.placement import FinalNorm, enter

WIDTH, TOKENS, BATCH, SEEDS = 64, 8, 2, 12
# Student's t, 97.5 %, 11 degrees of freedom.
T_QUANTILE = 2.201


def xavier(width: int) -> nn.Linear:
    linear = nn.Linear(width, width, bias=False)
    nn.init.xavier_normal_(linear.weight)
    return linear


class UniformAttention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.value = xavier(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.value(x).mean(1, keepdim=True).expand_as(x)


def build(placement: str, depth: int) -> tuple[nn.ModuleList, FinalNorm, NormConfig]:
    config = NormConfig("layernorm", placement)
    blocks = nn.ModuleList()
    for number in range(1, depth + 1):
        feed_forward = nn.Sequential(xavier(WIDTH), nn.ReLU(), xavier(WIDTH))
        blocks.append(Block(config, WIDTH, UniformAttention(WIDTH), feed_forward, block=number, blocks=depth))
    return blocks, FinalNorm(config, WIDTH), config


def last_gradient_norm(placement: str, depth: int, seed: int) -> float:
    """‖∂loss/∂W‖ of the last feed-forward's last matrix, for cross-entropy over a random head."""
    torch.manual_seed(seed)
    blocks, final, config = build(placement, depth)
    head, targets = xavier(WIDTH), torch.randint(WIDTH, (BATCH, TOKENS))
    stream = enter(config, torch.randn(BATCH, TOKENS, WIDTH))
    for block in blocks:
        stream = block(stream)
    loss = nn.functional.cross_entropy(head(final(stream)).flatten(0, 1), targets.flatten())
    (gradient,) = torch.autograd.grad(loss, blocks[-1].feed_forward[2].weight)
    return gradient.norm().item()


def slope(placement: str, seed: int) -> float:
    """Least-squares slope of log gradient norm over log depth, for one seed."""
    depths = [12, 24, 48, 96]
    x = [math.log(depth) for depth in depths]
    y = [math.log(last_gradient_norm(placement, depth, seed)) for depth in depths]
    x_mean, y_mean = mean(x), mean(y)
    covariance = sum((a - x_mean) * (b - y_mean) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - x_mean) ** 2 for a in x)


def interval(values: list[float]) -> tuple[float, float]:
    """The mean's 95 % confidence interval."""
    half = T_QUANTILE * stdev(values) / math.sqrt(len(values))
    return mean(values) - half, mean(values) + half


def test_the_last_gradient_is_flat_in_depth_for_post_norm() -> None:
    low, high = interval([slope("post", seed) for seed in range(SEEDS)])
    assert low <= 0 <= high
    assert high - low < 0.2, "the interval is too wide for a verdict"


def test_the_last_gradient_falls_as_the_root_of_depth_for_pre_norm() -> None:
    """At finite depth the stream's variance is 1 + cL, not cL: the slope expected is that of (1 + cL)^−½.

    The bracket of the variance bounds c between ½ and 3/2, so the slope between 12 and 96 blocks lies in
    [−0.49, −0.46].
    """
    low, high = interval([slope("pre", seed) for seed in range(SEEDS)])
    assert low <= -0.46
    assert high >= -0.49
    assert high - low < 0.2


def squared_norms(placement: str, depth: int, seed: int) -> list[float]:
    """E‖x‖²/d of the stream after each block, or for post-norm at the input of each block's second norm."""
    torch.manual_seed(seed)
    blocks, _, config = build(placement, depth)
    stream = enter(config, torch.randn(BATCH, TOKENS, WIDTH))
    found = []
    with torch.no_grad():
        for block in blocks:
            if placement == "post":
                x = block.around_attention(stream, block.attention)
                found.append((x + block.feed_forward(x)).square().mean().item())
            stream = block(stream)
            if placement == "pre":
                found.append(stream.square().mean().item())
    return found


def test_pre_norms_stream_variance_stays_in_its_bracket() -> None:
    """(1 + l/2) d ≤ E‖x_l‖² ≤ (1 + 3l/2) d."""
    runs = [squared_norms("pre", 24, seed) for seed in range(SEEDS)]
    for number in range(1, 25):
        low, high = interval([run[number - 1] for run in runs])
        assert high >= 1 + number / 2
        assert low <= 1 + 3 * number / 2
    growth = runs[0][-1] / runs[0][0]
    assert growth > 5, "the stream must grow for the bracket to mean something"


def test_post_norms_inner_norm_sees_three_halves() -> None:
    """E‖x‖² = 3d/2 before the second norm of every block."""
    runs = [squared_norms("post", 12, seed) for seed in range(SEEDS)]
    low, high = interval([mean(run) for run in runs])
    assert low <= 1.5 <= high
    assert high - low < 0.05
