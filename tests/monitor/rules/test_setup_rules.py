"""Real small trainings with a mistake in their setup, and healthy ones that resemble them."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.histories import facts
from helpers.watched_models import Decoder, adamw, some_tokens, token_loss, train, train_watched
from torch import Tensor, nn
from torch.optim import optimizer as optimizers
from torch.utils.checkpoint import checkpoint

from omninorm.monitor import Alarm, History, Step, watch
from omninorm.monitor.checks.facts import Setup, StepChecks
from omninorm.monitor.rules.autocast_lost import AutocastLost

pytestmark = pytest.mark.usefixtures("words")
RULES = {"evaluation-mode", "adam-betas", "adam-state", "autocast-lost", "dropout"}
STEPS = 12
Body = Callable[[int], None]


def decoder(**options: Any) -> Decoder:
    torch.manual_seed(0)
    return Decoder(blocks=3, **options)


def run(
    model: nn.Module,
    optimizer: Any = None,
    before: Body = lambda step: None,
    after: Body = lambda step: None,
    loss: Callable[[nn.Module, int], Tensor] = lambda model, step: token_loss(model, some_tokens(step)),
    **options: Any,
) -> list[Alarm]:
    """Train an ordinary loop, which calls `before` and `after` in each step, and return the alarms of these rules."""
    optimizer = optimizer or adamw(model)
    with watch(model, optimizer, every=5, **options) as watched:
        for step in range(1, STEPS + 1):
            before(step)
            value = loss(model, step)
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
            after(step)
            watched.step(value.detach())
    return [alarm for alarm in watched.alarms if alarm.rule in RULES]


def summary(alarms: list[Alarm]) -> list[tuple[str, str, str | None, int]]:
    return [(alarm.rule, alarm.severity, alarm.layer, alarm.step) for alarm in alarms]


def evaluate(model: nn.Module, times: int = 2) -> None:
    with torch.no_grad():
        for index in range(times):
            token_loss(model, some_tokens(500 + index))


# evaluation-mode ------------------------------------------------------------------------------------------------------


class Image(nn.Module):
    """A small convolutional network with BatchNorm and no blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4), nn.Linear(4, 23)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.conv(tokens.float().flatten()[None, None])).relu()
        y: Tensor = self.head(x.mean(-1)).expand(*tokens.shape, -1)
        return y


@pytest.mark.parametrize(
    ("build", "kind"),
    [
        (lambda: decoder(dropout=0.1), "dropout is off"),
        (Image, "BatchNorm is off"),
        (lambda: nn.Sequential(decoder(dropout=0.1), nn.BatchNorm1d(7)), "dropout and BatchNorm are off"),
    ],
)
def test_training_in_evaluation_mode_is_a_warning_after_three_steps(build: Callable[[], nn.Module], kind: str) -> None:
    model = build().eval()
    (alarm,) = run(model)
    assert summary([alarm]) == [("evaluation-mode", "warn", None, 3)]
    assert alarm.evidence.startswith(f"The model is in evaluation mode: {kind}.")
    assert alarm.evidence.endswith("since step 1.")


def test_forgotten_train_after_an_evaluation_names_the_step() -> None:
    model = decoder(dropout=0.1)
    (alarm,) = run(model, before=lambda step: (model.eval(), evaluate(model)) if step == 6 else None)  # type: ignore[arg-type, func-returns-value]
    assert summary([alarm]) == [("evaluation-mode", "warn", None, 8)]
    assert alarm.evidence.endswith("since step 6.")


def test_float_attribute_counts_as_dropout() -> None:
    model = decoder(dropout=0.1)
    for block in model.blocks:
        block.dropout.p = 0.0
        block.attention.dropout = 0.2
    assert summary(run(model.eval())) == [("evaluation-mode", "warn", None, 3)]


def frozen_backbone() -> nn.Module:
    model = decoder(dropout=0.1).eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("head"))
    return model


def partly_evaluating() -> nn.Module:
    model = decoder(dropout=0.1).eval()
    model.blocks[2].train()
    return model


@pytest.mark.parametrize(
    "build",
    [
        lambda: decoder(dropout=0.1),
        lambda: decoder().eval(),
        lambda: decoder(dropout=0.0).eval(),
        frozen_backbone,
        partly_evaluating,
    ],
)
def test_intended_modes_are_silent(build: Callable[[], nn.Module]) -> None:
    assert run(build()) == []


def test_evaluation_in_evaluation_mode_is_silent_even_with_gradients() -> None:
    model = decoder(dropout=0.1)

    def before(step: int) -> None:
        model.eval()
        token_loss(model, some_tokens(700))
        evaluate(model)
        model.train()

    assert run(model, before=before) == []


