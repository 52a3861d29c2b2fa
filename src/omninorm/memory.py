"""The amount of memory that this process may use."""

from __future__ import annotations

import os
from pathlib import Path

# The files with a container's limit, for cgroups of version 2 and 1. The root group has no such file, or a huge number.
_CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def memory_bytes() -> int | None:
    """Return the size of this machine's memory in bytes, or None if the system does not report it."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def memory_limit() -> int | None:
    """Return the smaller of the machine's memory and the container's limit, or None if neither is known."""
    limits = [memory_bytes(), *map(_cgroup_limit, _CGROUP_LIMITS)]
    return min((limit for limit in limits if limit is not None and limit > 0), default=None)


def _cgroup_limit(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):  # ValueError for "max", which means no limit
        return None
