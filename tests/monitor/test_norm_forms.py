"""Statistics of norms of every form against their definitions: over their own dimension, with gates and groups."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.watched_models import WIDTH, Decoder, adamw, close_to, perturbed, signal, some_tokens, token_loss
from torch import Tensor, nn

from omninorm.monitor import Watch, watch
from omninorm.monitor.model_map.norms import Recognizer
from omninorm.monitor.model_map.structure import find_structure

EPS = 0.05


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of images, as in timm and ConvNeXt."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(x.movedim(1, -1), self.normalized_shape, self.weight, self.bias, self.eps)
        return y.movedim(-1, 1)


class GatedNorm(nn.Module):
    """RMSNorm over groups of features; a gate multiplies its input or its output."""

    def __init__(self, groups: int = 1, first: bool = False) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.rand(WIDTH) + 0.5), EPS
        self.groups, self.first = groups, first

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        if gate is not None and self.first:
            x = x * F.silu(gate)
        y = x.unflatten(-1, (self.groups, -1))
        y = (y * (y.square().mean(-1, keepdim=True) + self.eps).rsqrt()).flatten(-2) * self.weight
        return y if gate is None or self.first else y * F.silu(gate)


class Weightless(nn.Module):
    """As OLMo and NanoChat normalize."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), eps=EPS)


class OneGain(nn.Module):
    """ScaleNorm as in x-transformers, with the gain stored as γ − 1."""

    def __init__(self) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) * x.shape[-1] ** 0.5 * (self.g + 1)


def watched_norm(norm: nn.Module, *inputs: Tensor) -> Watch:
    """Watch one step of a model that is a norm alone."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.scale = norm, nn.Parameter(torch.ones(()))

        def forward(self, *tensors: Tensor) -> Tensor:
            return self.norm(*tensors) * self.scale

    model = Model()
    with watch(model, every=1, rules=[]) as watched:
        model(*inputs).square().mean().backward()
        watched.step()
    return watched


def share(square: Tensor) -> Tensor:
    return (EPS / (square + EPS)).mean()


def test_channel_norm_is_measured_over_channels() -> None:
    x = torch.randn(2, WIDTH, 3, 5, dtype=torch.float64).float() * torch.linspace(0.1, 3, 5)
    watched = watched_norm(ChannelNorm(WIDTH, eps=EPS), x)
    double = x.double()
    close_to(signal(watched, "eps_share"), [share(double.var(1, correction=0))])
    close_to(signal(watched, "mean_share"), [(double.mean(1) ** 2 / double.square().mean(1)).mean()])
    assert "noise_scale" not in watched.history.samples[-1].signals


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("first", [True, False])
def test_gated_norm_is_measured_where_it_normalizes(groups: int, first: bool) -> None:
    x, gate = torch.randn(2, 3, 5, WIDTH).unbind()
    gate = 3 * gate
    watched = watched_norm(GatedNorm(groups, first), x, gate)
    read = (x * F.silu(gate) if first else x).double()
    square = read.unflatten(-1, (groups, -1)).square().mean(-1)
    close_to(signal(watched, "eps_share"), [share(square)])
    close_to(signal(watched, "norm_rms"), [square.mean().sqrt()])


def test_norm_without_parameters_is_measured() -> None:
    x = torch.randn(3, 5, WIDTH)
    watched = watched_norm(Weightless(), x)
    close_to(signal(watched, "eps_share"), [share(x.double().square().mean(-1))])
    assert "gain_max" not in watched.history.samples[-1].signals
    assert watched.history.facts.norms[0].kind == "Weightless"


def test_single_gain_stored_as_an_offset_is_not_zero() -> None:
    """The stored number is 0 at the beginning, but the gain is 1."""
    watched = watched_norm(OneGain(), torch.randn(3, 5, WIDTH))
    assert signal(watched, "gain_max") == [1.0]
    assert signal(watched, "gain_small") == [0.0]
    assert watched.history.facts.norms[0].eps is None


def test_norm_with_an_activation_is_not_measured() -> None:
    """It is LayerNorm by its class, but the dimension that it normalizes cannot be identified."""

    class Activated(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).relu()

    watched = watched_norm(Activated(WIDTH), torch.randn(3, 5, WIDTH))
    assert [norm.kind for norm in watched.history.facts.norms] == ["Activated"]
    assert "eps_share" not in watched.history.samples[-1].signals


def test_noise_scale_of_a_gated_norm_matches_the_plain_norm() -> None:
    """∂loss/∂γ of each example is the same if the gate is a constant that the loss divides out."""
    x = torch.randn(3, 5, WIDTH)
    torch.manual_seed(0)
    norm = GatedNorm()
    wanted = signal(watched_norm(norm, x), "noise_scale")
    gate = torch.full_like(x, 3.0)
    close_to(signal(watched_norm(norm, x, gate), "noise_scale"), wanted, rel=1e-4)


@pytest.mark.parametrize("norm", [Weightless, OneGain, GatedNorm])
def test_training_is_unchanged(norm: Any) -> None:
    def run(watching: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = perturbed(Decoder(norm))
        optimizer = adamw(model)
        with watch(model, optimizer, every=2, rules=[]) if watching else torch.enable_grad() as watched:
            for step in range(1, 5):
                loss = token_loss(model, some_tokens(step))
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                if watching:
                    watched.step(loss)
        return [parameter.detach() for parameter in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(run(True), run(False), strict=True))


def test_each_kind_is_probed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from omninorm.monitor.model_map import norms

    probed: list[str] = []
    original = norms.recognize

    def counted(module: nn.Module) -> Any:
        probed.append(type(module).__name__)
        return original(module)

    monkeypatch.setattr(norms, "recognize", counted)
    model = nn.Sequential(*(nn.Sequential(GatedNorm(), GatedNorm(groups=2), OneGain()) for _ in range(8)))
    assert len(Recognizer().find(model)) == 24
    assert sorted(probed) == ["GatedNorm", "GatedNorm", "OneGain"]


def test_norm_that_cannot_be_probed_is_recognized_by_its_name() -> None:
    """For example because it needs a GPU."""

    class KernelRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(WIDTH)), 1e-6

        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("needs a GPU")

    (norm,) = find_structure(nn.Sequential(KernelRMSNorm())).norms
    assert (norm.facts.kind, norm.facts.eps, norm.centred) == ("KernelRMSNorm", 1e-6, False)
    assert norm.gain is norm.module.weight
