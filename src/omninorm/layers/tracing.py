"""Symbolic tracing: torch.fx records a norm as a leaf module, and torch.jit.script raises a clear error."""

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
        x: the norm's input.

    Returns:
        The node's proxy. None if such a node would not compute the same, so that the caller must trace the norm's
        formula instead: if the norm is itself the traced model, if a subclass or the instance overrides `forward`, or
        if there are forward hooks (the norm's or global ones), which have been traced already.
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
    """Raise InputError. Norms have this as `__prepare_scriptable__`, which torch.jit.script calls before compiling."""
    remedy = "use torch.jit.trace, torch.export or torch.compile, or build the model with a norm of torch.nn"
    raise InputError(f"torch.jit.script can't compile omninorm's {type(norm).__name__}", "", remedy)
