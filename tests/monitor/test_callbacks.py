"""Callbacks in real trainers: recorded steps and losses are the trainer's, and weights stay bit-identical."""

import importlib
import math
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytorch_lightning as lightning
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from omninorm.errors import ConfigError, MissingExtraError, RunError
from omninorm.monitor.callbacks import accelerate as in_accelerate
from omninorm.monitor.callbacks.lightning import WatchCallback as LightningCallback
from omninorm.monitor.callbacks.transformers import WatchCallback as TrainerCallback
from omninorm.record import read_history

SEQ, WORDS = 16, 32


def slow(*values: object) -> object:
    """Mark a case as slow."""
    return pytest.param(*values, marks=pytest.mark.slow)


class Tokens(Dataset):
    """Learnable texts: each token is determined by the previous one."""

    def __len__(self) -> int:
        return 22

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.tensor([(index + 3 * place) % WORDS for place in range(SEQ)])
        return {"input_ids": ids, "labels": ids}


def llama() -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, max_position_embeddings=SEQ, **sizes))


def hole(model: nn.Module, at: int) -> None:
    """Let the second block's feed-forward return NaN in training, from its call number `at` on."""
    calls = SimpleNamespace(count=0)

    def spoil(module: nn.Module, args, output: Tensor) -> Tensor:
        calls.count += module.training
        return output * math.nan if module.training and calls.count >= at else output

    model.model.layers[1].mlp.down_proj.register_forward_hook(spoil)


def same(first: nn.Module, second: nn.Module) -> bool:
    pairs = list(zip(first.state_dict().values(), second.state_dict().values(), strict=True))
    return bool(pairs) and all(torch.equal(a, b) for a, b in pairs)


def kinds(folder: Path) -> list[str]:
    return [event["kind"] for event in read_history(folder / "record.jsonl")]


def last_reason(folder: Path) -> str:
    event = read_history(folder / "record.jsonl")[-1]
    assert event["kind"] == "end"
    return event["reason"]


# Trainer of transformers ----------------------------------------------------------------------------------------------


def trainer(folder: Path, callback=None, prepare=None, kind=Trainer, **settings) -> Trainer:
    set_seed(0)
    model = llama()
    if prepare is not None:
        prepare(model)
    chosen = {
        "output_dir": str(folder), "max_steps": 9, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1,
        "report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "dataloader_pin_memory": False,
    } | settings  # fmt: skip
    callbacks = [] if callback is None else [callback]
    return kind(model, TrainingArguments(**chosen), train_dataset=Tokens(), eval_dataset=Tokens(), callbacks=callbacks)


def logged(of: Trainer, name: str) -> list[float]:
    return [entry[name] for entry in of.state.log_history if name in entry]


@pytest.mark.parametrize("accumulated", [slow(1), 3, slow(4)])
def test_trainer_callback_records_its_steps_and_losses(tmp_path: Path, accumulated: int) -> None:
    """Six batches an epoch, and evaluations in between."""
    settings = {"gradient_accumulation_steps": accumulated, "eval_strategy": "steps", "eval_steps": 2}
    bare = trainer(tmp_path / "bare", **settings)
    bare.train()
    callback = TrainerCallback(every=4)
    watched = trainer(tmp_path / "watched", callback, **settings)
    watched.train()
    steps = callback.watch.history.steps
    assert [step.step for step in steps] == list(range(1, 10))
    assert [step.loss for step in steps] == logged(watched, "loss") == logged(bare, "loss")
    assert [step.grad_norm for step in steps] == pytest.approx(logged(watched, "grad_norm"), rel=1e-5)
    assert [sample.step for sample in callback.watch.history.samples] == [1, 4, 8]
    assert same(bare.model, watched.model)
    assert logged(watched, "eval_loss") == logged(bare, "eval_loss") != []


def test_trainer_writes_a_record_and_a_report_into_its_folder(tmp_path: Path) -> None:
    trainer(tmp_path, TrainerCallback(every=4)).train()
    assert kinds(tmp_path)[0] == "watch"
    assert last_reason(tmp_path) == "done"
    assert "LlamaForCausalLM" in (tmp_path / "report.html").read_text()


def opened(folder: Path) -> dict:
    """The record's first event."""
    return read_history(folder / "record.jsonl")[0]


