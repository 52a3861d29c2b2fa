"""The optimizers of training: what is decayed, and which parameters Muon steps, how far, and with which state."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from omninorm import NormConfig, Thinker, ThinkerConfig
from omninorm.errors import ConfigError
from omninorm.experiments import TrainConfig, build_optimizer

MUON = TrainConfig(optimizer="muon", lr=0.01, weight_decay=0.0)


def thinker(placement: str = "pre", **settings: bool) -> Thinker:
    norm = NormConfig("rmsnorm", placement)
    return Thinker(ThinkerConfig(d_model=16, n_layers=2, n_heads=2, max_seq_len=16, norm=norm, **settings))


def groups_by_name(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[set[str], set[str]]:
    """The names of the parameters in Muon's groups and in AdamW's."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: tuple[set[str], set[str]] = (set(), set())
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            found["betas" in group].add(names.pop(id(parameter)))
    assert not names
    return found


def give_gradients(model: nn.Module, seed: int = 0) -> None:
    numbers = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=numbers)


def test_decay_shrinks_a_matrix_and_leaves_a_gain():
    model = nn.Sequential(nn.Linear(4, 4), nn.RMSNorm(4))
    optimizer = build_optimizer(model, TrainConfig(lr=0.5, weight_decay=0.1))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    weight, bias, gain = (parameter.detach() for parameter in model.parameters())
    # AdamW with a zero gradient: w ← (1 − lr·λ)·w, here 0.95·w, rounded once.
    torch.testing.assert_close(weight, before[0] * 0.95, rtol=2**-23, atol=0)
    assert torch.equal(bias, before[1])
    assert torch.equal(gain, before[2])


def test_decay_of_norms_shrinks_their_gains():
    model = nn.Sequential(nn.Linear(4, 4), nn.RMSNorm(4))
    optimizer = build_optimizer(model, TrainConfig(lr=0.5, weight_decay=0.1, decay_norms=True))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(model[1].weight.detach(), torch.full((4,), 0.95), rtol=2**-23, atol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_muon_gets_the_matrices_between_the_embedding_and_the_output_layer(tied):
    model = thinker(tied_head=tied)
    by_muon, by_adamw = groups_by_name(model, build_optimizer(model, MUON))
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert by_muon == linear - {"head.weight"}
    assert {name for name in by_adamw if "norm" not in name} == {"embedding.weight"} | linear & {"head.weight"}


def test_muon_leaves_gates_of_streams_to_adamw():
    model = thinker("mhc")
    by_muon, _ = groups_by_name(model, build_optimizer(model, MUON))
    assert by_muon == {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}


@pytest.mark.parametrize("shape", [(16, 16), (8, 32), (32, 8)])
def test_an_update_of_muon_is_the_nearest_matrix_of_equal_singular_values_as_large_as_adamws(shape):
    rows, columns = shape
    model = nn.Sequential(nn.Linear(columns, rows, bias=False))
    optimizer = build_optimizer(model, MUON)
    before = model[0].weight.detach().clone()
    give_gradients(model)
    gradient = model[0].weight.grad.double()
    optimizer.step()
    step = (before - model[0].weight.detach()).double() / MUON.lr
    u, _, v = torch.linalg.svd(gradient, full_matrices=False)
    scale = 0.2 * max(shape) ** 0.5
    found = torch.linalg.svdvals(step) / scale
    assert 0.5 < float(found.min()) <= float(found.max()) < 1.5  # five iterations get this near to 1
    assert float((step * (u @ v)).sum() / step.norm() / (u @ v).norm()) > 0.97
    # Singular values of 1 make a root mean square of 1/√(larger side), so 0.2 after scaling, about that of Adam.
    assert 0.1 < float(step.square().mean().sqrt()) < 0.3


def test_other_parameters_move_as_with_adamw():
    model = thinker()
    twin = copy.deepcopy(model)
    both = build_optimizer(model, MUON), build_optimizer(twin, TrainConfig(lr=0.01, weight_decay=0.0))
    for step in range(3):
        give_gradients(model, step)
        give_gradients(twin, step)
        for optimizer in both:
            for group in optimizer.param_groups:
                group["lr"] = 0.01 / (step + 1)
            optimizer.step()
    _, by_adamw = groups_by_name(model, both[0])
    theirs = dict(twin.named_parameters())
    assert by_adamw
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, theirs[name]) == (name in by_adamw), name


def test_the_learning_rate_and_decay_of_groups_are_obeyed_by_muon():
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    optimizer = build_optimizer(model, TrainConfig(optimizer="muon", lr=0.01, weight_decay=0.1))
    before = model[0].weight.detach().clone()
    model[0].weight.grad = torch.zeros(4, 4)
    optimizer.param_groups[0]["lr"] = 0.5
    optimizer.step()
    torch.testing.assert_close(model[0].weight.detach(), before * 0.95, rtol=2**-22, atol=0)


def test_a_loaded_state_continues_as_the_saved_one():
    model = thinker()
    optimizer = build_optimizer(model, MUON)
    give_gradients(model, 1)
    optimizer.step()
    twin = copy.deepcopy(model)
    fresh = build_optimizer(twin, MUON)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, its in ((model, optimizer), (twin, fresh)):
        give_gradients(each, 2)
        its.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_a_closure_is_called_with_gradients_and_its_loss_returned():
    model = nn.Sequential(nn.Linear(4, 4))
    optimizer = build_optimizer(model, MUON)

    def closure() -> torch.Tensor:
        loss = model(torch.ones(1, 4)).sum()
        loss.backward()
        return loss

    before, expected = model[0].weight.detach().clone(), model(torch.ones(1, 4)).sum().item()
    assert optimizer.step(closure).item() == expected
    assert not torch.equal(model[0].weight, before)


def test_muon_without_a_hidden_matrix_is_refused():
    with pytest.raises(ConfigError, match="Muon needs a matrix between the embeddings and the output layer"):
        build_optimizer(nn.Sequential(nn.Embedding(8, 4), nn.RMSNorm(4), nn.Linear(4, 8)), MUON)
