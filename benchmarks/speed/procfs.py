"""What the kernel says about a process: memory in bytes, processor time in seconds."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

_TICKS_S = os.sysconf("SC_CLK_TCK")


def _status(pid: int, field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.M)
    return int(found[1]) * 1024 if found else 0


def resident(pids: Iterable[int]) -> int:
    """Return the bytes that are resident now, of all ``pids`` together."""
    return sum(_status(pid, "VmRSS") for pid in pids)


def peak(pids: Iterable[int]) -> int:
    """Return the most bytes that were resident since :func:`reset_peak`, summed over ``pids``."""
    return sum(_status(pid, "VmHWM") for pid in pids)


def reset_peak(pids: Iterable[int]) -> None:
    """Make :func:`peak` begin again at what is resident now; the kernel may not let us."""
    for pid in pids:
        with contextlib.suppress(OSError):
            Path(f"/proc/{pid}/clear_refs").write_text("5")


def cpu_s(pids: Iterable[int]) -> float:
    """Return the seconds of processor time that ``pids`` have used, in user mode and kernel, they
    and the processes that they started and that have ended."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += sum(map(int, fields[11:15]))
    return ticks / _TICKS_S