def test_trainer_callback_records_the_settings_and_the_name_of_the_run(tmp_path: Path) -> None:
    callback = TrainerCallback(config={"corpus": "mine", "seed": 3}, replicas=False, report=False)
    trainer(tmp_path / "named", callback, run_name="a run", max_steps=1, lr_scheduler_type="cosine").train()
    event = opened(tmp_path / "named")
    assert event["name"] == "a run"
    expected = {"learning_rate": 1e-2, "per_device_train_batch_size": 4, "lr_scheduler_type": "cosine", "max_steps": 1}
    assert event["config"].items() >= (expected | {"corpus": "mine", "seed": 3}).items()
    assert callback.watch._replicas is False
    trainer(tmp_path / "plain", TrainerCallback(report=False), max_steps=1).train()
    assert "name" not in opened(tmp_path / "plain"), "the folder's name is the title"
    trainer(tmp_path / "both", TrainerCallback(report=False, name="mine"), run_name="a run", max_steps=1).train()
    assert opened(tmp_path / "both")["name"] == "mine"


@pytest.mark.parametrize("wrong", [{"config": 3}, {"config": {1: 2}}, {"name": 7}])
def test_wrong_config_and_name_are_refused_before_training(wrong: dict[str, object]) -> None:
    of_accelerate = lambda **given: in_accelerate.watch(Accelerator(cpu=True), llama(), **given)  # noqa: E731
    for make in (TrainerCallback, LightningCallback, of_accelerate):
        with pytest.raises(ConfigError):
            make(**wrong)


@pytest.mark.slow
def test_trainer_callback_writes_to_a_given_folder_without_report(tmp_path: Path) -> None:
    trainer(tmp_path / "run", TrainerCallback(folder=tmp_path / "mine", report=False)).train()
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["record.jsonl"]
    assert not (tmp_path / "run" / "record.jsonl").exists()


def test_trainer_callback_records_a_nan_that_the_trainer_hides(tmp_path: Path) -> None:
    callback = TrainerCallback(every=2)
    faulty = trainer(tmp_path, callback, prepare=lambda model: hole(model, at=6))
    faulty.train()
    assert all(math.isfinite(loss) for loss in logged(faulty, "loss"))
    steps = callback.watch.history.steps
    assert [math.isnan(step.loss) for step in steps] == [False] * 5 + [True] * 4
    first = next(alarm for alarm in callback.alarms if alarm.severity == "fail")
    assert (first.rule, first.layer) == ("nonfinite", "model.layers.1.mlp")
    assert "alarms" in kinds(tmp_path)


@pytest.mark.slow
def test_trainer_callback_resumes_at_the_checkpoint(tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 4, "max_steps": 8}
    trainer(tmp_path, TrainerCallback(every=3), **settings).train()
    callback = TrainerCallback(every=3)
    again = trainer(tmp_path, callback, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert [step.step for step in callback.watch.history.steps] == [5, 6, 7, 8]
    resumes = [event["step"] for event in read_history(tmp_path / "record.jsonl") if event["kind"] == "resume"]
    assert resumes == [4]


class OwnLoss(Trainer):
    """Computes its loss from the logits alone, and raises in a given training step."""

    fails_at = 0
    steps = 0

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        self.steps += model.training
        if self.steps == self.fails_at:
            raise RuntimeError("a batch that can't be read")
        logits = model(**inputs).logits
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())
        return (loss, logits) if return_outputs else loss


@pytest.mark.slow
def test_trainer_losses_that_the_model_does_not_compute_are_unknown(tmp_path: Path) -> None:
    callback = TrainerCallback()
    trainer(tmp_path, callback, kind=OwnLoss).train()
    assert len(callback.watch.history.steps) == 9
    assert all(math.isnan(step.loss) for step in callback.watch.history.steps)


@pytest.mark.slow
def test_followed_trainer_records_any_loss(tmp_path: Path) -> None:
    callback = TrainerCallback()
    watched = trainer(tmp_path, callback, kind=OwnLoss, gradient_accumulation_steps=2)
    callback.follow(watched)
    watched.train()
    assert [step.loss for step in callback.watch.history.steps] == logged(watched, "loss")


def test_loss_of_a_grad_scaler_is_recorded_unscaled(tmp_path: Path) -> None:
    """fp16 needs a GPU in the Trainer, so its hook is called here as the Trainer would: two batches, scaled."""
    model, callback = llama(), TrainerCallback()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    handle = callback._read_losses(model, scaler)
    losses = []
    for index in (0, 1):
        batch = {name: tokens[None] for name, tokens in Tokens()[index].items()}
        loss = model(**batch).loss
        losses.append(loss.item())
        scaler.scale(loss / 2).backward()
        with torch.no_grad():
            model(**batch)
    handle.remove()
    assert callback._losses.take().item() == pytest.approx(sum(losses) / 2, rel=1e-6)
    assert hooks_left(model) == 0


