"""Fuzzing of file readers: damaged copies of a good file, and limits within which a reader must refuse them.

for case in range(cases(50)):
    path.write_bytes(mutated_json(good, case))
    with bounded(path.stat().st_size):
        refuses_or_reads(read, path)
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import random
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from omninorm.errors import OmninormError

SECONDS, WALL_SECONDS, EXTRA_BYTES = 10.0, 60.0, 2**30
# Values of the wrong type, size or meaning, which replace good ones.
HOSTILE: list[Any] = [
    None, True, False, 0, -1, 1, 2, 7, 2**31, 2**63, 10**18, 10**23, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"),
    "", "x", "3", "\0", "../../etc", "ß" * 10_000, [], {}, [[]], [None], ["a", 1], {"a": {}}, [0] * 1000, {"": ""},
]  # fmt: skip


class LimitReached(BaseException):
    """Not an Exception, so that a reader which catches every Exception does not hide it."""


def cases(quick: int) -> int:
    """Return the number of mutations to try: `quick`, or OMNINORM_FUZZ_CASES, which `make test-all` sets."""
    return int(os.environ.get("OMNINORM_FUZZ_CASES", quick))


def mutated_json(good: Any, seed: int) -> bytes:
    """Return JSON with one to three values replaced, removed, renamed, repeated or swapped; the same for the same seed."""
    chance = random.Random(seed)
    damaged = copy.deepcopy(good)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        damaged = _damage(damaged, chance)
    text = json.dumps(damaged).encode()
    return mutated_bytes(text, seed) if chance.random() < 0.1 else text


def mutated_bytes(good: bytes, seed: int) -> bytes:
    """Return the bytes cut off, or with some of them overwritten, removed or repeated; the same for the same seed."""
    chance = random.Random(seed)
    data = bytearray(good)
    for _ in range(chance.choice((1, 1, 2, 5))):
        if not data:
            break
        at, length = chance.randrange(len(data)), chance.choice((1, 1, 2, 4, 8, 64))
        match chance.choice(("cut", "overwrite", "overwrite", "overwrite", "remove", "repeat", "extreme")):
            case "cut":
                del data[at:]
            case "overwrite":
                data[at : at + length] = chance.randbytes(length)
            case "remove":
                del data[at : at + length]
            case "repeat":
                data[at:at] = data[at : at + length] * chance.choice((1, 2, 50))
            case "extreme":
                data[at : at + length] = chance.choice((b"\xff", b"\x00", b"\x7f")) * length
    return bytes(data)


@contextlib.contextmanager
def bounded(size: int) -> Iterator[None]:
    """Fail if the block takes longer than 10 s of this process's time, which does not depend on the machine's other
    work, or a minute altogether, or 1 GB of address space more than `size` bytes."""

    def late(*_: object) -> None:
        raise LimitReached(f"took longer than {SECONDS:.0f} s of processor time, or {WALL_SECONDS:.0f} s")

    before = resource.getrlimit(resource.RLIMIT_AS)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    handlers = {number: signal.signal(number, late) for number in (signal.SIGALRM, signal.SIGPROF)}
    signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (in_use + size + EXTRA_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def refuses_or_reads(read: Callable[..., object], *arguments: Any) -> bool:
    """Return whether `read` succeeded; an OmninormError with a readable sentence counts as refused, all else is raised."""
    message = None
    try:
        read(*arguments)
    except OmninormError as error:
        message = str(error)
    assert message is None or 0 < len(message) < 2000, f"a message of {len(message)} characters: {message[:200]}"
    return message is None


def _damage(value: Any, chance: random.Random) -> Any:
    places = list(_places(value))
    if not places:
        return chance.choice(HOSTILE)
    parent, key = chance.choice(places)
    match chance.choice(("replace", "replace", "replace", "replace", "remove", "rename", "wrap", "swap", "nest")):
        case "replace":
            parent[key] = copy.deepcopy(chance.choice(HOSTILE))
        case "remove":
            del parent[key]
        case "rename" if isinstance(parent, dict):
            parent[chance.choice(("", "x", key + "_", key.upper()))] = parent.pop(key)
        case "wrap" | "rename":
            parent[key] = chance.choice((lambda v: [v], lambda v: {"a": v}, lambda v: [v] * 100, str))(parent[key])
        case "swap":
            other, place = chance.choice(places)
            parent[key] = copy.deepcopy(other[place])
        case "nest":
            for _ in range(chance.choice((3, 200))):
                parent[key] = [parent[key]]
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every (container, key) in a tree of dictionaries and lists, but only the first ten of a long list."""
    keys = list(value) if isinstance(value, dict) else range(min(len(value), 10)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])
