"""The elements of large tensors that are measured, and the norms that PyTorch computes to clip gradients."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from helpers.watched_models import Decoder, adamw, some_tokens, token_loss
from torch import nn

from omninorm.monitor import watch
from omninorm.monitor.hooks.hook import Hook
from omninorm.monitor.probes.block import Copies
from omninorm.monitor.probes.elements import EVERY_STEP, Views, are_finite, packed, row_norms, runs, together
from omninorm.monitor.session import Watch
from omninorm.monitor.writer import short


def test_runs_of_a_large_tensor_are_1024_different_elements_of_many_rows_and_columns() -> None:
    x = torch.arange(300 * 200, dtype=torch.float64).reshape(300, 200)
    found = runs(x).flatten().long()
    assert found.unique().numel() == 1024
    assert (found // 200).unique().numel() > 100
    assert (found % 200).unique().numel() > 150


@pytest.mark.parametrize("count", [1, 1023, 1024])
def test_runs_of_a_small_tensor_are_all_elements(count: int) -> None:
    assert torch.equal(runs(torch.arange(float(count))), torch.arange(float(count)))


def test_together_keeps_the_places_and_values_of_tensors_of_different_sizes() -> None:
    tensors = {7: torch.full((40, 50), 2.0), 1: torch.full((3,), 3.0), 4: torch.full((60, 50), 4.0), 2: torch.zeros(0)}
    found = {
        place: float(norm)
        for group in together(tensors)
        for place, norm in zip(group.places, row_norms(group.values), strict=True)
    }
    assert found == pytest.approx({7: 2.0 * 1024**0.5, 1: 3.0 * 3**0.5, 4: 4.0 * 1024**0.5})


def test_row_norms_of_large_float32_numbers_do_not_overflow() -> None:
    assert float(row_norms(torch.full((1, 4), 1e30))[0]) == pytest.approx(2e30)


def test_views_follow_a_weight_that_is_replaced_by_one_of_another_layout() -> None:
    weight = nn.Parameter(torch.zeros(40, 50))
    views = Views([weight])
    with torch.no_grad():
        assert not views.take()[0].any()
        weight.data = torch.full((50, 90), 3.0)[:, ::2]
        assert views.take()[0].eq(3.0).all()


@pytest.mark.parametrize("count", [1, EVERY_STEP - 1, EVERY_STEP, 100, 128, 3000, 2**16])
def test_views_hold_64_elements_of_all_parts_of_a_weight_or_all_of_a_smaller_one(count: int) -> None:
    weight = nn.Parameter(torch.arange(float(count)))
    views = Views([weight])
    with torch.no_grad():
        first, again = views.take()[0].clone(), views.take()[0]
    assert torch.equal(first, again)
    assert len(set(first.tolist())) == (count if count < 2 * EVERY_STEP else EVERY_STEP)
    assert float(first.max()) > 0.97 * count - 2


def test_views_follow_a_weight_that_shrinks_in_its_memory() -> None:
    weight = nn.Parameter(torch.ones(300, 2))
    views = Views([weight])
    with torch.no_grad():
        views.take()
        weight.data = weight.data[:20]
        assert views.take()[0].numel() == 40


def test_packed_parts_keep_their_numbers_and_are_rows_if_they_are_equally_long() -> None:
    parts = [torch.arange(12.0)[::3], torch.arange(20.0)[::5]]
    rows = packed(parts)
    assert isinstance(rows, torch.Tensor)
    assert rows.tolist() == [[0.0, 3.0, 6.0, 9.0], [0.0, 5.0, 10.0, 15.0]]
    assert [part.tolist() for part in packed([parts[0], torch.ones(2)])] == [[0.0, 3.0, 6.0, 9.0], [1.0, 1.0]]
    assert [part.dtype for part in packed([torch.ones(2), torch.ones(2).bfloat16()])] == [torch.float32, torch.bfloat16]


def test_rows_of_the_last_tensor_are_copied_again_only_after_a_change() -> None:
    copies, x = Copies(), torch.ones(3, 2)
    first = copies.rows(x)
    assert copies.rows(x) is first
    x.add_(1.0)
    assert copies.rows(x).eq(2.0).all()
    assert copies.rows(x.clone()).eq(2.0).all()
    assert first.eq(1.0).all()


def test_numbers_are_rounded_to_four_digits_in_their_places() -> None:
    found = short([None, 123456.0, 1.00005e-20, math.inf, None, -0.0, 2])
    assert found == [None, 123500.0, 1e-20, math.inf, None, 0.0, 2.0]
    assert math.isnan(short([math.nan])[0] or 0.0)
    assert short([None]) == [None]


@pytest.mark.parametrize(("value", "finite"), [(1.0, True), (math.nan, False), (-math.inf, False)])
def test_one_number_that_is_not_finite_is_found_among_tensors_of_two_dtypes(value: float, finite: bool) -> None:
    tensors = [torch.ones(5), torch.tensor([2.0, value], dtype=torch.bfloat16)]
    assert are_finite(tensors) is finite


def trained(clip: bool = True) -> tuple[Watch, list[float]]:
    """Train for ten steps, sampled every five, and return the watch and the norms of the gradients in float64."""
    model = Decoder()
    optimizer = adamw(model)
    wanted = []
    with watch(model, optimizer, every=5, rules=[]) as watched:
        for step in range(1, 11):
            token_loss(model, some_tokens(step)).backward()
            gradients = [p.grad.double().flatten() for p in model.parameters() if p.grad is not None]
            wanted.append(float(torch.cat(gradients).norm()))
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            optimizer.step()
            optimizer.zero_grad()
            watched.step()
    return watched, wanted


@pytest.mark.parametrize("clip", [True, False])
def test_gradient_norms_are_those_before_clipping_in_every_step(clip: bool) -> None:
    watched, wanted = trained(clip=clip)
    assert [step.grad_norm for step in watched.history.steps] == pytest.approx(wanted, rel=1e-5)


def test_gradients_are_not_read_again_in_unsampled_steps_if_they_are_clipped(monkeypatch: pytest.MonkeyPatch) -> None:
    from omninorm.monitor.probes.gradients import Gradients

    calls, norms = [], Gradients.norms
    monkeypatch.setattr(Gradients, "norms", lambda self: calls.append(self._buffer.sampling) or norms(self))
    trained(clip=True)
    assert calls == [True, True, True]  # steps 1, 5 and 10
    calls.clear()
    trained(clip=False)
    assert len(calls) == 10


def norms_are_those_after_backward(before_update: Callable[[nn.Module, int], object]) -> None:
    """Check the recorded norms of four steps in which `before_update` changes the gradients of some."""
    model = Decoder()
    optimizer = adamw(model)
    wanted = []
    with watch(model, optimizer, every=5, rules=[]) as watched:
        for step in range(1, 5):
            token_loss(model, some_tokens(step)).backward()
            wanted.append(float(torch.cat([p.grad.double().flatten() for p in model.parameters()]).norm()))
            before_update(model, step)
            optimizer.step()
            optimizer.zero_grad()
            watched.step()
    assert [step.grad_norm for step in watched.history.steps] == pytest.approx(wanted, rel=1e-5)


def test_loop_that_stops_clipping_still_gets_the_norm_of_every_step() -> None:
    norms_are_those_after_backward(lambda model, step: step < 3 and nn.utils.clip_grad_norm_(model.parameters(), 1e-3))


def test_gradients_that_are_changed_before_clipping_are_measured_as_backward_left_them() -> None:
    def halve_and_clip(model: nn.Module, step: int) -> None:
        for parameter in model.parameters():
            parameter.grad.mul_(0.5)
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)

    norms_are_those_after_backward(halve_and_clip)


def hooks_of(model: nn.Module) -> int:
    return sum(
        isinstance(hook, Hook)
        for module in model.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    )


def test_hooks_that_only_samples_need_are_removed_after_a_sample_and_at_the_end() -> None:
    model = Decoder()
    optimizer = adamw(model)
    counts = []
    with watch(model, optimizer, every=3, rules=[]) as watched:
        for step in range(1, 7):
            counts.append(hooks_of(model))
            token_loss(model, some_tokens(step)).backward()
            optimizer.step()
            watched.step()
    assert counts[0] == counts[2] == counts[5] > counts[1] == counts[3] == counts[4] > 0
    assert hooks_of(model) == 0