def test_trainer_exception_closes_the_record_of_a_followed_one(tmp_path: Path) -> None:
    callback = TrainerCallback(every=2)
    watched = trainer(tmp_path, callback, kind=OwnLoss)
    watched.fails_at = 4
    callback.follow(watched)
    with pytest.raises(RuntimeError, match="can't be read"):
        watched.train()
    assert last_reason(tmp_path) == "RuntimeError: a batch that can't be read"
    assert len(callback.watch.history.steps) == 3
    assert hooks_left(watched.model) == 0


@pytest.mark.slow
def test_trainer_exception_closes_the_record_within_the_callback(tmp_path: Path) -> None:
    callback = TrainerCallback(every=2)
    watched = trainer(tmp_path, callback, kind=OwnLoss)
    watched.fails_at = 4
    with pytest.raises(RuntimeError, match="can't be read"), callback:
        watched.train()
    assert last_reason(tmp_path) == "RuntimeError: a batch that can't be read"
    assert (tmp_path / "report.html").exists()


@pytest.mark.slow
def test_trainer_can_train_again_after_an_exception(tmp_path: Path) -> None:
    callback = TrainerCallback(every=2)
    watched = trainer(tmp_path, callback, kind=OwnLoss)
    watched.fails_at = 4
    with pytest.raises(RuntimeError, match="can't be read"):
        watched.train()
    watched.fails_at = 0
    watched.train()
    assert [step.step for step in callback.watch.history.steps] == list(range(1, 10))
    reasons = [event["reason"] for event in read_history(tmp_path / "record.jsonl") if event["kind"] == "end"]
    assert reasons == ["the previous training did not end", "done"]
    assert hooks_left(watched.model) == 0


def test_report_that_cannot_be_written_does_not_end_training(tmp_path: Path) -> None:
    (tmp_path / "report.html").mkdir()
    with pytest.warns(UserWarning, match="could not write the report"):
        result = trainer(tmp_path, TrainerCallback()).train()
    assert result.global_step == 9


def test_callback_refuses_an_invalid_interval() -> None:
    with pytest.raises(ConfigError, match="every"):
        TrainerCallback(every=0)


def hooks_left(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


# Lightning ------------------------------------------------------------------------------------------------------------

# Warnings of Lightning itself, at import and in a run without workers.
quiet_lightning = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers:UserWarning",
    "ignore:.*LeafSpec.*:FutureWarning",
    "ignore:.*treespec, LeafSpec.*:Warning",
)


class Lit(lightning.LightningModule):
    def __init__(self, fails_at: int = 0) -> None:
        super().__init__()
        self.model = llama()
        self.seen: list[float] = []
        self.fails_at = fails_at

    def training_step(self, batch, index):
        if self.fails_at and len(self.seen) == self.fails_at:
            raise RuntimeError("a batch that can't be read")
        loss = self.model(**batch).loss
        self.seen.append(loss.item())
        return loss

    def validation_step(self, batch, index):
        self.log("val_loss", self.model(**batch).loss)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def fit(folder: Path, callback=None, model=None, prepare=None, **settings) -> Lit:
    set_seed(0)
    model = model or Lit()
    if prepare is not None:
        prepare(model.model)
    chosen = {
        "default_root_dir": folder, "max_epochs": 2, "logger": False, "enable_checkpointing": False, "accelerator": "cpu",
        "enable_progress_bar": False, "enable_model_summary": False,
    } | settings  # fmt: skip
    loader = DataLoader(Tokens(), 4)
    lightning.Trainer(**chosen, callbacks=[] if callback is None else [callback]).fit(model, loader, loader)
    return model