def test_evaluation_in_training_mode_is_a_warning() -> None:
    model = decoder(dropout=0.1)
    (alarm,) = run(model, before=lambda step: evaluate(model) if step == 7 else None)
    assert summary([alarm]) == [("evaluation-mode", "warn", None, 7)]
    assert "dropout is active in 2 passes without gradients" in alarm.evidence


def test_one_pass_without_gradients_per_step_is_silent() -> None:
    model = decoder(dropout=0.1)
    assert run(model, before=lambda step: evaluate(model, 1)) == []  # pseudo-labels


def test_evaluation_in_training_mode_without_dropout_is_silent() -> None:
    model = decoder()
    assert run(model, before=lambda step: evaluate(model) if step == 7 else None) == []


def test_reentrant_checkpointing_is_silent() -> None:
    model = decoder(dropout=0.1)
    model.around = lambda block, x, mask: checkpoint(block, x, mask, use_reentrant=True)
    assert run(model) == []


def test_reentrant_checkpointing_of_the_whole_model_is_silent() -> None:
    class Embedded(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x[..., None].expand(-1, -1, 4) / 23)

    torch.manual_seed(0)
    model = Embedded(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 23))

    def loss(model: nn.Module, step: int) -> Tensor:
        tokens = some_tokens(step)
        x = tokens[:, :-1].float().requires_grad_()
        logits = checkpoint(model, x, use_reentrant=True) if step % 4 == 0 else model(x)
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    assert run(model, loss=loss) == []


# adam-betas -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("betas", [(0.999, 0.9), (0.9, 0.81), (0.99, 0.95), (0.5, 0.7)])
def test_unusual_betas_are_a_warning_in_the_first_step(betas: tuple[float, float]) -> None:
    model = decoder()
    (alarm,) = run(model, adamw(model, betas=betas))
    assert summary([alarm]) == [("adam-betas", "warn", None, 1)]
    assert f"β₁ = {betas[0]:g} and β₂ = {betas[1]:g}" in alarm.evidence


@pytest.mark.parametrize("betas", [(0.999, 0.5), (0.95, 0.79), (0.9, 0.5)])
def test_betas_that_violate_both_conditions_are_a_failure(betas: tuple[float, float]) -> None:
    model = decoder()
    (alarm,) = run(model, adamw(model, betas=betas))
    assert summary([alarm]) == [("adam-betas", "fail", None, 1)]


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999), (0.5, 0.9), (0.0, 0.9), (0.9, 0.99), (0.95, 0.95)])
def test_usual_betas_are_silent(betas: tuple[float, float]) -> None:
    model = decoder()
    assert run(model, adamw(model, betas=betas)) == []


def test_betas_of_an_optimizer_without_eps_are_silent() -> None:
    class Lion(torch.optim.SGD):
        """Stands for an optimizer whose betas mean something else."""

    model = decoder()
    optimizer = Lion(model.parameters(), lr=1e-2)
    for group in optimizer.param_groups:
        group["betas"] = (0.95, 0.5)
    assert run(model, optimizer) == []


# adam-state -----------------------------------------------------------------------------------------------------------


def test_cleared_state_is_a_warning_at_once() -> None:
    model = decoder()
    optimizer = adamw(model)
    alarms = run(model, optimizer, before=lambda step: optimizer.state.clear() if step == 8 else None)
    assert [alarm.rule for alarm in alarms] == ["adam-state"]
    assert "in step 8 its moments begin at 0 after 7 steps" in alarms[0].evidence


def test_state_cleared_in_every_step_is_a_warning() -> None:
    model = decoder()
    optimizer = adamw(model)
    alarms = run(model, optimizer, before=lambda step: optimizer.state.clear())
    assert "in step 2 its moments begin at 0 after 1 step." in alarms[0].evidence


def test_new_optimizer_in_every_step_is_a_warning() -> None:
    model = decoder()
    with watch(model, adamw(model), every=5) as watched:
        for step in range(1, STEPS + 1):
            optimizer = adamw(model)
            loss = token_loss(model, some_tokens(step))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            watched.step(loss.detach())
    (alarm,) = [alarm for alarm in watched.alarms if alarm.rule in RULES]
    assert alarm.evidence.startswith("Adam's state was lost 3 times: step 4 was made by a new optimizer")


def test_missing_state_in_a_resumed_run_is_a_warning() -> None:
    model = decoder()
    (alarm,) = run(model, step=100)
    assert alarm.evidence.startswith("Adam's state was not restored: the run is resumed")
    assert alarm.evidence.endswith("in step 101.")


def test_restored_state_is_silent() -> None:
    model = decoder()
    optimizer = adamw(model)
    train(model, optimizer, 3)
    other = adamw(model)
    other.load_state_dict(optimizer.state_dict())
    assert run(model, other, step=3) == []


