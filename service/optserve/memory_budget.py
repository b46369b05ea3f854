"""How much memory the sessions may take where nobody said: half of what is there beside torch."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

#: What a server takes without any session: Python, torch and its threads.
OWN_BYTES = 256 << 20
#: The other half is for bodies and replies under way, the database and the page cache, without
#: which every payload would be read from the disk.
SHARE = 2
#: cgroup v1 writes its "no limit" as a number near 2**63.
_UNLIMITED = 2**60

_AMOUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B|B)?", re.IGNORECASE)
_POWERS = {"K": 1, "M": 2, "G": 3, "T": 4}


def parse_bytes(text: str) -> int | None:
    """Return the bytes that ``512MiB``, ``8GB`` or ``1073741824`` says; None: it says none."""
    found = _AMOUNT.fullmatch(text.strip())
    if found is None:
        return None
    number, unit = found[1], (found[2] or "B").upper()
    base = 1024 if "I" in unit else 1000
    return int(Fraction(number) * base ** _POWERS.get(unit[0], 0))


def default_budget() -> int | None:
    """Return half of what the machine's memory or the container's limit leaves beside OWN_BYTES.

    None where neither can be told: then there is no budget.
    """
    known = [*limits(), *_machine()]
    return budget_of(min(known)) if known else None


def budget_of(nbytes: int) -> int:
    """Return the bytes for sessions where the whole process may take ``nbytes``."""
    return max(nbytes - OWN_BYTES, nbytes // 4) // SHARE


def _machine() -> Iterator[int]:
    try:
        yield os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # no such system, or it does not say
        return


def limits(
    mounts: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> Iterator[int]:
    """Yield the memory limits, in bytes, of the cgroups, v2 and v1, that this process is in.

    Every parent's limit holds too. Inside a container the path in ``own`` may be the host's, and
    what is mounted is the container's own cgroup: then that one counts.
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            yield from _upwards(mounts, path, "memory.max")
            yield from _upwards(mounts / "unified", path, "memory.max")
        elif "memory" in controllers.split(","):
            yield from _upwards(mounts / "memory", path, "memory.limit_in_bytes")


def _upwards(top: Path, path: str, name: str) -> Iterator[int]:
    parts = [part for part in path.split("/") if part not in ("", "..")]
    for depth in range(len(parts), -1, -1):
        try:
            text = top.joinpath(*parts[:depth], name).read_text().strip()
        except OSError:  # the root of v2 has no such file
            continue
        if text.isdecimal() and int(text) < _UNLIMITED:
            yield int(text)