@quiet_lightning
@pytest.mark.parametrize("accumulated", [slow(1), 2, slow(4)])
def test_lightning_callback_records_its_steps_and_losses(tmp_path: Path, accumulated: int) -> None:
    """Six batches an epoch: with 4 accumulated the second step of each epoch has two of them."""
    settings = {"accumulate_grad_batches": accumulated, "gradient_clip_val": 0.05}
    bare = fit(tmp_path, **settings)
    callback = LightningCallback(every=2)
    watched = fit(tmp_path, callback, **settings)
    epochs = [watched.seen[:6], watched.seen[6:]]
    parts = [epoch[at : at + accumulated] for epoch in epochs for at in range(0, 6, accumulated)]
    steps = callback.watch.history.steps
    assert [step.step for step in steps] == list(range(1, len(parts) + 1))
    assert [step.loss for step in steps] == pytest.approx([sum(part) / len(part) for part in parts], rel=1e-6)
    assert all(step.grad_norm > 0.05 for step in steps), "norms are those before clipping"
    assert same(bare, watched)
    assert last_reason(tmp_path) == "done"
    assert (tmp_path / "report.html").exists()


@pytest.mark.slow
@quiet_lightning
def test_lightning_callback_raises_alarms(tmp_path: Path) -> None:
    callback = LightningCallback(every=2)
    fit(tmp_path, callback, prepare=lambda model: hole(model, at=6))
    first = next(alarm for alarm in callback.alarms if alarm.severity == "fail")
    assert (first.rule, first.layer) == ("nonfinite", "model.model.layers.1.mlp")


@quiet_lightning
def test_lightning_callback_records_the_settings_and_the_name_of_the_run(tmp_path: Path) -> None:
    callback = LightningCallback(config={"corpus": "mine"}, replicas=False, report=False, folder=tmp_path)
    model = Lit()
    model.save_hyperparameters({"rate": 0.01, "widths": (16, 32)})
    fit(tmp_path, callback, model, logger=CSVLogger(tmp_path, name="a run"), max_epochs=1, log_every_n_steps=1)
    event = opened(tmp_path)
    assert event["name"] == "a run"
    expected = {"max_epochs": 1, "precision": "32-true", "rate": 0.01, "widths": [16, 32], "corpus": "mine"}
    assert event["config"].items() >= expected.items()
    assert callback.watch._replicas is False
    fit(tmp_path / "plain", LightningCallback(report=False, folder=tmp_path / "plain"), max_epochs=1)
    assert "name" not in opened(tmp_path / "plain")


@quiet_lightning
def test_lightning_exception_closes_the_record(tmp_path: Path) -> None:
    callback = LightningCallback(every=2)
    model = Lit(fails_at=4)
    with pytest.raises(RuntimeError, match="can't be read"):
        fit(tmp_path, callback, model)
    assert last_reason(tmp_path) == "RuntimeError: a batch that can't be read"
    assert len(callback.watch.history.steps) == 4
    assert hooks_left(model) == 0


class Manual(Lit):
    """Two batches a step, by hand."""

    automatic_optimization = False

    def training_step(self, batch, index):
        loss = super().training_step(batch, index)
        self.manual_backward(loss)
        if index % 2:
            optimizer = self.optimizers()
            optimizer.step()
            optimizer.zero_grad()
        return loss


@pytest.mark.slow
@quiet_lightning
def test_lightning_manual_optimization_is_recorded(tmp_path: Path) -> None:
    callback = LightningCallback(every=2)
    model = fit(tmp_path, callback, Manual())
    pairs = [(a + b) / 2 for a, b in zip(model.seen[::2], model.seen[1::2], strict=True)]
    assert [step.loss for step in callback.watch.history.steps] == pytest.approx(pairs, rel=1e-6)


# The precision that the trainer's settings ask for ---------------------------------------------------------------------


def lost(callback) -> list[int]:
    return [alarm.step for alarm in callback.alarms if alarm.rule == "autocast-lost"]


def without_autocast(model: nn.Module) -> None:
    """Let the model leave autocast at its beginning, as a decorator for float32 does."""
    model.forward = torch.autocast("cpu", enabled=False)(model.forward)


@pytest.mark.parametrize(("prepare", "expected"), [(None, []), (without_autocast, [3])])
def test_trainer_with_bf16_is_compared_with_what_runs(tmp_path: Path, prepare, expected: list[int]) -> None:
    callback = TrainerCallback(every=4, report=False)
    trainer(tmp_path, callback, prepare, bf16=True).train()
    assert callback.watch.history.facts.precision == "bfloat16"
    assert lost(callback) == expected


@quiet_lightning
def test_lightning_with_bf16_runs_with_autocast(tmp_path: Path) -> None:
    callback = LightningCallback(every=2, report=False, folder=tmp_path)
    fit(tmp_path, callback, precision="bf16-mixed")
    assert callback.watch.history.facts.precision == "bfloat16"
    assert lost(callback) == []


