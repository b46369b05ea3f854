"""What several workers on one session move together, against one alone.

One real server and a process for each worker, on this machine, over loopback. Each holds a gradient
and pushes it, in rounds or asynchronously, and gets the params. In each turn first one worker
pushes, then two, four and eight at once, each number on a session of its own; ratios are medians
over turns of the ratios within a turn. With --quick, or only a part of it, nothing is written.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import results
from benchmarks.speed.process import Process
from benchmarks.speed.procfs import cpu_s
from benchmarks.speed.progress import say
from benchmarks.speed.shapes import LABELS, names, numel, shapes_of
from optserve_client import Client
from tests.serving import ServerProcess

COUNTS = (1, 2, 4, 8)
#: Turns, and pushes of each worker in a turn.
SIZES = {"100k": (9, 20), "1M": (9, 8), "25M": (5, 3)}
QUICK = {"1M": (3, 4)}
DURABILITY: Any = "os"
MODES = ("sync", "async")
INTRODUCTION = f"""\
Gradients up and params down, of all workers of a session together: Adam, float32, durability
`{DURABILITY}`; a process for each worker and one for the server on one machine, over loopback. In a
round all gradients make one update, asynchronously each makes its own. CPU is the server's
processor time per push. Medians; ÷ one: of the ratios within a turn.

"""


class Rig:
    """The server, its client, and as many workers as ever push at once."""

    def __init__(self, stack: ExitStack, directory: Path, count: int) -> None:
        self.server = stack.enter_context(ServerProcess(data_dir=directory))
        self.client = stack.enter_context(Client(self.server.url, timeout=300))
        self._pool = stack.enter_context(ThreadPoolExecutor(count))
        self.pushers = [
            stack.enter_context(Process("pusher", self.server.url, f"w{number}"))
            for number in range(count)
        ]

    def ask(self, first: int, do: str, **fields: Any) -> list[Any]:
        """Have the ``first`` workers do something at the same time."""
        asked = [self._pool.submit(one.ask, do, **fields) for one in self.pushers[:first]]
        return [one.result() for one in asked]

    @property
    def server_s(self) -> float:
        """Processor seconds of the server so far."""
        return cpu_s([self.server.process.pid])


@contextmanager
def rig(directory: Path, count: int) -> Iterator[Rig]:
    with ExitStack() as stack:
        yield Rig(stack, directory, count)


def workers(mode: str, count: int) -> dict[str, Any]:
    return {"mode": mode} | ({"count": count, "deadline_s": 300} if mode == "sync" else {})


def measure(rigged: Rig, size: str, counts: Sequence[int], turns: int, batch: int) -> Any:
    """Return, by mode and number of workers, bytes each way and the server's processor seconds."""
    shapes = shapes_of(size)
    params = {n: np.zeros(s, np.float32) for n, s in zip(names(shapes), shapes, strict=True)}
    rigged.ask(max(counts), "hold", shapes=[list(shape) for shape in shapes], numel=numel(size))
    sessions = {}
    for mode in MODES:
        for count in counts:
            session = sessions[mode, count] = rigged.client.create(
                "Adam", params, durability=DURABILITY, workers=workers(mode, count)
            )
            rigged.ask(count, "join", session=session.id)
    taken: dict[str, dict[str, list[dict[str, float]]]] = {
        mode: {str(count): [] for count in counts} for mode in MODES
    }
    for number in range(turns + 1):
        for (mode, count), session in sessions.items():
            before = rigged.server_s
            moments = rigged.ask(count, "push", session=session.id, count=batch)
            cpu = rigged.server_s - before
            if number:  # the first one warms up
                pushes = count * batch
                seconds = max(end for _, end in moments) - min(begin for begin, _ in moments)
                taken[mode][str(count)].append(
                    {"bytes_s": 4 * numel(size) * pushes / seconds, "server_s": cpu / pushes}
                )
    rigged.ask(max(counts), "close")
    for session in sessions.values():
        session.delete()
    return {mode: _summaries(by_count) for mode, by_count in taken.items()}


def _summaries(by_count: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    alone = next(iter(by_count.values()))
    return {
        count: {
            **{what: statistics.median(turn[what] for turn in turns) for what in turns[0]},
            "ratio": statistics.median(
                turn["bytes_s"] / one["bytes_s"] for turn, one in zip(turns, alone, strict=True)
            ),
        }
        for count, turns in by_count.items()
    }


def text(raw: dict[str, Any]) -> str:
    """Return the section, from the figures by size."""
    head = (
        "Parameters",
        "workers",
        "rounds, MB/s each way",
        "÷ one",
        "server CPU ms",
        "async, MB/s each way",
        "÷ one",
        "server CPU ms",
    )
    rows = []
    for size, by_mode in raw.items():
        for count in by_mode["sync"]:
            row = [LABELS[size], count]
            for mode in MODES:
                one = by_mode[mode][count]
                row += [f"{one['bytes_s'] / 1e6:,.0f}", f"{one['ratio']:.2f}"]
                row.append(f"{one['server_s'] * 1e3:.3g}")
            rows.append(row)
    return INTRODUCTION + results.table(head, rows)


def main() -> None:
    options = _options()
    sizes = QUICK if options.quick else SIZES
    raw: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=results.PATH.parent) as name:
        for size in options.sizes or sizes:
            turns, batch = sizes[size]
            with rig(Path(name) / size, max(options.counts)) as rigged:
                raw[size] = measure(rigged, size, options.counts, options.turns or turns, batch)
            say(f"workers, {LABELS[size]} parameters: done")
    found = text(raw)
    print(found)
    if options.json is not None:
        options.json.write_text(json.dumps(raw) + "\n")
    if not (options.quick or options.dry or options.part):
        command = shlex.join(["scripts/bench", "workers", *sys.argv[1:]])
        results.write("Workers", command, found)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench workers", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="1 M only, few turns")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, help="only these")
    parser.add_argument(
        "--counts", nargs="+", type=int, default=COUNTS, help="of workers; the first is compared to"
    )
    parser.add_argument("--turns", type=int, help="instead of those of the size")
    parser.add_argument("--dry", action="store_true", help="print only")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the raw figures here")
    options = parser.parse_args()
    options.part = options.sizes or options.turns or tuple(options.counts) != COUNTS
    if options.quick and set(options.sizes or ()) - QUICK.keys():
        parser.error(f"--quick has only {', '.join(QUICK)}")
    return options


if __name__ == "__main__":
    main()
