"""replicas-differ: the processes of a data-parallel run hold different weights.

Signal: at each sample, checksums of about a thousand weights of every tensor, of all processes. Sharded parameters
are left out: see `omninorm.monitor.checks.replicas`. There is no threshold. Persistence: one sample, because
equal weights and equal averaged gradients stay equal bit for bit. `watch(…, replicas=False)` turns the check off.
"""

from __future__ import annotations

from collections.abc import Iterable

from omninorm.monitor.history import History, Sample
from omninorm.monitor.rules.base import LOSS_ALARMS, Rule
from omninorm.record.alarm import Alarm


class ReplicasDiffer(Rule):
    """Reports the group of parameters; None if there are several."""

    name = "replicas-differ"
    source = "exact: checksums of the weights' bits"
    explains = (*LOSS_ALARMS, "no-progress")

    def on_sample(self, history: History, sample: Sample) -> Iterable[Alarm]:
        replicas = sample.checks.replicas
        if not replicas:
            return
        groups = list(dict.fromkeys(group for replica in replicas for group in replica.groups))
        ranks = [str(replica.rank) for replica in replicas]
        first = min(replicas, key=lambda replica: replica.step)
        others = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(ranks[:8])}"
        where = groups[0] if len(groups) == 1 else f"{len(groups)} groups, the first is {groups[0]},"
        since = (
            f"since step {first.step}"
            if first.equal is None
            else f"since a step between {first.equal} and {first.step}"
        )
        evidence = f"Replicas differ: the weights of {where} on rank 0 are not those of {others}, {since}."
        if first.equal is None:
            remedy = "Call the model through its DistributedDataParallel wrapper, which makes the weights and the "
            remedy += "gradients equal. If the processes train independent models, pass replicas=False to watch."
        else:
            remedy = "Look for code that changes weights on one rank only, for example under `if rank == 0`, and for "
            remedy += "forward passes without the DistributedDataParallel wrapper; then restart from a checkpoint."
        yield self.alarm(sample.step, "fail", groups[0] if len(groups) == 1 else None, evidence, remedy)
