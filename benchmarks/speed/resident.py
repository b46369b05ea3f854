"""Many sessions on one server: what they cost in memory, and whether they slow a step down."""

from __future__ import annotations

import statistics
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.speed import procfs
from benchmarks.speed.latency import ratio
from benchmarks.speed.process import Process
from benchmarks.speed.progress import say
from tests.serving import ServerProcess

COUNTS = (10, 1_000, 10_000)
QUICK = (10, 200)
#: Parameters of each session, under Adam.
NUMEL = 10


def resident(directory: Path, quick: bool) -> dict[str, Any]:
    """Return, by number of resident sessions, the seconds of a step of any of them, and bytes.

    One server for each number, and their steps in turns. Every session took a step before.
    """
    counts = QUICK if quick else COUNTS
    rounds, batch = (4, 20) if quick else (20, 50)
    made: dict[str, Any] = {}
    with ExitStack() as stack:
        workers: dict[int, Process] = {}
        for count in counts:
            server = stack.enter_context(ServerProcess(data_dir=directory / str(count)))
            pid = server.process.pid
            worker = stack.enter_context(Process("ours", server.url, str(pid)))
            worker.ask("populate", count=min(10, count), numel=NUMEL)
            before = procfs.resident([pid])
            if count > 10:
                worker.ask("populate", count=count - 10, numel=NUMEL)
            grown = (procfs.resident([pid]) - before) / max(1, count - 10)
            made[str(count)] = {"bytes_per_session": grown, "rounds_s": {}}
            workers[count] = worker
            say(f"resident: {count} sessions are there")
        for number in range(-1, rounds):
            for count, worker in workers.items():
                seconds = worker.ask("any_steps", count=batch)
                if number >= 0:
                    made[str(count)]["rounds_s"][str(number)] = statistics.median(seconds)
    for one in made.values():
        one["p50_s"] = statistics.median(one["rounds_s"].values())
        one["ratio"] = ratio(one, made[str(counts[0])])
    return made