def test_state_of_an_earlier_checkpoint_is_silent() -> None:
    model = decoder()
    optimizer = adamw(model)
    saved: dict[str, Any] = {}

    def before(step: int) -> None:
        if step == 4:
            saved.update(optimizer.state_dict())
        if step == 9:
            optimizer.load_state_dict(saved)

    assert run(model, optimizer, before=before) == []


def test_two_alternating_optimizers_are_silent() -> None:
    model = decoder()
    first, second = adamw(model), adamw(model, lr=1e-3)

    def after(step: int) -> None:
        token_loss(model, some_tokens(900 + step)).backward()
        second.step()
        second.zero_grad()

    assert run(model, first, after=after) == []


def test_parameters_that_join_later_are_silent() -> None:
    model = decoder()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.embedding.requires_grad_(False)
    assert run(model, optimizer, before=lambda step: model.embedding.requires_grad_(step > 5)) == []  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adagrad])
def test_other_optimizers_are_silent(kind: Any) -> None:
    model = decoder()
    assert run(model, kind(model.parameters(), lr=1e-3), step=50) == []


def test_hooks_on_optimizers_are_removed() -> None:
    tables = optimizers._global_optimizer_pre_hooks, optimizers._global_optimizer_post_hooks
    before = [len(table) for table in tables]
    model = decoder()
    run(model)
    assert [len(table) for table in tables] == before


# autocast-lost --------------------------------------------------------------------------------------------------------


def scaler(enabled: bool = True) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", enabled=enabled, init_scale=1.0)


def autocast_in(steps: Callable[[int], bool]) -> Callable[[nn.Module, int], Tensor]:
    def loss(model: nn.Module, step: int) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=steps(step)):
            return token_loss(model, some_tokens(step))

    return loss


def test_scaler_without_autocast_is_a_warning_after_three_steps() -> None:
    (alarm,) = run(decoder(), scaler=scaler())
    assert summary([alarm]) == [("autocast-lost", "warn", None, 3)]
    assert alarm.evidence.startswith("Autocast is not active although there is a GradScaler")


def test_autocast_that_ends_is_a_warning() -> None:
    (alarm,) = run(decoder(), loss=autocast_in(lambda step: step < 7))
    assert summary([alarm]) == [("autocast-lost", "warn", None, 9)]
    assert alarm.evidence.endswith("without it since step 7.")


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        (autocast_in(lambda step: True), {"scaler": scaler()}),
        (autocast_in(lambda step: step not in (5, 6)), {"scaler": scaler()}),
        (autocast_in(lambda step: False), {"scaler": scaler(enabled=False)}),
        (autocast_in(lambda step: False), {}),
        (autocast_in(lambda step: step < 3), {}),
    ],
)
def test_autocast_as_intended_is_silent(loss: Callable[[nn.Module, int], Tensor], options: dict[str, Any]) -> None:
    assert run(decoder(), loss=loss, **options) == []


def test_autocast_inside_the_forward_is_silent() -> None:
    model = decoder()

    def forward(self: Decoder, *args: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return Decoder.forward(self, *args)

    model.forward = types.MethodType(forward, model)  # type: ignore[method-assign]
    assert run(model, scaler=scaler()) == []


BELIEVED = {"precision": "bf16"}


def in_dtype(dtype: torch.dtype) -> Decoder:
    """Return a model whose blocks work in a dtype."""
    model = decoder()
    model.blocks.to(dtype)
    model.embedding.register_forward_hook(lambda module, inputs, output: output.to(dtype))
    model.final_norm.register_forward_pre_hook(lambda module, inputs: inputs[0].float())
    return model


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [
        (BELIEVED, "bfloat16"),
        ({"precision": "16-mixed"}, "float16"),
        ({"precision": torch.float16, "mixed_precision": "bf16"}, "float16"),
        ({"mixed_precision": "bf16"}, "bfloat16"),
        ({"bf16": True, "fp16": False}, "bfloat16"),
        ({"fp16": True}, "float16"),
    ],
)
def test_settings_without_autocast_are_a_warning_after_three_steps(settings: dict[str, Any], dtype: str) -> None:
    (alarm,) = run(decoder(), config=settings)
    assert summary([alarm]) == [("autocast-lost", "warn", None, 3)]
    assert f"the settings ask for {dtype}" in alarm.evidence
    assert alarm.evidence.endswith("in float32 since step 1.")


@pytest.mark.parametrize(
    "settings",
    [
        {"precision": "fp32"},
        {"precision": "32-true", "bf16": True},
        {"mixed_precision": "no"},
        {"bf16": False},
        {"bf16": "no"},
        {"precision": None},
        {"width": 16},
    ],
)
def test_settings_that_do_not_ask_for_16_bits_are_silent(settings: dict[str, Any]) -> None:
    assert run(decoder(), config=settings) == []


