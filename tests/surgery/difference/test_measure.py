"""Relative differences: of values, of non-finite ones, and without padding."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from omninorm.surgery.difference.measure import Rows, between, padding_of, relative

INF, NAN = math.inf, math.nan


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([3.0, 4.0], [3.0, 4.0], 0.0),
        ([3.0, 4.0], [3.0, 4.5], 0.1),
        ([0.0, 0.0], [3.0, 4.0], 1.0),
        ([3.0, 4.0], [0.0, 0.0], 1.0),
        ([0.0], [0.0], 0.0),
        ([], [], 0.0),
        ([3e300, 4e300], [3e300, 4.5e300], 0.1),
        ([3e-300, 4e-300], [3e-300, 4.5e-300], 0.1),
        ([INF, 3.0, 4.0], [INF, 3.0, 4.5], 0.1),
        ([-INF, 2.0], [INF, 2.0], INF),
        ([1.0], [INF], INF),
        ([NAN], [NAN], INF),
        ([1.0, 2.0], [1.0, NAN], INF),
        ([NAN, 2.0], [1.0, 2.0], INF),
        ([1.0, 2.0], [1.0], INF),
    ],
)
def test_relative_difference_of_two_tensors(a: list[float], b: list[float], expected: float) -> None:
    one, other = (torch.tensor(each, dtype=torch.float64) for each in (a, b))
    assert relative(one, other) == pytest.approx(expected, rel=1e-12)


def test_integers_and_truth_values_are_compared_as_well() -> None:
    assert relative(torch.tensor([3, 4]), torch.tensor([3, 4])) == 0.0
    assert relative(torch.tensor([3, 4]), torch.tensor([3, 9])) == 1.0
    assert relative(torch.tensor([True, False]), torch.tensor([True, True])) == 1.0


def test_the_largest_numbers_of_a_dtype_do_not_overflow() -> None:
    least = torch.finfo(torch.float64).min
    one, other = (torch.tensor(each, dtype=torch.float64) for each in ([least, 0.0], [0.0, least]))
    assert (relative(one, one), relative(one, other)) == (0.0, pytest.approx(2**0.5))


def test_outputs_of_other_names_are_compared_by_their_main_one() -> None:
    x, y = torch.tensor([1.0]), torch.tensor([2.0])
    assert between({"a": x, "b": x}, {"a": x, "b": y}) == 1.0
    assert between({"loss": y, "logits": x}, {"output": x}) == 0.0
    assert between({"output": x}, {}) == INF


REAL = torch.tensor([[True, True, False], [False, True, True]])


@pytest.mark.parametrize(
    "x",
    [
        torch.where(REAL, 1.0, NAN),
        torch.where(REAL[:, :, None], 1.0, NAN).expand(2, 3, 5),
        torch.where(REAL[:, None, :, None], 1.0, NAN).expand(2, 4, 3, 5),
        torch.where(REAL[:, :, None], 1.0, NAN).expand(2, 3, 5).reshape(6, 5),
    ],
    ids=["tokens", "features", "heads", "flattened"],
)
def test_padding_is_left_out_of_every_layout(x: Tensor) -> None:
    kept = Rows(REAL)(x)
    assert kept.numel() == x.numel() * 4 // 6
    assert bool((kept == 1.0).all())


def test_other_shapes_are_kept_whole() -> None:
    for shape in ((7,), (5, 4), (3, 2, 4)):
        assert Rows(REAL)(torch.ones(shape)).shape == shape


def test_stored_rows_are_evenly_spaced_and_limited() -> None:
    x = torch.arange(10.0).view(10, 1)
    assert Rows(None, 4)(x).flatten().tolist() == [0, 3, 6, 9]
    assert Rows(None, 10)(x).shape == (10, 1)
    assert Rows(None, 3)(torch.ones(2, 5, 7)).shape == (3, 7)


@pytest.mark.parametrize(
    ("probe", "expected"),
    [
        (torch.ones(2, 3), None),
        ({"input_ids": torch.ones(2, 3)}, None),
        ({"attention_mask": torch.ones(2, 3, dtype=torch.long)}, None),
        ({"attention_mask": torch.zeros(2, 1, 3, 3, dtype=torch.long)}, None),
        ({"attention_mask": REAL.float()}, None),
        ({"attention_mask": REAL.long()}, REAL),
        ({"attention_mask": REAL}, REAL),
    ],
)
def test_padding_is_read_from_the_attention_mask(probe: object, expected: Tensor | None) -> None:
    found = padding_of(probe)
    assert found is expected or (found is not None and expected is not None and torch.equal(found, expected))
