"""FSDP2: a model whose parameters are spread over the processes, and the files that all of them write at once.

What of torch this needs takes half a second to import, so it is imported where it is used.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from omninorm.kernels.distributed import is_distributed


def shard(model: nn.Module) -> nn.Module:
    """Spreads a model's parameters over all processes, in place: each block is gathered while it computes."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(next(model.parameters()).device.type, (dist.get_world_size(),))
    for blocks in model.children():
        if isinstance(blocks, nn.ModuleList):
            for block in blocks:
                fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def copy_whole(target: Tensor, value: Tensor) -> None:
    """Copies a whole tensor into one that may be spread; each process has `value`, and takes its part."""
    if is_distributed(target):
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(target, DTensor)
        value = distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(value)


def save_parts(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Each process writes its part of the tensors into a safetensors file; all must call this.

    Raises:
        OSError: a process could not write; on each of them.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        save(dict(tensors), storage_writer=writer)
    except CheckpointException as error:
        raise _cause(error) from error


def describe_parts(folder: Path) -> dict[str, Tensor]:
    """Name, shape and dtype of what `save_parts` wrote, as tensors without content.

    Raises:
        Exception: files that are none of safetensors; the library's own.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    metadata: Mapping[str, Any] = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {
        name: torch.empty(each.size, dtype=each.properties.dtype, device="meta")
        for name, each in metadata.items()
        if isinstance(each, TensorStorageMetadata)
    }


def load_parts(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Reads what `save_parts` wrote into tensors, whole ones or spread over another number of processes."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = HuggingFaceStorageReader(str(folder))
    alone = not dist.is_initialized()
    with warnings.catch_warnings():
        if alone:
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
        load(dict(tensors), storage_reader=reader, no_dist=alone)


def _cause(error: Any) -> OSError:
    """What stopped a process: the system's error, if it was one, in torch's CheckpointException."""
    for failure, _ in error.failures.values():
        if isinstance(failure, OSError):
            return failure
    return OSError(0, " ".join(str(error).split())[-200:])
