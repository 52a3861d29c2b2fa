"""Proofs cover the whole model: every output, every expert, both modes; what no run reached is named and refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import zoo
from torch import Tensor, nn

from omninorm.errors import InputError
from omninorm.surgery import center, fold_gains, verify

IDS = torch.arange(12).view(2, 6)


class Base(nn.Module):
    """An embedding, a norm whose gain is not 1, and two linear layers."""

    def __init__(self, norm: Callable[[int], nn.Module] = nn.RMSNorm) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.norm = nn.Embedding(12, 8), norm(8)
        self.value, self.head = nn.Linear(8, 3), nn.Linear(8, 12)
        for parameter in self.norm.parameters():
            nn.init.uniform_(parameter, 0.5, 2.0)

    def normed(self, ids: Tensor) -> Tensor:
        return self.norm(self.table(ids))  # type: ignore[no-any-return]


class Asked(Base):
    """The other head needs an argument that is not among the drawn inputs."""

    def forward(self, ids: Tensor, what: str = "") -> Tensor:
        h = self.normed(ids)
        return self.value(h) if what == "value" else self.head(h)  # type: ignore[no-any-return]


class Training(Base):
    """Only training uses the other head."""

    def forward(self, ids: Tensor) -> Any:
        h = self.normed(ids)
        return (self.head(h), self.value(h)) if self.training else self.head(h)


class Long(Base):
    """Long inputs take another path."""

    def forward(self, ids: Tensor) -> Tensor:
        h = self.normed(ids)
        return self.value(h) if ids.shape[1] > 20 else self.head(h)  # type: ignore[no-any-return]


class Flagged(Base):
    """A flag returns the norm's output itself, without any parameter that could be missing."""

    def forward(self, ids: Tensor, features: bool = False) -> Tensor:
        h = self.normed(ids)
        return h if features else self.head(h) + self.value(h).mean()


class TrainingSum(Base):
    """Training adds the norm's output itself, so its gain cannot be moved."""

    def forward(self, ids: Tensor) -> Tensor:
        h = self.normed(ids)
        y = self.head(self.norm(self.table(ids)) if not self.training else h)
        return y + self.value(h).mean() + (h.mean() if self.training else 0)  # type: ignore[no-any-return]


class TwoOutputs(Base):
    """The second output is the norm's own."""

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        h = self.normed(ids)
        return self.head(h) + self.value(h).mean(), h.mean(1)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_consumer_that_no_run_reached_is_named_and_the_norm_refused() -> None:
    model = Asked()
    before = weights(model)
    report = fold_gains(model)
    assert report.changed == {}
    assert "no run reached value" in report.refused["norm"]
    assert "inputs=[…]" in report.refused["norm"]
    assert set(report.proof.unreached) == {"value.weight", "value.bias"}
    assert unchanged(model, before)


def test_inputs_that_reach_both_branches_let_both_be_folded() -> None:
    model = Asked().double()
    before = copy.deepcopy(model)
    report = fold_gains(model, [{"ids": IDS}, {"ids": IDS, "what": "value"}])
    assert report.changed["norm"] == "into value, head" or report.changed["norm"] == "into head, value"
    for what in ("", "value"):
        assert torch.allclose(model(IDS, what), before(IDS, what), rtol=0, atol=1e-13)
    assert report.proof.coverage == 1


@pytest.mark.parametrize("kind", [Training, Long])
def test_branches_of_training_and_of_long_inputs_are_reached_without_asking(kind: type[Base]) -> None:
    model = kind().double()
    before = copy.deepcopy(model)
    assert "value" in fold_gains(model).changed["norm"]
    for ids in (IDS, IDS.view(1, -1).repeat(1, 3)):
        for mode in (True, False):
            one, other = (each.train(mode)(ids) for each in (model, before))
            pairs = zip(one, other, strict=True) if isinstance(one, tuple) else [(one, other)]
            assert all(torch.allclose(a, b, rtol=0, atol=1e-13) for a, b in pairs)


@pytest.mark.parametrize("kind", [TrainingSum, TwoOutputs, Flagged])
def test_output_that_would_change_in_training_with_a_flag_or_beside_the_first_is_refused(kind: type[Base]) -> None:
    model = kind()
    before = weights(model)
    report = fold_gains(model)
    assert report.changed == {}
    assert report.refused["norm"]
    assert unchanged(model, before)


def test_verify_compares_every_output() -> None:
    before = TwoOutputs().double()
    after = copy.deepcopy(before)
    after.norm.weight.data *= 2
    after.head.weight.data /= 2
    after.value.weight.data /= 2
    proof = verify(before, after)
    assert not proof.exact
    assert proof.relative == pytest.approx(1.0)  # the second output has doubled
    assert proof.proof.outputs == ("[0]", "[1]")


