"""What a large step costs in memory, as the kernel counts it, in multiples of the parameters.

The peak of resident memory over some steps, minus what was resident before the session was made,
after a small one had warmed everything up. One contestant at a time, in processes of its own.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.speed import procfs
from benchmarks.speed.contestants import BY_KEY, TCP, Contestant, rig
from benchmarks.speed.process import Process, WorkerFailed
from benchmarks.speed.progress import say
from benchmarks.speed.shapes import numel, shapes_of

KEYS = [
    "floors.bare",
    TCP,
    "optserve.os",
    "optserve.always",
    "optserve.bf16",
    "uds.memory",
    "rpc.",
    "ray.copied",
    "gloo.",
]
#: Fewer than what makes a snapshot due.
STEPS = 5
#: A snapshot must have come after so many steps more.
SNAPSHOT_STEPS = 60
#: Whose peak while a snapshot is written is taken too.
SNAPSHOT_KEY = "optserve.os"


def memory(directory: Path, quick: bool) -> dict[str, Any]:
    """Return peaks by contestant, or why there is none; ``snapshot`` is that while one is written.

    A Ray actor's peak counts what it has mapped of Ray's store.
    """
    size = "1M" if quick else "25M"
    made: dict[str, Any] = {"size": size, "rows": {}, "absent": {}}
    for key in [TCP, SNAPSHOT_KEY] if quick else KEYS:
        one = BY_KEY[key]
        with rig(directory) as rigged:
            process = rigged.get(one.worker)
            if process is None:
                made["absent"][key] = rigged.absent[one.worker]
                continue
            try:
                made["rows"] |= _peaks(process, one, size)
            except WorkerFailed as exc:
                made["absent"][key] = str(exc).splitlines()[-1]
        shutil.rmtree(directory, ignore_errors=True)
        say(f"memory, {size}: {one.label}")
    return made


def _peaks(process: Process, one: Contestant, size: str) -> dict[str, Any]:
    process.ask("open", shapes=[[10]], variants=[one.variant])
    process.ask("steps", variant=one.variant, count=3)
    process.ask("close")
    idle = [procfs.resident(process.server_pids), procfs.resident([process.pid])]
    process.ask("open", shapes=shapes_of(size), variants=[one.variant])

    def over(work: Callable[[], Any]) -> dict[str, float]:
        """Return the peaks of the server and of the client while ``work`` runs."""
        pids = [process.server_pids, [process.pid]]
        for some in pids:
            procfs.reset_peak(some)
        work()
        peaks = [procfs.peak(some) for some in pids]
        times = [(top - low) / (4 * numel(size)) for top, low in zip(peaks, idle, strict=True)]
        return {"server": times[0], "client": times[1]}

    rows = {one.key: over(lambda: process.ask("steps", variant=one.variant, count=STEPS))}
    if one.key == SNAPSHOT_KEY:
        rows["snapshot"] = over(lambda: _until_snapshot(process, one.variant))
    process.ask("close")
    return rows


def _until_snapshot(process: Process, variant: str) -> None:
    """Take steps until one more snapshot can be reached."""
    before = process.ask("snapshots")
    for _ in range(SNAPSHOT_STEPS):
        process.ask("steps", variant=variant, count=1)
        if process.ask("snapshots") != before:
            return
    raise WorkerFailed(f"{SNAPSHOT_STEPS} steps and no snapshot")
