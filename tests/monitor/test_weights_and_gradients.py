"""What gradients and weights look like: zeros from underflow, noise, random initialization, and doubled gains."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers.watched_models import VOCAB, Decoder, adamw, some_tokens, token_loss
from torch import Tensor, nn

from omninorm import RMSNorm
from omninorm.monitor import Alarm, Watch, watch
from omninorm.monitor.checks.grids import Grid, grid_of, measure
from omninorm.monitor.checks.inputs import rms_of, sizes_of
from omninorm.monitor.checks.weights import frozen, look_random, matrices_of, shifted_gains
from omninorm.monitor.model_map.structure import find_structure

WIDTH = 64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def outer(tokens: int = 100) -> Tensor:
    """Return the gradient of a linear layer whose inputs and outputs' gradients have features of different sizes."""
    sizes = torch.linspace(0.1, 2.0, 32)
    return (normal(tokens, 32) * sizes).T @ (normal(tokens, 32, seed=1) * sizes)


# Grids ----------------------------------------------------------------------------------------------------------------


def test_zeros_of_dead_rows_and_columns_are_not_underflow() -> None:
    gradient = outer()
    gradient[:7] = 0.0
    gradient[:, 3:9] = 0.0
    assert measure(gradient.unsqueeze(0))[0, 0] == 0.0
    gradient[10, 10:15] = 0.0  # 5 of the 25 × 26 that are left
    assert float(measure(gradient.unsqueeze(0))[0, 0]) == pytest.approx(5 / (25 * 26), abs=1e-6)


def test_elements_that_underflow_are_counted() -> None:
    gradient = outer()
    lost = (gradient * 1e-8).half().float()
    zeros = float(measure(lost.unsqueeze(0))[0, 0])
    assert zeros == pytest.approx(float((lost == 0).double().mean()), abs=0.05)
    assert zeros > 0.1


def test_unevenness_is_1_for_independent_elements_and_large_for_gradients() -> None:
    # The relative variance of 32 means of 32 squares, in units of its expectation, has a standard deviation of 0.25.
    found = measure(torch.stack([normal(32, 32, seed=seed) for seed in range(200)]))[:, 1]
    assert 1.0 < float(found.mean()) < 1.25
    assert float(found.max()) < 2.2
    assert float(measure(outer().unsqueeze(0))[0, 1]) > 5.0
    assert float(measure(1e-30 * outer().unsqueeze(0))[0, 1]) == pytest.approx(
        float(measure(outer().unsqueeze(0))[0, 1]), rel=1e-3
    )


def test_gradients_without_numbers_are_unknown() -> None:
    broken = outer()
    broken[0, 0] = torch.nan
    assert (measure(torch.stack([broken, torch.full((32, 32), torch.inf)])) == -1.0).all()
    assert measure(torch.zeros(1, 32, 32)).tolist() == [[1.0, 0.0]]


def test_grid_spans_the_matrix() -> None:
    matrix = torch.arange(100.0).unsqueeze(1) * 1000 + torch.arange(64.0)
    grid = grid_of(matrix)
    assert grid.shape == (32, 32)
    assert grid[-1, -1] == 31 * 3 * 1000 + 31 * 2


# In training ----------------------------------------------------------------------------------------------------------


class Wide(nn.Module):
    """A decoder of three blocks, wide enough for grids."""

    def __init__(self, norm: Callable[[], nn.Module] = lambda: nn.LayerNorm(WIDTH)) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)
        self.blocks = nn.ModuleList(WideBlock(norm) for _ in range(3))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x)
        return logits


class WideBlock(nn.Module):
    def __init__(self, norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(), norm()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.out(F.scaled_dot_product_attention(self.q(y), self.k(y), self.v(y), is_causal=True))
        return x + self.down(self.up(self.norm2(x)).relu())


def train(model: nn.Module, spoil: Callable[[int], None] = lambda step: None, steps: int = 8, every: int = 2) -> Watch:
    """Train, with a function that changes gradients between the backward pass and the optimizer's step."""
    optimizer = adamw(model, 1e-3)
    with watch(model, optimizer, every=every) as watched:
        for step in range(1, steps + 1):
            loss = token_loss(model, some_tokens(step, 4, 16))
            loss.backward()
            spoil(step)
            optimizer.step()
            optimizer.zero_grad()
            watched.step(loss)
    return watched


def grids(watched: Watch) -> list[tuple[Grid, ...]]:
    return [sample.checks.grids for sample in watched.history.samples]


def rules(alarms: list[Alarm]) -> list[tuple[str, str]]:
    return [(alarm.rule, alarm.severity) for alarm in alarms]


def wide() -> Wide:
    torch.manual_seed(0)
    return Wide()


def test_healthy_gradients_have_no_zeros_and_are_uneven() -> None:
    for sample in grids(train(wide())):
        assert len(sample) == 6
        assert all(grid.zeros == 0.0 and grid.unevenness > 2.5 for grid in sample)
        assert all(grid.name.startswith("blocks.") for grid in sample)


def test_random_gradients_are_reported() -> None:
    model = wide()

    def spoil(step: int) -> None:
        for at, parameter in enumerate(model.parameters() if step > 10 else ()):
            assert parameter.grad is not None
            parameter.grad = normal(*parameter.shape, seed=100 * step + at)

    watched = train(model, spoil, steps=20)
    (alarm,) = [alarm for alarm in watched.alarms if alarm.rule == "gradient-noise"]
    assert (alarm.step, alarm.severity) == (14, "fail")


def test_underflow_is_reported() -> None:
    model = wide()

    def spoil(step: int) -> None:
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad = (parameter.grad * 1e-5).half().float() * 1e5

    watched = train(model, spoil, steps=24)
    assert ("gradient-underflow", "warn") in rules(watched.alarms)


def test_gradients_that_become_0_after_the_backward_pass_are_reported() -> None:
    model = wide()

    def spoil(step: int) -> None:
        for parameter in model.blocks[1].parameters() if step > 3 else ():
            assert parameter.grad is not None
            parameter.grad.zero_()

    (alarm,) = [alarm for alarm in train(model, spoil).alarms if alarm.rule == "no-gradient"]
    assert (alarm.step, alarm.severity, alarm.layer) == (6, "warn", "blocks.1")


# Weights --------------------------------------------------------------------------------------------------------------


def test_initializations_look_random_and_trained_weights_do_not() -> None:
    assert look_random([normal(64, 64), normal(300, 128)])
    assert look_random([torch.empty(64, 64).uniform_(-1, 1), nn.init.orthogonal_(torch.empty(64, 64))])
    assert look_random([normal(64, 64), torch.zeros(64, 64)])
    assert not look_random([normal(64, 64) * torch.linspace(0.5, 1.5, 64) for _ in range(3)])
    assert look_random([normal(16, 64), torch.zeros(64, 64), normal(64)]) is None


@pytest.mark.parametrize("trained", [False, True])
def test_frozen_random_weights_are_reported_when_the_watch_opens(trained: bool) -> None:
    model = wide()
    if trained:
        with torch.no_grad():
            for tensor in matrices_of(find_structure(model)):
                tensor *= torch.linspace(0.5, 1.5, tensor.shape[1])
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.ndim == 1)
    watched = train(model)
    found = [alarm for alarm in watched.alarms if alarm.rule == "frozen-weights"]
    if trained:
        assert found == []
    else:
        assert [(alarm.step, alarm.severity) for alarm in found] == [(0, "warn")]
        assert "100 % of the blocks' weights" in found[0].evidence


