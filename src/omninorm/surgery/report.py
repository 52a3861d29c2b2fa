"""What an operation did, and the way back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor, nn


@dataclass
class Report:
    """changed: name → what was done; refused: name → why not."""

    changed: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


@dataclass
class Surgery(Report):
    """As `Report`, of an operation that changes weights; `undo` restores them bit for bit.

    error: the largest difference of float64 outputs before and after, over the largest output; see `verify`.
    """

    error: float = 0.0
    _steps: list[Callable[[], None]] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Restores every weight, and every module that was replaced."""
        while self._steps:
            self._steps.pop()()

    def later(self, step: Callable[[], None]) -> None:
        """Has a step taken by `undo`, before those that were given earlier."""
        self._steps.append(step)

    def keep(self, parameter: Tensor) -> None:
        """Remembers a parameter's values before they are changed."""
        before = parameter.detach().clone()

        def restore() -> None:
            parameter.data.copy_(before)

        self._steps.append(restore)

    def set_parameter(self, module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        """Puts another parameter in the place of a module's."""
        before = module._parameters.get(name)
        module._parameters[name] = parameter
        self._steps.append(lambda: module._parameters.__setitem__(name, before))

    def set_module(self, parent: nn.Module, name: str, module: nn.Module) -> None:
        """Puts another module in a place."""
        before = parent._modules[name]
        parent._modules[name] = module
        self._steps.append(lambda: parent._modules.__setitem__(name, before))
