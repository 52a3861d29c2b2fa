"""Symbolic tracing: torch.fx sees a norm as a leaf, and torch.jit.script gets a clear error."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import nn
from torch.fx import Proxy, Tracer

from omninorm.errors import InputError

__all__ = ["Proxy", "record_leaf", "refuse_scripting"]


def record_leaf(norm: nn.Module, owner: type[nn.Module], x: Proxy) -> Any:
    """Record the call of a norm as one `call_module` node, as torch.fx does for the modules of torch.nn.

    Args:
        norm: the norm whose forward pass is being traced.
        owner: the class whose `forward` is running.
        x: its input.

    Returns:
        The node's proxy. None if the node would not compute the same, so that the norm's formula must be recorded
        instead: the norm is the model that is traced, a subclass adds something to its forward, or it has forward
        hooks, its own or global ones, which are traced already.
    """
    tracer = x.tracer
    every = torch.nn.modules.module
    if (
        not isinstance(tracer, Tracer)
        or norm is tracer.root
        or type(norm).forward is not owner.forward
        or "forward" in vars(norm)
        or norm._forward_hooks
        or norm._forward_pre_hooks
        or every._global_forward_hooks
        or every._global_forward_pre_hooks
    ):
        return None
    return tracer.create_proxy("call_module", tracer.path_of_module(norm), (x,), {})


def refuse_scripting(norm: nn.Module) -> NoReturn:
    """Raise InputError; assigned to `__prepare_scriptable__`, which torch.jit.script calls before it compiles."""
    remedy = "use torch.jit.trace, torch.export or torch.compile, or build the model with a norm of torch.nn"
    raise InputError(f"torch.jit.script can't compile omninorm's {type(norm).__name__}", "", remedy)
