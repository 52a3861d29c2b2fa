"""Training: one run of an architecture, in parts that a fault can replace."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from faults.architectures import Architecture, cross_entropy
from faults.balance import Balance
from faults.tasks import HELD_OUT, Batch, padded
from torch import Tensor, nn

from omninorm.layers import param_groups

STEPS, EVERY = 80, 10
MIDDLE, SPREAD = 31, 3
"""A fault in the middle of a run begins at step 31, 34, 37 or 40, depending on the seed."""


@dataclass(frozen=True)
class Options:
    """Settings of a run: those of the optimizer, and of the loop around it."""

    factor: float = 1.0  # multiplies the architecture's learning rate
    kind: str = "adamw"
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    decay: float = 0.1
    clip: float = 1.0
    warmup: int = 10
    micro_batches: int = 1
    autocast: bool = False
    padding: bool = False
    width: int | None = None
    decayed: bool = True  # decay to 10 % at the end of the run
    dropout: float = 0.0  # on the output of every block


VARIANTS: dict[str, Options] = {
    "plain": Options(),
    "half learning rate": Options(factor=0.5),
    "double learning rate": Options(factor=2.0),
    "bf16 autocast": Options(autocast=True),
    "padding": Options(padding=True),
    "two micro-batches": Options(micro_batches=2),
    "SGD": Options(kind="sgd"),
    "SGD, four micro-batches": Options(kind="sgd", micro_batches=4, clip=math.inf),
    "Muon": Options(kind="muon"),
    "width 128": Options(width=128),
    "constant learning rate, no clipping": Options(warmup=1, decayed=False, clip=math.inf, factor=0.5),
    "dropout": Options(dropout=0.1),
    "tiny learning rate": Options(factor=0.01),
}


@dataclass
class Training:
    """A run. A fault replaces its functions, or adds actions before each step and after each backward pass.

    Attributes:
        begins: the first step at which a fault acts.
        layers: the names of the modules at fault; none if the fault concerns the whole run.
    """

    architecture: Architecture
    seed: int
    options: Options = field(default_factory=Options)
    begins: int = 1
    step: int = 0
    layers: tuple[str, ...] = ()
    scaler: Any = None
    before: list[Callable[[], None]] = field(default_factory=list)
    after_backward: list[Callable[[], None]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    evaluations: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.believed = self.options
        torch.manual_seed(self.seed)
        self.model = self.architecture.build(self.options.width or self.architecture.width)
        self.initial = snapshot(self.model)
        if self.options.dropout:
            for block in self.model.get_submodule(self.architecture.layout.blocks).children():
                block.register_forward_hook(self._drop)
        self.balance = Balance(self._routers())
        self.optimizers: list[torch.optim.Optimizer] = []
        self.trained: Callable[[str, nn.Parameter], bool] = lambda name, parameter: True
        self.preprocess: Callable[[Batch], Batch] = lambda batch: batch  # also in evaluations
        self.data: Callable[[int], Batch] = self._data
        self.criterion: Callable[[Tensor, Tensor], Tensor] = cross_entropy
        self.rate: Callable[[int], float] = self._rate
        self.backward: Callable[[Tensor], None] = self._backward
        self.update: Callable[[], None] = self._update
        self.clear: Callable[[], None] = self._clear
        self.evaluating: Callable[[], Any] = self.model.eval
        self.resuming: Callable[[], Any] = self.model.train

    @property
    def faulty(self) -> bool:
        """Return whether the fault acts in this step."""
        return self.step >= self.begins

    @property
    def lr(self) -> float:
        """The largest learning rate of the run."""
        kinds = {"sgd": 25.0, "muon": 1.0, "adamw": 1.0}
        return self.architecture.lr * self.options.factor * kinds[self.options.kind]

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the run as its user believes them: those of its variant, whatever the fault has changed."""
        return {"precision": "bf16" if self.believed.autocast else "fp32"}

    def set(self, **options: Any) -> None:
        """Change options; for faults, before the optimizers are built."""
        self.options = replace(self.options, **options)

    def _routers(self) -> list[nn.Module]:
        path = self.architecture.layout.router
        blocks = self.model.get_submodule(self.architecture.layout.blocks).children()
        modules = [dict(block.named_modules()).get(path) for block in blocks if path is not None]
        return [module for module in modules if module is not None]

    def _drop(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        """Apply dropout to a block's output."""
        first = output[0] if isinstance(output, tuple) else output
        dropped = F.dropout(first, self.options.dropout, self.model.training)
        return (dropped, *output[1:]) if isinstance(output, tuple) else dropped

    # The default parts ------------------------------------------------------------------------------------------------

    def _data(self, step: int) -> Batch:
        a = self.architecture
        batch = self.preprocess(a.task(self.seed, step, a.batch, a.length))
        return padded(batch, self.seed, step) if self.options.padding else batch

    def _rate(self, step: int) -> float:
        warm = min(1.0, step / self.options.warmup)
        return warm * (1.0 - 0.9 * step / STEPS) if self.options.decayed else warm

    def _backward(self, loss: Tensor) -> None:
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def _update(self) -> None:
        for optimizer in self.optimizers:
            if self.scaler is None:
                optimizer.step()
            else:
                self.scaler.step(optimizer)
        if self.scaler is not None:
            self.scaler.update()

    def _clear(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    # The loop ---------------------------------------------------------------------------------------------------------

    def build_optimizers(self) -> None:
        """Build the optimizers from the model, its trainable parameters and the options."""
        chosen = {id(p) for name, p in self.model.named_parameters() if p.requires_grad and self.trained(name, p)}
        groups = [
            {**group, "params": [p for p in group["params"] if id(p) in chosen]}
            for group in param_groups(self.model, self.options.decay)
        ]
        groups = [group for group in groups if group["params"]]
        if self.options.kind == "muon":
            self.optimizers = self._muon(groups)
        elif self.options.kind == "sgd":
            # SGD's decay is multiplied by its much higher learning rate, so it has to be smaller.
            groups = [{**group, "weight_decay": 1e-3 * group["weight_decay"]} for group in groups]
            self.optimizers = [torch.optim.SGD(groups, lr=self.lr, momentum=0.9)]
        else:
            self.optimizers = [torch.optim.AdamW(groups, lr=self.lr, betas=self.options.betas, eps=self.options.eps)]
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group.setdefault("largest_lr", group["lr"])

    def _muon(self, groups: list[dict[str, Any]]) -> list[torch.optim.Optimizer]:
        """Return Muon for the matrices of the blocks, and AdamW for the rest."""
        blocks = self.architecture.layout.blocks
        inside = {id(p) for name, p in self.model.named_parameters() if name.startswith(blocks) and p.ndim == 2}
        matrices = [p for group in groups for p in group["params"] if id(p) in inside]
        rest = [{**group, "params": [p for p in group["params"] if id(p) not in inside]} for group in groups]
        others = [group for group in rest if group["params"]]
        muon = [torch.optim.Muon(matrices, lr=0.02, weight_decay=0.0)] if matrices else []
        return [*muon, *([torch.optim.AdamW(others, lr=self.lr, betas=self.options.betas)] if others else [])]

    def run(self, watched: Any = None, steps: int = STEPS) -> None:
        """Train; `watched` is the open Watch, or None. Fewer steps are the first ones of a whole run."""
        for step in range(1, steps + 1):
            self.step = step
            self._set_rates()
            for act in list(self.before):
                act()
            loss = self._forward_and_backward()
            for act in list(self.after_backward):
                act()
            self._clip()
            self.update()
            self.clear()
            if watched is not None:
                watched.step(loss)
            self.losses.append(float(loss))
            if step % (2 * EVERY) == 0:
                self._evaluate(watched)

    def _set_rates(self) -> None:
        share = self.rate(self.step)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["largest_lr"] * share

    def _forward_and_backward(self) -> Tensor:
        total = torch.zeros(())
        count = self.options.micro_batches
        for part in range(count):
            batch = self.data(self.step if count == 1 else self.step * 10_000 + part)
            loss = self.loss(batch)
            self.backward(self.divided(loss))
            total = total + loss.detach() / count
        return total

    def divided(self, loss: Tensor) -> Tensor:
        """Return a micro-batch's share of the loss."""
        return loss / self.options.micro_batches if self.options.micro_batches > 1 else loss

    def loss(self, batch: Batch) -> Tensor:
        """Return the loss of a batch."""
        with self._precision():
            logits = self.architecture.forward(self.model, batch)
        return self.balance.add_to(self.criterion(logits, batch.labels))

    @contextlib.contextmanager
    def _precision(self) -> Iterator[None]:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.options.autocast):
            yield

    def _clip(self) -> None:
        if math.isfinite(self.options.clip):
            if self.scaler is not None:
                for optimizer in self.optimizers:
                    self.scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip)

    def _evaluate(self, watched: Any) -> None:
        """Measure the loss on text that is not trained on, and report it if the watch takes it."""
        a = self.architecture
        self.evaluating()
        with torch.no_grad():
            batch = a.task(self.seed, HELD_OUT + self.step, 4 * a.batch if not a.on_images else a.batch, a.length)
            loss = float(self.loss(self.preprocess(batch)))
        self.resuming()
        self.evaluations.append(loss)
        if hasattr(watched, "log_eval"):
            watched.log_eval(loss)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of all parameters in float32."""
    return {name: p.detach().float().clone() for name, p in model.named_parameters()}


def middle_of(seed: int) -> int:
    """Return the step at which a fault in the middle of a run begins."""
    return MIDDLE + SPREAD * (seed % 4)
