"""Hook: a module hook that neither deep copies nor pickled models carry along."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

HOOK_TABLES = ("_forward_hooks", "_forward_pre_hooks")
_SWEEPER = "omninorm.monitor.hooks"


class Hook:
    """A monitoring hook of a module. A copied model is not monitored.

    A deep copy (for an average of the weights, for example) is made without the hook. In a pickled model a function of
    the standard library takes its place, which accepts any arguments and returns None: the file loads without omninorm.
    """

    def __init__(self, function: Callable[..., Any], module: nn.Module) -> None:
        self.function, self._module = function, weakref.ref(module)

    def __call__(self, *args: Any) -> Any:
        return None if torch.jit.is_tracing() else self.function(*args)  # type: ignore[no-untyped-call,attr-defined]

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (nullcontext(), "__exit__")

    def __deepcopy__(self, memo: dict[Any, Any]) -> CopiedHook:
        module = self._module()
        if module is not None and id(module) in memo:
            memo.setdefault(_SWEEPER, Sweeper()).modules.append(memo[id(module)])
        return CopiedHook()


class QuietHook(Hook):
    """A hook that torch.compile leaves out of its graphs."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any) -> Any:
        return super().__call__(*args)


class CopiedHook:
    """Takes the place of a hook in a deep copy until the copy is complete."""

    def __call__(self, *args: Any) -> None:
        return None


class Sweeper:
    """Removes the hooks from copied modules. It lives in the memo of a deep copy, and is deleted with it at the end:
    only then do the copies have their tables of hooks."""

    def __init__(self) -> None:
        self.modules: list[nn.Module] = []

    def __del__(self) -> None:
        for module in self.modules:
            for table in HOOK_TABLES:
                hooks = vars(module).get(table, {})
                for key in [key for key, hook in hooks.items() if isinstance(hook, CopiedHook)]:
                    del hooks[key]
                    vars(module).get(f"{table}_with_kwargs", {}).pop(key, None)