def test_half_of_random_weights_may_be_frozen() -> None:
    model = wide()
    model.embedding.requires_grad_(False)
    model.blocks[0].requires_grad_(False)
    assert frozen(find_structure(model), 0) == []


def test_norms_that_add_1_to_gains_of_1_are_reported() -> None:
    torch.manual_seed(0)
    doubled = Wide(lambda: RMSNorm(WIDTH, gain_offset=1.0))
    assert shifted_gains(find_structure(doubled), 0) == []  # its gains are 0
    for block in doubled.blocks:
        for norm in (block.norm1, block.norm2):
            nn.init.ones_(norm.weight)  # type: ignore[arg-type, union-attr]
    structure = find_structure(doubled)
    (alarm,) = shifted_gains(structure, 0)
    assert (alarm.rule, alarm.layer) == ("gain-scale", "blocks.0.norm1")
    assert "6 norms" in alarm.evidence
    assert shifted_gains(find_structure(wide()), 0) == []
    for parameter in doubled.parameters():  # as on a process of FSDP that holds no part of it
        if parameter.ndim == 1:
            parameter.data = parameter.data[:0]
    assert shifted_gains(structure, 0) == []


# Inputs ---------------------------------------------------------------------------------------------------------------


def test_inputs_are_measured_without_masks_and_labels() -> None:
    image, tokens = torch.full((2, 3, 4), 2.0), torch.ones(2, 3, dtype=torch.int64)
    found = sizes_of((image, tokens), {"attention_mask": torch.ones(2, 9), "labels": torch.ones(2, 9)})
    assert len(found) == 1
    assert float(rms_of(found)) == pytest.approx(2.0)
    assert float(rms_of([torch.full((9,), 3.0), torch.full((16,), 4.0)])) == pytest.approx((13.48) ** 0.5)


class FromNumbers(nn.Module):
    """A decoder of numbers instead of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Decoder()
        self.inner.embedding = nn.Linear(1, 16)  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return y


def test_size_of_the_inputs_is_recorded_in_every_step() -> None:
    torch.manual_seed(0)
    model = FromNumbers()
    optimizer = adamw(model)
    with watch(model, optimizer, every=4) as watched:
        for step in range(1, 13):
            scale = 100.0 if step > 8 else 1.0
            for part in range(2):  # the second micro-batch does not count
                loss = model(scale * (1 + part) * torch.ones(2, 5, 1)).square().mean()
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            watched.step(loss)
    checks = [step.checks for step in watched.history.steps]
    assert [each.input for each in checks if each] == pytest.approx([1.0] * 8 + [100.0] * 4)
    assert ("input-scale", "fail") in rules(watched.alarms)
    (early,) = {tuple(name for name, _ in each.before_blocks) for each in checks if each}
    assert early == ("inner.embedding",)


def test_models_of_tokens_have_no_input_size() -> None:
    watched = train(copy.deepcopy(wide()))
    assert {step.checks.input for step in watched.history.steps if step.checks} == {None}
    assert [tuple(name for name, _ in step.checks.before_blocks) for step in watched.history.steps if step.checks] == [
        ("embedding",)
    ] * 8


def test_fp16_autocast_without_a_scaler_is_reported() -> None:
    model = wide()
    optimizer = adamw(model, 1e-3)
    with watch(model, optimizer, every=2) as watched:
        for step in range(1, 25):
            tokens = some_tokens(step, 4, 16)
            with torch.autocast("cpu", torch.float16):
                # The mean over 64 tokens divides gradients by 64, as one over a batch of usual size by 1e5 to 1e6.
                loss = 1e-4 * token_loss(model, tokens)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            watched.step(loss)
    found = [alarm for alarm in watched.alarms if alarm.rule == "gradient-underflow"]
    assert [alarm.severity for alarm in found] == ["warn"]
