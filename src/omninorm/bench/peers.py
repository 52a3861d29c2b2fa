"""The peers, other implementations of the norms: torch.nn, torch.compile, transformers and onnxruntime."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import omninorm

EPS = 1e-6


class Unavailable(Exception):  # noqa: N818 not an error: it is reported, and the benchmark continues
    """A peer can't be measured; the message is the reason."""


def our_rms_norm(width: int, dtype: torch.dtype) -> nn.Module:
    return omninorm.RMSNorm(width, EPS, dtype=dtype)


def our_layer_norm(width: int, dtype: torch.dtype) -> nn.Module:
    return omninorm.LayerNorm(width, EPS, dtype=dtype)


def torch_rms_norm(width: int, dtype: torch.dtype) -> nn.Module:
    return nn.RMSNorm(width, EPS, dtype=dtype)


def torch_layer_norm(width: int, dtype: torch.dtype) -> nn.Module:
    return nn.LayerNorm(width, EPS, dtype=dtype)


def llama_rms_norm(width: int, dtype: torch.dtype) -> nn.Module:
    """Build Llama's or Qwen3's RMSNorm; raise Unavailable if transformers is not installed."""
    need_transformers()
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    module: nn.Module = LlamaRMSNorm(width, EPS).to(dtype)
    return module


def qwen3_rms_norm(width: int, dtype: torch.dtype) -> nn.Module:
    """Build Llama's or Qwen3's RMSNorm; raise Unavailable if transformers is not installed."""
    need_transformers()
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    module: nn.Module = Qwen3RMSNorm(width, EPS).to(dtype)
    return module


def need_transformers() -> None:
    """Raise Unavailable if transformers is not installed."""
    if importlib.util.find_spec("transformers") is None:
        raise Unavailable('transformers is not installed: pip install "omninorm[interop]"')


def need_compiler() -> None:
    """Raise Unavailable if there is no C++ compiler for torch.compile."""
    if not any(shutil.which(name) for name in (os.environ.get("CXX") or "g++", "clang++")):
        raise Unavailable("torch.compile needs a C++ compiler: install g++ or clang++")


def compiled(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """Compile the module with torch.compile, once for each shape.

    Raises:
        Unavailable: there is no C++ compiler.
    """
    need_compiler()
    torch._dynamo.config.recompile_limit = 64
    call: Callable[[Tensor], Tensor] = torch.compile(module, dynamic=False)
    return call


def onnx_rms_norm(rows: int, width: int, dtype: torch.dtype, threads: int) -> Callable[[Tensor], Any]:
    """Return onnxruntime's RMSNorm as a function of a tensor; it reads the tensor's memory without a copy.

    Raises:
        Unavailable: onnxruntime is not installed, or has no kernel for the dtype.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        raise Unavailable("onnxruntime is not installed: pip install onnxruntime")
    if dtype not in (torch.float32, torch.float16):
        raise Unavailable("onnxruntime has no RMSNorm in bf16 on the CPU")
    import onnxruntime  # type: ignore[import-not-found,unused-ignore]

    from omninorm.bench.onnx_model import rms_norm_model

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    model = rms_norm_model(rows, width, EPS, half=dtype == torch.float16)
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    weight = torch.ones(width, dtype=dtype).numpy()
    return lambda x: session.run(None, {"x": x.detach().numpy(), "weight": weight})[0]
