"""The load of experts: its signals, and helpers for router-collapse and dead-experts."""

from __future__ import annotations

from collections.abc import Sequence

from omninorm.monitor.history import Facts, Load, Sample

BALANCE = (
    "Add a load-balancing loss or raise its coefficient (0.01 is customary), or the update speed of the router's bias "
    "(0.001) if that balances the load."
)


def load_at(sample: Sample, block: int) -> Load | None:
    """Return the load of a block's experts in a sample; None if unknown."""
    return sample.loads[block] if block < len(sample.loads) else None


def router_of(facts: Facts, block: int) -> str:
    """Return the name of a block's router, or of the block."""
    found = facts.routers[block] if block < len(facts.routers) else None
    return found or facts.blocks[block]


def largest(load: Load) -> list[int]:
    """Return the experts with the largest load, as many as each token chooses, in their order."""
    order = sorted(range(len(load.shares)), key=lambda expert: -load.shares[expert])
    return sorted(order[: load.choices])


def share_of(load: Load, experts: Sequence[int]) -> float:
    """Return the share of all choices that these experts get."""
    return sum(load.shares[expert] for expert in experts) / sum(load.shares)


def fair_share(load: Load) -> float:
    """Return the share of the tokens that an expert would get if the load were balanced."""
    return load.choices / len(load.shares)


def load_signals(loads: Sequence[Load | None]) -> dict[str, list[float | None]]:
    """Return the signals of the blocks' loads; empty if none is known."""
    if not any(loads):
        return {}
    most = [None if load is None else share_of(load, largest(load)) for load in loads]
    least = [None if load is None else min(load.shares) / fair_share(load) for load in loads]
    return {"expert_load": most, "expert_least": least}


def listed(experts: Sequence[int]) -> str:
    """Return the experts' numbers: "expert 3", "experts 2 and 3", "12 experts, such as 0, 5 and 7"."""
    if len(experts) > 4:
        return f"{len(experts)} experts, such as {', '.join(map(str, experts[:2]))} and {experts[2]}"
    if len(experts) == 1:
        return f"expert {experts[0]}"
    return f"experts {', '.join(map(str, experts[:-1]))} and {experts[-1]}"
