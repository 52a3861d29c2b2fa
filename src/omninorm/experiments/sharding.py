"""FSDP2: sharding of a model over processes, and files that all processes write together.

The parts of torch that are needed for this take half a second to import, so they are imported where they are used.
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
    """Shard a model's parameters over all processes, in place; each block is gathered while it is computed."""
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
    """Copy a whole tensor into one that may be sharded. Every process passes the whole `value` and copies its part."""
    if is_distributed(target):
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(target, DTensor)
        value = distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(value)


def save_parts(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write this process's part of the tensors to a safetensors file; all processes must call this.

    Raises:
        OSError: a process could not write; all processes raise it.
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
    """Return the names, shapes and dtypes of the tensors that `save_parts` wrote, as tensors without content.

    Raises:
        Exception: the files are not in safetensors format; these are exceptions of the library.
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
    """Load what `save_parts` wrote into tensors, which may be whole or sharded over another number of processes."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = HuggingFaceStorageReader(str(folder))
    alone = not dist.is_initialized()
    with warnings.catch_warnings():
        if alone:
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
        load(dict(tensors), storage_reader=reader, no_dist=alone)


def _cause(error: Any) -> OSError:
    """Return the system error inside torch's CheckpointException, or an OSError with its message."""
    for failure, _ in error.failures.values():
        if isinstance(failure, OSError):
            return failure
    return OSError(0, " ".join(str(error).split())[-200:])
