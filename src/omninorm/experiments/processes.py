"""Several processes that train one model, as `torchrun` starts them: each has its share of every batch.

Each has the whole model, whose gradients DistributedDataParallel averages, or a part of it, by FSDP2. The first process
writes the run and tells the others what only it can know. A run can go on with another number of processes, one too.
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
from omninorm.errors import ConfigError, OmninormError, RunError
from omninorm.experiments.sharding import shard
from omninorm.watch.tensors import reshard

PARALLEL = ("ddp", "fsdp")
_Value = TypeVar("_Value")


class SilentExit(Exception):  # noqa: N818  no error of this process
    """The first process has said why all of them end."""


@dataclass(frozen=True)
class Processes:
    """This process among those that train.

    Args:
        rank: its number, from 0.
        count: how many there are; with 1 nothing is told to anybody, and the model is whole.
        parallel: "ddp", each has the whole model, or "fsdp", each has a part of every tensor.
    """

    rank: int = 0
    count: int = 1
    parallel: str = "ddp"

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        """Whether each has only a part of the model."""
        return self.count > 1 and self.parallel == "fsdp"

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model to call, whose gradients are the mean over the processes. Before an optimizer is made for it."""
        if self.sharded:
            return shard(model)
        return DistributedDataParallel(model) if self.count > 1 else model

    def accumulating(self, model: nn.Module, last: bool) -> AbstractContextManager[object]:
        """Around a micro-batch: gradients are averaged with the last one of a step."""
        if self.sharded:
            model.set_requires_gradient_sync(last)  # type: ignore[operator]
        elif isinstance(model, DistributedDataParallel) and not last:
            return model.no_sync()
        return nullcontext()

    def share(self, batch: Tensor) -> Tensor:
        """This process's rows."""
        return batch.chunk(self.count)[self.rank]

    def mean(self, value: float) -> float:
        """Over the processes, the same number on each."""
        return sum(self._all(value)) / self.count

    def largest(self, value: int) -> int:
        return int(max(self._all(float(value))))

    def from_first(self, compute: Callable[[], _Value]) -> _Value:
        """What the first process computes, a JSON value, on all of them. An OmninormError of its ends all of them."""
        if self.count == 1:
            return compute()
        value, failure = None, None
        if self.first:
            try:
                value = compute()
            except OmninormError as error:
                failure = error
        told = self._tell({"value": value, "failed": failure is not None})
        if failure is not None:
            raise failure
        if told["failed"]:
            raise SilentExit
        return told["value"]  # type: ignore[no-any-return]

    def evaluate(self, model: nn.Module, compute: Callable[[], float]) -> float:
        """What a model says: computed by the first process, or by all where each has a part of the model."""
        if not self.sharded:
            return self.from_first(compute)
        value = compute()
        reshard(model)
        return value

    def check_batch(self, batch_size: int) -> None:
        """Raises ConfigError unless every process gets equally many windows of a micro-batch."""
        if batch_size % self.count:
            received = f"a batch of {batch_size} on {self.count} processes"
            raise ConfigError("every process must get equally many windows", received, "choose a multiple of it")

    def _tell(self, message: dict[str, Any]) -> dict[str, Any]:
        """The first process's message, as JSON: nothing is unpickled."""
        content = torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8)
        size = torch.tensor([len(content)])
        dist.broadcast(size, src=0)
        if not self.first:
            content = torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(content, src=0)
        found: dict[str, Any] = json.loads(bytes(content.tolist()))
        return found

    def _all(self, value: float) -> list[float]:
        if self.count == 1:
            return [value]
        mine = torch.tensor([value], dtype=torch.float64)
        everyone = [torch.empty_like(mine) for _ in range(self.count)]
        dist.all_gather(everyone, mine)
        return [float(each) for each in everyone]


def launched() -> bool:
    """Whether torchrun, or what sets the same variables, started this process with others."""
    return os.environ.get("WORLD_SIZE", "1") != "1" and "RANK" in os.environ


@contextmanager
def joined(parallel: str = "ddp") -> Iterator[Processes]:
    """Meets the other processes, if there are any, and leaves them at the end.

    Raises:
        ConfigError: no such way to train together.
        RunError: they can't be reached, or one of them is gone.
    """
    check_choice("parallel", parallel, PARALLEL)
    if not launched():
        yield Processes()
        return
    try:
        dist.init_process_group("gloo")
    except (RuntimeError, ValueError) as error:
        remedy = "start the command by torchrun: torchrun --nproc-per-node 2 -m omninorm train …"
        raise RunError("the processes of a run must reach each other", _short(error), remedy) from error
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), parallel)
        dist.barrier()  # nobody leaves while another one still asks
    except RuntimeError as error:
        if not _is_lost(error):
            raise
        remedy = "start them again with --resume and the run's folder; the newest checkpoint is whole"
        raise RunError("every process must stay to the end", f"one is gone ({_short(error)})", remedy) from error
    finally:
        dist.destroy_process_group()


def _is_lost(error: RuntimeError) -> bool:
    """Whether the other side of a connection is no longer there."""
    text = str(error)
    return isinstance(error, dist.DistError) or any(
        word in text for word in ("gloo", "Connection closed", "reset by peer")
    )


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]
