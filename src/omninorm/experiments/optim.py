"""The optimizers of training: AdamW, or Muon for hidden matrices with AdamW for the other parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import nn

from omninorm.errors import ConfigError
from omninorm.experiments.settings import TrainConfig
from omninorm.layers import param_groups
from omninorm.layers.groups import decayed_names
from omninorm.placement import keep_normalized


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Return the optimizer that `config` names, with weight decay by `param_groups`.

    AdamW is fused into one kernel, because small deep models have many small tensors.

    Raises:
        ConfigError: Muon for a model that has no hidden matrix.
    """
    groups = param_groups(model, config.weight_decay, decay_norms=config.decay_norms)
    adamw: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.adam_eps, "fused": True}
    optimizer: torch.optim.Optimizer
    if config.optimizer == "muon":
        optimizer = MuonWithAdamW(hidden_matrices(model), groups, config.weight_decay, adamw)
    else:
        optimizer = torch.optim.AdamW(groups, **adamw)
    keep_normalized(model, optimizer)
    return optimizer


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Return the trainable matrices between the embeddings and the output layer, which Muon is meant for.

    They are the two-dimensional parameters that weight decay applies to (see `param_groups`), without the output
    layer: a matrix with as many rows as an embedding.
    """
    rows = {module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)}
    decayed = decayed_names(model)
    return [
        parameter
        for name, parameter in model.named_parameters()
        if name in decayed and parameter.requires_grad and parameter.ndim == 2 and parameter.shape[0] not in rows
    ]


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for some matrices and AdamW for all other parameters, with one learning rate for both.

    Muon (Jordan 2024) replaces the momentum B of a matrix's gradient by the nearest matrix O whose singular values are
    about 1: W ← W − η·(λW + 0.2·√max(rows, columns)·O). With this factor (Liu 2025, arXiv 2502.16982) the root mean
    square of an update is about AdamW's, so that AdamW's learning rate and weight decay suit both.

    Args:
        matrices: two-dimensional parameters for Muon.
        groups: AdamW's parameter groups; the matrices are taken out of them.
        weight_decay: Muon's λ.
        adamw: AdamW's settings; "lr" is Muon's learning rate as well.

    Raises:
        ConfigError: there is no matrix.
    """

    def __init__(
        self, matrices: list[nn.Parameter], groups: list[dict[str, Any]], weight_decay: float, adamw: dict[str, Any]
    ) -> None:
        if not matrices:
            remedy = 'use optimizer="adamw"'
            raise ConfigError("Muon needs a matrix between the embeddings and the output layer", "none", remedy)
        taken = {id(each) for each in matrices}
        rest = [{**each, "params": [p for p in each["params"] if id(p) not in taken]} for each in groups]
        rest = [each for each in rest if each["params"]]
        muon = torch.optim.Muon(matrices, lr=adamw["lr"], weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        self._parts = [muon, torch.optim.AdamW(rest, **adamw)] if rest else [muon]
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Let the parts work on the groups and the state of this optimizer: one group is Muon's, the others AdamW's."""
        for part, groups in zip(self._parts, (self.param_groups[:1], self.param_groups[1:]), strict=False):
            part.param_groups, part.state = groups, self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            part.step()
        return loss
