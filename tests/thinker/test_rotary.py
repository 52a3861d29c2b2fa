"""RoPE against its definition as a rotation of complex numbers, in float64."""

import math

import pytest
import torch

from omninorm.thinker.rotary import Rotary, rotate


def rotated(x, position, theta):
    """One head vector: pair (x_i, x_{i+h/2}) as a complex number times e^(i·angle)."""
    half = len(x) // 2
    y = [0.0] * len(x)
    for i in range(half):
        angle = position * theta ** (-2 * i / len(x))
        z = complex(x[i], x[i + half]) * complex(math.cos(angle), math.sin(angle))
        y[i], y[i + half] = z.real, z.imag
    return y


@pytest.mark.parametrize("theta", [10000.0, 3.0])
def test_rotation_is_the_definition(theta):
    x = torch.randn(2, 30, 3, 6, dtype=torch.float64)
    got = rotate(x, Rotary(6, 50, theta)(5, 35))
    want = [[[rotated(x[b, t, h].tolist(), 5 + t, theta) for h in range(3)] for t in range(30)] for b in range(2)]
    # The tables are float32: an angle below 35 is off by up to 35 · 2^-23 or so.
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=0, atol=2e-5)


def test_padding_shifts_the_positions_of_its_row():
    rotary = Rotary(4, 20, 100.0)
    x = torch.randn(2, 7, 1, 4)
    got = rotate(x, rotary(3, 10, torch.tensor([0, 3])))
    assert torch.equal(got[:1], rotate(x[:1], rotary(3, 10)))
    assert torch.equal(got[1:], rotate(x[1:], rotary(0, 7)))


def test_scores_depend_only_on_the_distance():
    rotary = Rotary(8, 64, 10000.0)
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)
    scores = [(rotate(q, rotary(p + 5, p + 6)) * rotate(k, rotary(p, p + 1))).sum().item() for p in range(0, 58, 7)]
    assert max(scores) - min(scores) < 1e-5
    assert abs(scores[0] - (q * k).sum().item()) > 1e-2


def test_tables_stay_float32_and_defined_through_casts_and_moves():
    rotary = Rotary(8, 16, 10000.0)
    fresh = rotary.cos.clone(), rotary.sin.clone()
    for changed in (rotary.to(torch.bfloat16), rotary.double(), rotary.to("meta").to_empty(device="cpu")):
        assert torch.equal(changed.cos, fresh[0])
        assert torch.equal(changed.sin, fresh[1])
    assert rotary.state_dict() == {}


def test_a_rotated_bfloat16_stays_bfloat16():
    x = torch.randn(1, 4, 2, 8).bfloat16()
    got = rotate(x, Rotary(8, 4, 10000.0)(0, 4))
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), rotate(x.float(), Rotary(8, 4, 10000.0)(0, 4)), rtol=2**-7, atol=2**-6)


def test_a_long_table_grows_when_its_positions_are_used():
    whole, grown = Rotary(4, 9000, 100.0), Rotary(4, 10**9, 100.0)
    assert len(grown.cos) == 8192
    with torch.inference_mode():
        for start, stop in ((0, 8192), (8190, 8195), (8990, 9000)):
            for ours, theirs in zip(grown(start, stop), whole(start, stop), strict=True):
                assert torch.equal(ours, theirs)
    assert 9000 <= len(grown.cos) <= 2 * 8192
    # Not inference tensors, which could not be used in training.
    assert not grown.cos.is_inference()
    assert len(grown.double().cos) == len(grown.cos)
    x = torch.randn(1, 2, 1, 4, requires_grad=True)
    rotate(x, grown(8500, 8502)).sum().backward()
    assert x.grad is not None