@pytest.mark.parametrize(
    ("build", "loss"),
    [
        (decoder, autocast_in(lambda step: True)),
        (lambda: in_dtype(torch.bfloat16), autocast_in(lambda step: False)),
        (lambda: nn.Sequential(nn.Embedding(23, 8), nn.Linear(8, 23)), autocast_in(lambda step: False)),
    ],
)
def test_settings_are_silent_with_autocast_with_16_bit_weights_and_without_blocks(
    build: Callable[[], nn.Module], loss: Callable[[nn.Module, int], Tensor]
) -> None:
    torch.manual_seed(0)
    assert run(build(), loss=loss, config=BELIEVED) == []


@pytest.mark.parametrize(
    ("inside", "dtype", "expected"),
    [
        (True, "float32", [3, 4, 5]),
        (True, "float64", [3, 4, 5]),
        (True, "bfloat16", []),
        (True, None, []),  # unknown, as before the first sample
        (False, "float32", []),  # a compiled model, inside which autocast may begin
    ],
)
def test_settings_are_compared_only_where_autocast_and_dtype_are_known(
    inside: bool, dtype: str | None, expected: list[int]
) -> None:
    history, rule = History(facts=facts(precision="bfloat16")), AutocastLost()
    history.dtype = dtype
    checks = StepChecks(setup=Setup(autocast=False, inside=inside))
    reports = [list(rule.on_step(history, Step(step, 3.0, 1.0, 1e-3, checks))) for step in range(1, 6)]
    assert [alarm.step for alarms in reports for alarm in alarms] == expected


# dropout --------------------------------------------------------------------------------------------------------------


def test_large_dropout_names_its_layer() -> None:
    model = decoder(dropout=0.1)
    model.blocks[1].dropout.p = 0.9
    (alarm,) = run(model)
    assert summary([alarm]) == [("dropout", "warn", "blocks.1.dropout", 1)]
    assert "removes 90 % of its input" in alarm.evidence
    model = decoder(dropout=0.7)
    (alarm,) = run(model)
    assert "2 other layers" in alarm.evidence


@pytest.mark.parametrize("p", [0.5, 0.7])
def test_functional_dropout_names_its_block_if_it_is_large(p: float) -> None:
    model = decoder()
    model.blocks[2].attention.register_forward_hook(
        lambda module, _, y: torch.nn.functional.dropout(y, p, module.training)
    )
    expected = [("dropout", "warn", "blocks.2", 1)] if p > 0.6 else []
    assert summary(run(model)) == expected


def test_functional_dropout_that_is_off_is_reported_as_evaluation_mode() -> None:
    def dropped(frozen: bool) -> Decoder:
        model = decoder()
        model.blocks[2].attention.register_forward_hook(
            lambda module, _, y: torch.nn.functional.dropout(y, 0.1, module.training)
        )
        model.blocks[2].requires_grad_(not frozen)
        return model

    (alarm,) = run(dropped(frozen=False).eval())
    assert summary([alarm]) == [("evaluation-mode", "warn", None, 3)]
    assert "dropout is off" in alarm.evidence
    assert run(dropped(frozen=True).eval()) == []
    half = dropped(frozen=False)
    half.blocks.eval()
    assert run(half) == [], "the model itself is in training mode"


def test_functional_dropout_in_an_evaluation_is_reported() -> None:
    model = decoder()
    model.blocks[2].attention.register_forward_hook(
        lambda module, _, y: torch.nn.functional.dropout(y, 0.1, module.training)
    )
    (alarm,) = run(model, after=lambda step: evaluate(model) if step == 6 else None)
    assert summary([alarm])[0][:2] == ("evaluation-mode", "warn")
    assert "dropout is active in 2 passes without gradients" in alarm.evidence

    def properly(step: int) -> None:
        model.eval()
        evaluate(model)
        model.train()

    assert run(model, after=properly) == []


def test_usual_dropout_is_silent() -> None:
    assert run(decoder(dropout=0.5)) == []


def test_large_dropout_in_evaluation_mode_is_not_reported_as_large() -> None:
    assert [alarm.rule for alarm in run(decoder(dropout=0.9).eval())] == ["evaluation-mode"]


def test_training_with_dropout_is_bit_identical() -> None:
    def weights(watched: bool) -> list[Tensor]:
        model = decoder(dropout=0.2)
        (train_watched if watched else train)(model, adamw(model), 6)
        return [parameter.detach() for parameter in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(weights(True), weights(False), strict=True))


@pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning")
def test_compiled_model_in_evaluation_mode_is_a_warning() -> None:
    model = decoder(dropout=0.1).eval()
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    assert [alarm.rule for alarm in run(compiled)] == ["evaluation-mode"]
