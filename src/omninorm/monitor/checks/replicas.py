"""Detects data-parallel replicas whose weights differ.

At each sample every process writes checksums of its weights to the key-value store that `init_process_group` created,
and rank 0 compares those that have arrived. There is no collective operation: a process that does not watch, or that
takes its samples at other steps, can neither block the others nor be waited for.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from omninorm.kernels.distributed import is_distributed
from omninorm.monitor.checks.checksum import checksum
from omninorm.monitor.checks.facts import Replica
from omninorm.monitor.writer import rank, world_size

PER_TENSOR = 1024
# Samples that rank 0 still waits for.
PENDING = 8
# Rank 0 waits at most this long at a sample, and only for processes that have written before: in data-parallel
# training it would wait for them in the next backward pass anyway.
PATIENCE = 0.1
_opened: Counter[str] = Counter()


class Replicas:
    """Compares the weights of all processes, by group of parameters.

    Args:
        model: the model, whose attribute `_ddp_params_and_buffers_to_ignore` names parameters that may differ.
        named: its parameters.
        groups: each group's parameters, as indices into `named`.
    """

    def __init__(
        self, model: nn.Module, named: Sequence[tuple[str, nn.Parameter]], groups: Mapping[str, Sequence[int]]
    ) -> None:
        ignored = set(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
        equal = {at for at, (name, p) in enumerate(named) if name not in ignored and not is_sharded(p)}
        chosen = {group: [named[at][1] for at in places if at in equal] for group, places in groups.items()}
        self._groups = {group: parameters for group, parameters in chosen.items() if parameters}
        description = repr([(name, tuple(p.shape), str(p.dtype)) for name, p in named])
        digest = hashlib.sha256(description.encode()).hexdigest()[:16]
        self._name, self._store = f"omninorm/{digest}", dist.distributed_c10d._get_default_store()
        self._run: str | None = None
        self._written = ""
        if rank() == 0:
            self._run = str(_opened[digest])
            _opened[digest] += 1
            self._store.set(f"{self._name}/run", self._run)
        self._pending: dict[int, list[float]] = {}
        self._differ: dict[int, Replica] = {}
        self._equal: dict[int, int] = {}
        self._answered = False

    def measure(self) -> Tensor | None:
        """Return a checksum of some weights of each group: (groups,)."""
        if not self._groups:
            return None
        return torch.stack([checksum(parameters, PER_TENSOR).cpu() for parameters in self._groups.values()])

    def exchange(self, step: int, sums: Sequence[float]) -> tuple[Replica, ...]:
        """Write this process's checksums; on rank 0 return the replicas that differ at the newest compared step."""
        self._find_run()
        if self._run is None:
            return ()
        self._written = self._key(step, rank())
        self._store.set(self._written, json.dumps(list(sums)))
        self._pending[step] = list(sums)
        if rank() == 0:
            self._await(step)
            for earlier in sorted(self._pending):
                self._compare(earlier)
        while len(self._pending) > PENDING:
            oldest = min(self._pending)
            del self._pending[oldest]
            self._forget([self._key(oldest, rank())])
        return tuple(self._differ.values())

    def _find_run(self) -> None:
        """Read the number of rank 0's watch. Each process's own count may differ: one may have opened a watch more.
        Once rank 0 has read, and so deleted, what was last written, the number is right and stays."""
        name = f"{self._name}/run"
        if rank() == 0 or (self._written and not self._store.check([self._written])):
            return
        if self._store.check([name]):
            self._run = self._store.get(name).decode()

    def _key(self, step: int, of_rank: int) -> str:
        return f"{self._name}/{self._run}/{step}/{of_rank}"

    def _others(self, step: int) -> list[str]:
        return [self._key(step, other) for other in range(1, world_size())]

    def _await(self, step: int) -> None:
        end = time.monotonic() + PATIENCE
        while self._answered and not self._store.check(self._others(step)) and time.monotonic() < end:
            time.sleep(0.002)

    def _compare(self, step: int) -> None:
        """Compare the checksums of this step, if all processes have written theirs."""
        if not self._store.check(self._others(step)):
            return
        self._answered = True
        mine = self._pending.pop(step)
        for other, key in enumerate(self._others(step), start=1):
            theirs = json.loads(self._store.get(key))
            groups = tuple(name for name, a, b in zip(self._groups, mine, theirs, strict=True) if a != b)
            if not groups:
                self._differ.pop(other, None)
                self._equal[other] = step
            else:
                first = self._differ.get(other)
                since = first.step if first else step
                self._differ[other] = Replica(other, groups, since, self._equal.get(other))
        self._forget([self._key(step, 0), *self._others(step)])

    def _forget(self, keys: Sequence[str]) -> None:
        with contextlib.suppress(Exception):  # some stores cannot delete
            for key in keys:
                self._store.delete_key(key)


def is_sharded(parameter: Any) -> bool:
    """Return whether processes hold different parts: DTensors, FSDP's flat and DeepSpeed's partitioned parameters,
    and those that Megatron marks as tensor-parallel or DeepSpeed and Tutel as experts."""
    return (
        is_distributed(parameter)
        or type(parameter).__name__ == "FlatParameter"
        or any(hasattr(parameter, name) for name in ("ds_id", "ds_tensor", "_is_flat_param"))
        or any(getattr(parameter, name, False) for name in ("tensor_model_parallel", "skip_allreduce", "is_expert"))
        or getattr(parameter, "allreduce", True) is False
    )


def are_replicated() -> bool:
    """Return whether several processes train."""
    return world_size() > 1
