"""What many clients did to one session at the same time, and whether that can be true.

A version is a register that everybody reads with each reply and that updates count up. A history of
operations with their times is linearizable if each can be given one moment between its beginning
and its end, in the order of the versions.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.oracle import Tensors, Twin, tensors


@dataclass(frozen=True, kw_only=True, slots=True)
class Operation:
    """One request that was answered, also with a refusal that tells the version."""

    client: str
    kind: str
    #: On the monotonic clock, seconds.
    began: float
    ended: float
    #: Of the session, as the reply has it, and the one that the request made.
    version: int
    applied: int | None = None
    #: Of the gradient, or of the params that replaced the session's.
    seed: int | None = None
    base: int | None = None
    #: In whose company, where a round made the version, and with what weight else.
    company: tuple[str, ...] | None = None
    weight: float = 1.0
    #: Of the params in the reply.
    digest: bytes | None = None


History = Sequence[Operation]


def digest(params: Mapping[str, Any]) -> bytes:
    found = hashlib.blake2b(digest_size=16)
    for name in sorted(params):
        found.update(params[name].tobytes())
    return found.digest()


def makers(history: Iterable[Operation]) -> dict[int, list[Operation]]:
    """Return the operations that made each version, by version."""
    made: dict[int, list[Operation]] = defaultdict(list)
    for one in history:
        if one.applied is not None:
            made[one.applied].append(one)
    return {version: made[version] for version in sorted(made)}


def check_versions(history: History) -> None:
    """Versions are gapless, and each was made by one operation, or by all pushes of one round."""
    made = makers(history)
    assert list(made) == list(range(1, len(made) + 1)), "versions have gaps"
    for version, ones in made.items():
        if ones[0].company is None:
            assert len(ones) == 1, f"version {version} was made {len(ones)} times"
            continue
        clients = sorted(one.client for one in ones)
        for one in ones:
            assert sorted(one.company or ()) == clients, f"version {version} is of {clients}"
            assert one.base == version - 1, f"version {version} has a push of {one.base}"


def check_order(history: History) -> None:
    """What ends before another begins comes before it: whatever begins when a version was told is
    told that one or a later one, and makes a later one. No version is told that nobody made."""
    # Of equal times, what begins comes first: then the two overlap.
    moments = [(one.began, 0, at) for at, one in enumerate(history)]
    moments += [(one.ended, 1, at) for at, one in enumerate(history)]
    newest, floor = 0, [0] * len(history)
    for _, ends, at in sorted(moments):
        if not ends:
            floor[at] = newest
            continue
        one = history[at]
        newest = max(newest, one.version)
        told = f"{one.kind} of {one.client}: version {floor[at]} was told before it began"
        assert one.version >= floor[at], f"{told}, it was told {one.version}"
        assert one.applied is None or one.applied > floor[at], f"{told}, it made {one.applied}"
    made = makers(history)
    for one in history:
        assert one.applied is None or one.version >= one.applied
        assert not one.version or one.version in made, f"nobody made version {one.version}"


def check_values(
    history: History, twin: Twin, combine: Callable[[Sequence[Operation]], Tensors]
) -> int:
    """Make the updates again in the order of their versions, and compare the params in all replies;
    return how many there were. ``combine`` returns the gradient of a version."""
    seen: dict[int, set[bytes]] = defaultdict(set)
    for one in history:
        if one.digest is not None:
            seen[one.version].add(one.digest)
    made = makers(history)
    for version in range(len(made) + 1):
        if version and made[version][0].kind == "put":
            seed = made[version][0].seed
            assert seed is not None
            twin.fill(tensors(seed, twin.shapes))
        elif version:
            twin.push(combine(made[version]), None, version - 1)
        if version in seen:
            now = digest({name: leaf.detach().numpy() for name, leaf in twin.leaves.items()})
            assert seen[version] == {now}, f"version {version} has other params"
    return sum(one.digest is not None for one in history)
