"""The training loop: its arithmetic against AdamW's formula, and its results."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from omninorm.experiments import (
    ByteTokenizer,
    CheckpointEvent,
    EvalEvent,
    RunFolder,
    StepEvent,
    StopEvent,
    TrainConfig,
    bits_per_byte,
    build_model,
    learning_rate,
    load_corpus,
    tokenize,
    train,
    unigram_bits_per_byte,
    windows,
)
from omninorm.thinker import ThinkerConfig

SHAPE = ThinkerConfig(d_model=16, n_layers=2, n_heads=2, max_seq_len=16)


def _weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_a_step_is_adamw_by_its_formula(data, small):
    """Two steps against m ← β₁m + (1−β₁)g, v ← β₂v + (1−β₂)g², w ← (1 − ηλ)w − η·m̂/(√v̂ + ε), in float64."""
    config = replace(small, steps=2, grad_clip=0.5, weight_decay=0.3, warmup_steps=0)
    model, twin = build_model(SHAPE, 1), build_model(SHAPE, 1)
    result = train(model, data, config)

    moments = {name: [torch.zeros_like(p, dtype=torch.float64)] * 2 for name, p in twin.named_parameters()}
    for step in (1, 2):
        tokens = windows(data.train, config.seed, step, config.batch_size, config.seq_len)
        twin.zero_grad()
        F.cross_entropy(twin(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        grads = {name: p.grad.double() for name, p in twin.named_parameters()}
        norm = math.sqrt(sum(float(grad.square().sum()) for grad in grads.values()))
        assert result.grad_norms[step - 1] == pytest.approx(norm, rel=1e-5)
        assert norm > 0.5  # or clipping is not tested
        rate = learning_rate(step, config)
        for name, p in twin.named_parameters():
            grad = grads[name] * 0.5 / norm
            first, second = moments[name]
            first, second = 0.9 * first + 0.1 * grad, 0.95 * second + 0.05 * grad.square()
            moments[name] = [first, second]
            change = (first / (1 - 0.9**step)) / ((second / (1 - 0.95**step)).sqrt() + 1e-8)
            decay = 0.3 if p.ndim == 2 and name != "embedding.weight" else 0.0
            p.data = (p.double() * (1 - rate * decay) - rate * change).float()
    # If a gradient element is far below its tensor's rounding error, its sign may differ in float32, and Adam turns a
    # sign into a whole step. So a few elements may differ by steps, and all others only by rounding.
    difference = (_weights(model) - _weights(twin)).abs()
    assert (difference > 1e-6).float().mean() < 1e-3
    assert difference.max() < 4 * config.lr


def test_accumulation_is_one_big_batch(data, small):
    """The same windows in 1, 2 or 4 micro-batches: the mean loss is the same sum in another order."""
    results = []
    for parts in (1, 2, 4):
        model = build_model(SHAPE, 0)
        config = replace(small, steps=1, batch_size=8 // parts, grad_accumulation=parts, grad_clip=None)
        assert config.tokens_per_step == 8 * 16
        results.append(train(model, data, config))
    losses = [result.losses[0] for result in results]
    norms = [result.grad_norms[0] for result in results]
    # n = 128 terms summed in another order: relative error at most about n·2⁻²⁴.
    assert losses == pytest.approx([losses[0]] * 3, rel=128 * 2**-24)
    assert norms == pytest.approx([norms[0]] * 3, rel=128 * 2**-24)


def test_accumulated_gradients_are_one_big_batch(data, small):
    """Plain gradient descent instead of AdamW shows the gradients themselves, element by element."""
    from omninorm.experiments.processes import Processes
    from omninorm.experiments.train import _accumulate

    gradients = []
    for parts in (1, 4):
        model = build_model(SHAPE, 0)
        settings = replace(small, batch_size=8 // parts, grad_accumulation=parts)
        _accumulate(model, data, settings, 1, Processes(), torch.amp.GradScaler("cpu", enabled=False))
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    largest = gradients[0].abs().max()
    assert (gradients[0] - gradients[1]).abs().max() <= 128 * 2**-24 * largest


def test_the_events_come_in_order_and_add_up_to_the_result(model, data, small):
    events = []
    result = train(model, data, small, on_event=events.append)
    shape = [(type(event).__name__, event.step) for event in events]
    assert shape == [
        ("EvalEvent", 0),
        ("StepEvent", 1),
        ("StepEvent", 2),
        ("StepEvent", 3),
        ("EvalEvent", 3),
        ("StepEvent", 4),
        ("StepEvent", 5),
        ("StepEvent", 6),
        ("EvalEvent", 6),
        ("StopEvent", 6),
    ]
    assert list(result.step_events) == [event for event in events if isinstance(event, StepEvent)]
    assert list(result.eval_events) == [event for event in events if isinstance(event, EvalEvent)]
    assert not any(isinstance(event, CheckpointEvent) for event in events)
    assert events[-1] == StopEvent(6, "finished")
    assert (result.status, result.steps, result.folder) == ("finished", 6, None)
    assert result.bits_per_byte == bits_per_byte(model, data, seq_len=16, batch_size=2)
    assert result.largest_grad_norm == max(result.grad_norms) > 0
    assert result.tokens_per_second > 0
    assert [event.lr for event in result.step_events] == [learning_rate(step, small) for step in range(1, 7)]


def test_log_every_thins_the_record_but_keeps_the_last(model, data, small):
    result = train(model, data, replace(small, log_every=4))
    assert [event.step for event in result.step_events] == [4, 6]


def test_the_recorded_norm_is_the_one_before_clipping(data, small):
    clipped = train(build_model(SHAPE, 0), data, replace(small, grad_clip=1e-3))
    free = train(build_model(SHAPE, 0), data, replace(small, grad_clip=None))
    assert clipped.grad_norms[0] == free.grad_norms[0] > 0.1


def test_same_seed_same_run_other_seed_other_run(data, small):
    runs = [train(build_model(SHAPE, seed), data, replace(small, seed=seed)).losses for seed in (0, 0, 1)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_a_small_model_beats_the_unigram_baseline(data, text_file):
    config = TrainConfig(steps=150, batch_size=8, seq_len=16, lr=1e-2, eval_every=150)
    result = train(build_model(SHAPE, 0), data, config)
    corpus = load_corpus(text_file)
    assert result.eval_events[0].bits_per_byte > 7.5
    assert result.bits_per_byte < 0.75 * unigram_bits_per_byte(corpus.train, corpus.held_out)


def test_bf16_trains_with_parameters_in_fp32(data, small):
    model = build_model(SHAPE, 0)
    result = train(model, data, replace(small, precision="bf16"))
    full = train(build_model(SHAPE, 0), data, small)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert result.losses != full.losses
    # bf16 keeps 8 bits; at the start the logits are of the order of 1.
    assert result.losses[0] == pytest.approx(full.losses[0], abs=0.05)


def test_a_loss_that_is_not_finite_ends_the_run_as_diverged(data, small):
    model = build_model(SHAPE, 0)
    result = train(model, data, replace(small, steps=50, lr=1e30, warmup_steps=0, schedule="constant"))
    assert result.status == "diverged"
    assert result.steps < 50
    assert all(math.isfinite(loss) for loss in result.losses)


def test_a_model_that_is_broken_from_the_start_has_diverged_at_step_0(model, data, small):
    model.embedding.weight.data[32] = math.nan
    events = []
    result = train(model, data, small, on_event=events.append)
    assert (result.status, result.steps) == ("diverged", 0)
    assert math.isnan(result.bits_per_byte)
    assert math.isnan(result.largest_grad_norm)


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(data, small):
    model = build_model(SHAPE, 0)
    model.embedding.weight.register_hook(lambda grad: grad * math.inf)
    before = _weights(model)
    result = train(model, data, small)
    assert (result.status, result.steps) == ("diverged", 1)
    assert torch.equal(_weights(model), before)


def test_a_signal_ends_the_run_after_its_step(model, data, small):
    asked = iter([None, None, 15, 15])
    result = train(model, data, small, stopped_by=lambda: next(asked))
    assert (result.status, result.steps, result.signal) == ("interrupted", 3, 15)


def test_a_signal_in_the_last_step_leaves_nothing_to_interrupt(model, data, small):
    result = train(model, data, replace(small, steps=1), stopped_by=lambda: 2)
    assert (result.status, result.steps, result.signal) == ("finished", 1, None)


def test_any_model_can_be_trained(text_file, small):
    model = nn.Sequential(nn.Embedding(256, 8), nn.Linear(8, 256))
    data = tokenize(load_corpus(text_file), ByteTokenizer(), 16)
    assert train(model, data, small).status == "finished"


def test_weights_that_are_not_finite_are_never_written_over_good_ones(data, small, tmp_path):
    """Weight decay overflows them in the first step, after a loss and a gradient that are fine."""
    config = replace(
        small, lr=1e38, weight_decay=100.0, warmup_steps=0, schedule="constant", checkpoint_every=1, eval_every=6
    )
    with RunFolder.create(tmp_path / "run", {}, {}) as run:
        result = train(build_model(SHAPE, 0), data, config, run=run)
        assert (result.status, result.steps) == ("diverged", 1)
        assert all(math.isfinite(loss) for loss in result.losses)
        assert run.newest() is None