# Accelerate -----------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps its settings for the whole process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def loop(accumulated: int, watched: bool, at_nan: int = 0, precision: str = "no", **settings):
    """An Accelerate loop as its documentation writes it: (model, losses of the steps, the watch)."""
    set_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulated, mixed_precision=precision)
    model = llama()
    if at_nan:
        hole(model, at_nan)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(Tokens(), 4))
    w = in_accelerate.watch(accelerator, model, optimizer, **{"every": 2, **settings}).open() if watched else None
    means, batches = [], []
    for _ in range(2):
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                if w is not None:
                    w.step(loss)
            batches.append(loss.item())
            if accelerator.sync_gradients:
                means.append(sum(batches) / len(batches))
                batches = []
    if w is not None:
        w.close()
    return model, means, w


@pytest.mark.parametrize(("accumulated", "precision"), [slow(1, "no"), slow(4, "no"), (2, "bf16")])
def test_accelerate_watch_counts_optimizer_steps(accumulated: int, precision: str) -> None:
    bare, _, _ = loop(accumulated, watched=False, precision=precision)
    model, means, w = loop(accumulated, watched=True, precision=precision)
    assert [step.step for step in w.history.steps] == list(range(1, len(means) + 1))
    assert [step.loss for step in w.history.steps] == pytest.approx(means, rel=1e-5)
    assert all(step.lr == 1e-2 for step in w.history.steps)
    assert w.history.facts.optimizer == "AdamW"
    assert {"update_ratio", "adam_ratio", "grad_norm"} <= set(w.history.samples[0].signals)
    assert w.history.facts.precision == {"bf16": "bfloat16", "no": None}[precision]
    assert lost(w) == []
    assert same(bare, model)


def test_accelerate_watch_records_the_settings_and_the_name_of_the_run(tmp_path: Path) -> None:
    _, _, w = loop(2, watched=True, folder=tmp_path, config={"corpus": "mine"}, name="a run", replicas=False)
    event = opened(tmp_path)
    assert event["name"] == "a run"
    expected = {"mixed_precision": "no", "gradient_accumulation_steps": 2, "num_processes": 1, "corpus": "mine"}
    assert event["config"] == expected
    assert w._replicas is False


@pytest.mark.slow
def test_accelerate_watch_raises_alarms(tmp_path: Path) -> None:
    _, _, w = loop(1, watched=True, at_nan=6, folder=tmp_path)
    first = next(alarm for alarm in w.alarms if alarm.severity == "fail")
    assert (first.rule, first.layer) == ("nonfinite", "model.layers.1.mlp")
    assert last_reason(tmp_path) == "done"


def test_accelerate_watch_accepts_several_optimizers_and_none() -> None:
    accelerator = Accelerator(cpu=True)
    model = llama()
    first, second = (
        torch.optim.SGD([parameter], lr=rate) for parameter, rate in zip(model.parameters(), (0.1, 0.2), strict=False)
    )
    prepared = accelerator.prepare(model, first, second)
    with in_accelerate.watch(accelerator, prepared[0], prepared[1:]) as w:
        assert w.history.facts.optimizer == "SGD"
    with in_accelerate.watch(accelerator, prepared[0]) as w:
        assert w.history.facts.optimizer is None


def test_accelerate_watch_refuses_another_first_argument() -> None:
    with pytest.raises(ConfigError, match=r"accelerate\.Accelerator, got LlamaForCausalLM"):
        in_accelerate.watch(llama(), llama())


def test_accelerate_step_after_close_is_refused() -> None:
    accelerator = Accelerator(cpu=True)
    w = in_accelerate.watch(accelerator, llama())
    with pytest.raises(RunError, match="not open"):
        w.step(1.0)


# Without the packages -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "hidden", "remedy"),
    [
        ("transformers", ["transformers"], 'pip install "transformers[torch]"'),
        ("lightning", ["lightning.pytorch", "pytorch_lightning"], "pip install lightning"),
        ("accelerate", ["accelerate"], "pip install accelerate"),
    ],
)
def test_missing_package_is_an_error_with_its_name(
    module: str, hidden: list[str], remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in hidden:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"omninorm.monitor.callbacks.{module}")
    with pytest.raises(MissingExtraError) as error:
        importlib.import_module(f"omninorm.monitor.callbacks.{module}")
    assert module in error.value.invariant
    assert remedy in error.value.remedy


def test_callback_before_training_has_no_alarms() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with TrainerCallback() as callback:
            assert callback.alarms == []
