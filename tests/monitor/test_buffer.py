"""The buffer between the hooks and the host: what it refuses, keeps, and copies."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from helpers.watched_models import Decoder, adamw, some_tokens, token_loss
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from omninorm.monitor import stats_buffer, tensors, watch
from omninorm.monitor.probes.elements import any_some
from omninorm.monitor.stats_buffer import StatsBuffer


def buffer(sentinels: int = 3, rows: int = 4) -> StatsBuffer:
    return StatsBuffer(torch.device("cpu"), {"stream_ms": 2, "stream_max": 2}, sentinels, 1, rows)


def fake() -> Tensor:
    with FakeTensorMode():
        return torch.ones(())


def wrapped() -> Tensor:
    """Return a tensor that has left the function transform in which it was made."""
    found: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        found.append(x)
        return x

    torch.func.vmap(keep)(torch.ones(2))
    return found[0]


@pytest.mark.parametrize("make", [fake, wrapped, lambda: torch.ones((), device="meta")])
def test_values_without_numbers_are_left_out(make) -> None:  # type: ignore[no-untyped-def]
    """Like those of a forward pass that only counts operations."""
    it = buffer()
    for key, add in (("stream_ms", it.add), ("stream_max", it.peak)):
        add(key, 0, torch.tensor(2.0))
        add(key, 0, make())
        add(key, 1, make())
    it.sentinel(0, torch.tensor([-3.0, 1.0]))
    it.sentinel(1, make())
    it.measure()
    it.end_row(torch.tensor(5.0))
    cells, (row,), _ = it.take()
    assert cells == {"stream_ms": [2.0, None], "stream_max": [2.0, None]}
    assert (row.sentinels, row.loss) == ([3.0, -1.0, -1.0], 5.0)


def test_values_for_several_places_are_added_up_and_their_largest_kept() -> None:
    it = buffer()
    it.add("stream_ms", (1, 0), torch.tensor([1.0, 2.0]))
    it.add("stream_ms", 0, torch.tensor(4.0, dtype=torch.float64))
    it.peak("stream_max", (0, 1), torch.tensor([5.0, 6.0]))
    it.peak("stream_max", 1, torch.tensor(9.0, dtype=torch.float16))
    it.peak("stream_max", (1, 0), torch.tensor([7.0, 3.0]))
    it.end_row(None)
    assert it.take()[0] == {"stream_ms": [3.0, 1.0], "stream_max": [5.0, 9.0]}


def test_row_ends_although_a_value_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Tensor:
        raise RuntimeError("out of memory")

    it = buffer()
    it.sentinel(0, torch.zeros(2))
    it.measure()
    with monkeypatch.context() as patch:
        patch.setattr(stats_buffer, "stack", fails)
        with pytest.raises(RuntimeError, match="out of memory"):
            it.end_row(torch.tensor(1.0))
    it.sentinel(0, torch.tensor([-3.0, 1.0]))
    it.measure()
    it.end_row(torch.tensor(2.0))
    rows = it.take()[1]
    assert [(row.loss, row.sentinels[0]) for row in rows] == [(1.0, -1.0), (2.0, 3.0)]


def test_forward_pass_with_fake_tensors_leaves_the_steps_alone(recwarn: pytest.WarningsRecorder) -> None:
    torch.manual_seed(0)
    model = Decoder()
    optimizer = adamw(model)
    with watch(model, optimizer, every=2, rules=[]) as watched:
        for step in range(1, 6):
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                model(mode.from_tensor(some_tokens(step)))
            loss = token_loss(model, some_tokens(step))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            watched.step(loss)
    assert [step.step for step in watched.history.steps] == [1, 2, 3, 4, 5]
    assert all(step.loss is not None and step.grad_norm > 0 for step in watched.history.steps)
    assert [str(warning.message) for warning in recwarn if "could not measure" in str(warning.message)] == []


def test_constant_made_with_fake_tensors_is_not_kept() -> None:
    places, device = (3.0, 1.0, 4.0, 1.0, 5.0), torch.device("cpu")
    with FakeTensorMode():
        tensors.constant(places, device)
    assert tensors.constant(places, device).tolist() == list(places)
    assert tensors.constant(places, device) is tensors.constant(places, device)


def test_peaks_of_modules_that_run_several_times_or_in_several_dtypes() -> None:
    it = buffer(4)
    it.sentinel(0, torch.tensor([-1.0, 2.0]))
    it.sentinel(2, torch.tensor([-7.0, -6.0], dtype=torch.bfloat16))
    it.sentinel(3, torch.tensor([0.0, 0.0]))
    it.sentinel(0, torch.tensor([-0.5, 0.25]))
    it.measure()
    it.end_row(None)
    it.sentinel(0, torch.tensor([torch.nan, 0.0]))
    it.sentinel(0, torch.tensor([1.0, 2.0]))
    it.measure()
    it.end_row(None)
    first, second = it.take()[1]
    assert first.sentinels == [2.0, -1.0, 7.0, 0.0]
    assert second.sentinels[0] != second.sentinels[0]
    assert second.sentinels[1:] == [-1.0] * 3


class Dropped(nn.Module):
    """A block that a LayerDrop may skip."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block, self.skip = block, False

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return x if self.skip else self.block(x, mask)