def test_outputs_of_dictionaries_and_nested_containers_are_compared_by_name() -> None:
    class Nested(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return {"logits": super().forward(x), "more": [x.long(), (x * self.bias[0],)]}

    before = Nested(4, 4).double()
    after = copy.deepcopy(before)
    after.bias.data[0] += 0.5
    after.weight.data *= 1
    proof = verify(before, after, [torch.ones(2, 4)])
    assert set(proof.proof.outputs) == {"logits", "more[1][0]"}
    assert not proof.exact


def test_hidden_states_that_change_by_design_are_listed_and_not_refused() -> None:
    model = zoo.build("gpt2")
    before = copy.deepcopy(model)
    model.config.output_hidden_states = before.config.output_hidden_states = True
    report = center(model)
    assert report.changed
    assert "hidden_states[1]" in report.proof.by_design
    found = verify(before, model)
    assert found.exact
    assert found.proof.by_design["hidden_states[1]"] > 1e-6
    assert not any(name.startswith("hidden_states") for name in found.proof.outputs)


def test_writer_that_no_run_reached_stops_centering() -> None:
    class Types(Base):
        """A second embedding, for inputs with types."""

        def __init__(self) -> None:
            super().__init__(nn.LayerNorm)
            self.types = nn.Embedding(2, 8)

        def forward(self, ids: Tensor, types: Tensor | None = None) -> Tensor:
            x = self.table(ids)
            h = self.norm(x if types is None else x + self.types(types))
            return self.head(h) + self.value(h).mean()  # type: ignore[no-any-return]

    model = Types().double()
    report = center(model)
    assert report.changed == {}
    assert "no run reached types" in report.refused["norm"]
    before = copy.deepcopy(model)
    types = torch.zeros_like(IDS)
    report = center(model, [{"ids": IDS}, {"ids": IDS, "types": types}])
    assert "RMSNorm" in report.changed["norm"]
    assert torch.allclose(model(IDS, types), before(IDS, types), rtol=0, atol=1e-13)


def test_every_expert_is_used_in_the_proof() -> None:
    """With 16 experts, one for each token, random tokens would leave some out."""
    model = zoo.build("mixtral", num_experts=16, num_experts_per_tok=1, num_hidden_layers=1)
    report = fold_gains(model, [zoo.TOKENS[:1, :4]])
    assert "mlp.experts.gate_up_proj" in report.changed["model.layers.0.post_attention_layernorm"]
    assert report.proof.experts == (32, 32)
    assert report.proof.coverage == 1


def test_wrong_edit_of_one_expert_is_found() -> None:
    before = zoo.build("mixtral", num_experts=16, num_experts_per_tok=1, num_hidden_layers=1)
    for expert in range(16):
        after = copy.deepcopy(before)
        after.model.layers[0].mlp.experts.down_proj.data[expert] *= 1.01
        assert not verify(before, after, [zoo.TOKENS[:1, :4]]).exact


def test_norm_with_an_optional_second_input_is_folded() -> None:
    class GatedNorm(nn.RMSNorm):
        def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
            y = super().forward(x)
            return y if gate is None else y * gate.sigmoid()

    class Model(Base):
        def forward(self, ids: Tensor) -> Tensor:
            x = self.table(ids)
            h = self.norm(x, x)
            return self.head(h) + self.value(h).mean()  # type: ignore[no-any-return]

    model = Model(GatedNorm)
    model = model.double()
    before = copy.deepcopy(model)
    folded = fold_gains(model)
    assert folded.changed["norm"] == "into head, value (gated RMSNorm)"
    assert torch.allclose(model(IDS), before(IDS), rtol=0, atol=1e-13)


def test_error_of_the_models_own_forward_is_quoted_and_chained() -> None:
    class Broken(Base):
        def forward(self, ids: Tensor) -> Tensor:
            raise KeyError("a key of mine")

    with pytest.raises(InputError, match="a key of mine") as error:
        fold_gains(Broken())
    assert isinstance(error.value.__cause__, KeyError)


def test_training_run_leaves_the_random_state_and_buffers_alone() -> None:
    class Noisy(Base):
        def __init__(self) -> None:
            super().__init__()
            self.batch, self.drop = nn.BatchNorm1d(12), nn.Dropout(0.5)

        def forward(self, ids: Tensor) -> Tensor:
            h = self.normed(ids)
            y = self.drop(self.head(h)) + self.value(h).mean()
            return self.batch(y.flatten(0, 1))  # type: ignore[no-any-return]

    model = Noisy().double()
    before, state = weights(model), torch.get_rng_state()
    report = fold_gains(model)
    assert "input 1 in training mode" in report.proof.runs
    assert "norm" in report.changed
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model.batch.running_mean, before["batch.running_mean"])
