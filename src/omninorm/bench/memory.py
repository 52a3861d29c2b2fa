"""Measures the memory that a norm keeps for its backward pass in addition to its input, in bytes per row."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from omninorm.bench import peers
from omninorm.bench.peers import Unavailable
from omninorm.timing import OURS

RMS_KEPT, LAYER_KEPT = "RMSNorm", "LayerNorm"
_NORMS = {
    RMS_KEPT: {
        OURS: peers.our_rms_norm,
        "torch.nn": peers.torch_rms_norm,
        "transformers Llama": peers.llama_rms_norm,
    },
    LAYER_KEPT: {OURS: peers.our_layer_norm, "torch.nn": peers.torch_layer_norm},
}


def kept_per_row(norm: str, rows: int, width: int, dtype: torch.dtype) -> dict[str, float]:
    """Return the bytes per row that every available implementation keeps."""
    found = {}
    for name, make in _NORMS[norm].items():
        try:
            found[name] = kept_bytes(make(width, dtype), torch.randn(rows, width).to(dtype)) / rows
        except Unavailable:
            continue
    return found


def kept_bytes(module: nn.Module, x: Tensor) -> int:
    """Return the bytes that autograd saves in a call, except x, the parameters and the output, which stay alive anyway.

    Views of the same memory count once.
    """
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        saved[_address(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    x = x.detach().requires_grad_()
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = module(x)
    alive = {_address(tensor) for tensor in (x, y, *module.parameters())}
    return sum(size for address, size in saved.items() if address not in alive)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