def test_steps_in_which_different_blocks_run_copy_no_list_to_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Decoder(blocks=3)
    wrapped = [Dropped(block) for block in model.blocks]
    model.blocks = nn.ModuleList(wrapped)
    made: list[object] = []
    create = torch.tensor

    def note(values: object, **options: Any) -> Tensor:
        made.append(values)
        return create(values, **options)

    monkeypatch.setattr(torch, "tensor", note)
    optimizer = adamw(model)
    with watch(model, optimizer, every=100, rules=[]) as watched:
        for step in range(1, 12):
            for at, block in enumerate(wrapped):
                block.skip = at == step % 4
            loss = token_loss(model, some_tokens(step))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            watched.step(loss)
            if step == 1:
                made.clear()
        lists = [values for values in made if isinstance(values, tuple)]  # AdamW makes tensors of numbers
    assert len(watched.history.steps) == 11
    assert lists == []


def test_flush_within_a_step_keeps_what_the_step_has_added() -> None:
    it = buffer()
    it.end_row(None)
    it.add_fact("kept", torch.tensor(2.0))
    it.take()
    it.add_fact("kept", torch.tensor(3.0))
    it.end_row(None)
    (row,) = it.take()[1]
    assert row.facts["kept"] == 5.0


@pytest.mark.parametrize(
    "weight",
    [
        torch.randn(300, 200),
        torch.randn(300, 200).t(),
        torch.randn(8, 16, 3, 3).to(memory_format=torch.channels_last),
        torch.randn(40, 40)[10:],
        torch.tensor(3.0),
    ],
)
def test_some_weights_are_a_view_in_any_layout(weight: Tensor) -> None:
    few = any_some(weight)
    assert few.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
    assert set(few.tolist()) <= set(weight.flatten().tolist())
    assert len(set(few.tolist())) == len(few) >= min(weight.numel(), 60)


def test_some_weights_with_gaps_in_memory_are_copied() -> None:
    weight = torch.randn(40, 40)[:, :10]
    assert set(any_some(weight).tolist()) <= set(weight.flatten().tolist())


def test_watch_does_not_keep_the_memory_of_weights_that_have_moved() -> None:
    model = Decoder()
    optimizer = adamw(model)
    with watch(model, optimizer, every=2, rules=[]) as watched:
        for step in (1, 2, 3):
            token_loss(model, some_tokens(step)).backward()
            optimizer.step()
            watched.step()
        memory = weakref.ref(model.head.weight.untyped_storage())
        model.head.weight.data = model.head.weight.detach().clone()
        optimizer.zero_grad()
        assert memory() is None
