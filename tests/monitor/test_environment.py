"""Copies and files of monitored models, default dtypes, and compiled autograd."""

from __future__ import annotations

import copy
import gc
import math
import subprocess
import sys
import warnings
import weakref
from pathlib import Path

import pytest
import torch
import torch._dynamo
from helpers.watched_models import Decoder, adamw, some_tokens, tokens_of, train, train_watched

from omninorm.monitor import watch


def hooks_of(model: torch.nn.Module) -> int:
    tables = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    return sum(len(getattr(module, table)) for module in model.modules() for table in tables)


def test_deep_copy_keeps_the_users_hooks_and_none_of_the_watch() -> None:
    model = Decoder()
    calls: list[str] = []
    for module in (model, model.head):
        module.register_forward_hook(lambda *_: calls.append("after"))
        module.register_forward_pre_hook(lambda *_, **__: calls.append("before"), with_kwargs=True)
    count = hooks_of(model)
    with watch(model, adamw(model), every=1, rules=[]) as watched:
        twin, again = copy.deepcopy(model), copy.deepcopy([model, model])
        assert again[0] is again[1]
        assert hooks_of(model) > count
    assert [hooks_of(each) for each in (model, twin, again[0])] == [count] * 3
    expected = model(some_tokens(1))
    calls.clear()
    assert torch.equal(twin(some_tokens(1)), expected)
    assert calls == ["before", "before", "after", "after"]
    gone = weakref.ref(watched)
    del watched, model
    gc.collect()
    assert gone() is None


def test_model_saved_during_a_watch_loads_without_omninorm(tmp_path: Path) -> None:
    model = torch.nn.TransformerEncoderLayer(8, 2)
    with watch(model, every=1, rules=[]):
        assert hooks_of(model)
        torch.save(model, tmp_path / "model.pt")
    script = "import sys; sys.modules['omninorm'] = None; import torch\n"
    script += f"model = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
    script += "model(torch.ones(3, 1, 8)).sum().backward(); print(model(torch.ones(3, 1, 8)).shape)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "[3, 1, 8]" in done.stdout


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_everything_is_recorded_under_another_default_dtype(dtype: torch.dtype) -> None:
    def signals() -> dict[str, object]:
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model = Decoder().float()
            watched = train_watched(model, adamw(model), 2)
        assert all(math.isfinite(step.loss) and math.isfinite(step.grad_norm) for step in watched.history.steps)
        return {name: len(values) for name, values in watched.history.samples[-1].signals.items()}

    expected = signals()
    torch.set_default_dtype(dtype)
    try:
        assert signals() == expected
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.slow
def test_compiled_autograd_does_not_end_training_and_changes_nothing() -> None:
    torch.manual_seed(0)
    plain = Decoder()
    watched_model = copy.deepcopy(plain)
    train(plain, adamw(plain), 2)
    optimizer = adamw(watched_model)
    with warnings.catch_warnings(), watch(watched_model, optimizer, every=1, rules=[]) as watched:
        warnings.simplefilter("ignore")
        for step in (1, 2):
            loss = tokens_of(watched_model, step)
            with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            watched.step(loss)
    assert all(step.grad_norm > 0 for step in watched.history.steps)  # measured before the optimizer's step
    pairs = zip(plain.parameters(), watched_model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
