"""Training of one model by several processes under `torchrun`; each process computes a part of every batch.

The model is either replicated, and DistributedDataParallel averages its gradients, or sharded by FSDP2. The first
process writes the run and broadcasts what it has read. A run can be resumed with another number of processes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from omninorm.config import check_choice
from omninorm.device import find_device, find_devices
from omninorm.errors import ConfigError, OmninormError, RunError
from omninorm.experiments.sharding import shard
from omninorm.monitor.tensors import reshard

PARALLEL = ("ddp", "fsdp")
_CPU = torch.device("cpu")
_Value = TypeVar("_Value")


class SilentExit(Exception):  # noqa: N818  not an error of this process
    """Ends a process without a message, because another one has already reported why all of them end."""


@dataclass(frozen=True)
class Processes:
    """The group of training processes, seen from this process.

    Args:
        rank: the number of this process, from 0.
        count: the number of processes; with 1, nothing is communicated and the model is not sharded.
        parallel: "ddp" replicates the model, "fsdp" shards every tensor.
        device: the device of this process. On GPUs, each process of a machine has a separate one.
    """

    rank: int = 0
    count: int = 1
    parallel: str = "ddp"
    device: torch.device = _CPU

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        """Return whether each process has only a part of the model."""
        return self.count > 1 and self.parallel == "fsdp"

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the model to call, with gradients averaged over the processes; use it before making the optimizer."""
        if self.sharded:
            return shard(model)
        if self.count == 1:
            return model
        return DistributedDataParallel(model, device_ids=None if self.device.type == "cpu" else [self.device])

    def accumulating(self, model: nn.Module, last: bool) -> AbstractContextManager[object]:
        """Return a context for a micro-batch. Gradients are averaged only in the `last` micro-batch of a step."""
        model = getattr(model, "_orig_mod", model)  # the model inside a compiled one
        if self.sharded:
            model.set_requires_gradient_sync(last)  # type: ignore[operator]
        elif isinstance(model, DistributedDataParallel) and not last:
            return model.no_sync()
        return nullcontext()

    def share(self, batch: Tensor) -> Tensor:
        """Return the rows of this process."""
        return batch.chunk(self.count)[self.rank]

    def mean(self, value: Tensor) -> Tensor:
        """Return the mean over the processes, the same number on each. The host does not wait for a GPU."""
        return sum(self._all(value), torch.zeros_like(value)) / self.count

    def largest(self, value: int) -> int:
        """Return the largest number of all processes; it is exchanged on the host."""
        return int(max(float(each) for each in self._all(torch.tensor(float(value), dtype=torch.float64))))

    def from_first(self, compute: Callable[[], _Value]) -> _Value:
        """Return on all processes the JSON value that the first one computes. If it raises OmninormError, all end."""
        if self.count == 1:
            return compute()
        value, failure = None, None
        if self.first:
            try:
                value = compute()
            except OmninormError as error:
                failure = error
        message = self._broadcast({"value": value, "failed": failure is not None})
        if failure is not None:
            raise failure
        if message["failed"]:
            raise SilentExit
        return message["value"]  # type: ignore[no-any-return]

    def evaluate(self, model: nn.Module, compute: Callable[[], float]) -> float:
        """Return an evaluation. The first process computes it, or all of them together if the model is sharded."""
        if not self.sharded:
            return self.from_first(compute)
        value = compute()
        reshard(model)
        return value

    def check_batch(self, batch_size: int) -> None:
        """Raise ConfigError unless the sequences of a micro-batch can be divided evenly among the processes."""
        if batch_size % self.count:
            invariant = f"batch_size must be a multiple of the {self.count} processes"
            raise ConfigError(invariant, batch_size, "choose another batch size or number of processes")

    def _broadcast(self, message: dict[str, Any]) -> dict[str, Any]:
        """Return the first process's message, sent as JSON so that nothing is unpickled."""
        content = torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8)
        size = torch.tensor([len(content)])
        dist.broadcast(size, src=0)
        if not self.first:
            content = torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(content, src=0)
        received: dict[str, Any] = json.loads(bytes(content.tolist()))
        return received

    def _all(self, value: Tensor) -> list[Tensor]:
        if self.count == 1:
            return [value]
        everyone = [torch.empty_like(value) for _ in range(self.count)]
        dist.all_gather(everyone, value)
        return everyone


def launched() -> bool:
    """Return whether torchrun or a launcher that sets the same variables started this process and others."""
    return os.environ.get("WORLD_SIZE", "1") != "1" and "RANK" in os.environ


@contextmanager
def joined(parallel: str = "ddp", device: str = "cpu") -> Iterator[Processes]:
    """Join the other processes, if there are any, and leave the group at the end.

    Tensors on GPUs are exchanged by NCCL (RCCL on AMD), and those on the host by gloo.

    Args:
        parallel: "ddp" or "fsdp".
        device: a name as in `find_devices`; "auto" and "cuda" give each process of a machine a separate GPU.

    Raises:
        ConfigError: `parallel` is unknown, or the device is not available to this process.
        RunError: the other processes can't be reached, or one of them is gone.
    """
    check_choice("parallel", parallel, PARALLEL)
    if not launched():
        yield Processes(device=find_device(device))
        return
    own = own_device(device, int(os.environ.get("LOCAL_RANK", os.environ["RANK"])))
    on_cpu = own.type == "cpu"
    if not on_cpu:
        torch.accelerator.set_device_index(own.index)
    try:
        dist.init_process_group("gloo" if on_cpu else f"cpu:gloo,{own.type}:nccl")
    except (RuntimeError, ValueError) as error:
        remedy = "start the command with torchrun: torchrun --nproc-per-node 2 -m omninorm train …"
        raise RunError(f"The processes of this run can't reach each other ({_short(error)})", "", remedy) from error
    try:
        processes = Processes(dist.get_rank(), dist.get_world_size(), parallel, own)
        yield processes
        processes.largest(0)  # keep the group alive until all processes are done
    except RuntimeError as error:
        if not _is_lost(error):
            raise
        remedy = "resume the run with --resume and its folder; the newest checkpoint is complete"
        raise RunError(f"Another process of this run is gone ({_short(error)})", "", remedy) from error
    finally:
        dist.destroy_process_group()


def own_device(name: str, number: int) -> torch.device:
    """Return the device of the process with this number among those of its machine.

    Raises:
        ConfigError: the device cannot be used, several processes would share it, or there are more processes than GPUs.
        SilentExit: another process raises this error.
    """
    try:
        devices = find_devices(name)
        if devices[0].type == "cpu":
            return devices[0]
        if ":" in name or devices[0].index is None:
            remedy = "leave the number of the GPU out, or use the device cpu"
            raise ConfigError("The processes under torchrun need a GPU each", f"the device {name} for all", remedy)
    except ConfigError as error:
        raise (SilentExit if number else error) from None
    if number < len(devices):
        return devices[number]
    invariant = f"The processes under torchrun need a GPU each, and this machine has {len(devices)}"
    remedy = f"start torchrun with --nproc-per-node {len(devices)}, or use the device cpu"
    raise ConfigError(invariant, f"{number + 1} processes", remedy) if number == len(devices) else SilentExit


def _is_lost(error: RuntimeError) -> bool:
    """Return whether the other side of a connection is gone."""
    text = str(error)
    return isinstance(error, dist.DistError) or any(
        word in text for word in ("gloo", "NCCL", "Connection closed", "reset by peer")
    )


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]
