"""What each promise costs: step latency by durability and size, and the time to come back.

One real server over SQLite and one client, on this machine, over loopback. The three sessions of a
size take turns, one step each, so that whatever else the machine does meets all of them alike.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

import numpy as np

from benchmarks import results
from optserve_client import Client
from tests.serving import ServerProcess

Durability = Literal["always", "os", "memory"]
DURABILITIES: tuple[Durability, ...] = ("always", "os", "memory")
#: Parameters, and rounds that are measured.
SIZES = {10: 1000, 10_000: 1000, 1_000_000: 60, 25_000_000: 12}
#: Rounds before them.
WARM_UP = 5
SESSIONS = 1000
SESSION_SIZE = 10_000


def latencies(client: Client, size: int, rounds: int) -> dict[Durability, list[float]]:
    """Return the seconds of each step, by durability."""
    params = {"w": np.zeros(size, np.float32)}
    grads = {"w": np.random.default_rng(0).normal(size=size).astype(np.float32)}
    sessions = {
        name: client.create("Adam", params, id=f"{name}-{size}", durability=name)
        for name in DURABILITIES
    }
    taken: dict[Durability, list[float]] = {name: [] for name in DURABILITIES}
    for number in range(WARM_UP + rounds):
        for name, session in sessions.items():
            began = time.perf_counter()
            session.step(grads)
            seconds = time.perf_counter() - began
            if number >= WARM_UP:
                taken[name].append(seconds)
    for session in sessions.values():
        session.delete()
    return taken


def step_table(data_dir: Path, share: float) -> str:
    """Measure all sizes; ``share`` of the rounds."""
    rows = []
    with ServerProcess(data_dir=data_dir) as server, Client(server.url) as client:
        for size, rounds in SIZES.items():
            taken = latencies(client, size, max(3, round(rounds * share)))
            median = {name: statistics.median(taken[name]) * 1e3 for name in DURABILITIES}
            always, system, memory = (median[name] for name in DURABILITIES)
            p95 = statistics.quantiles(taken["always"], n=20)[-1] * 1e3
            rows.append(
                [
                    f"{size:,}",
                    *(f"{ms:.3g}" for ms in (always, system, memory)),
                    f"{always - memory:.2f}",
                    f"{always / memory:.2f}",
                    f"{system / memory:.2f}",
                    f"{p95:.3g}",
                ]
            )
            print(*rows[-1], sep="\t", flush=True)
    head = (
        "parameters",
        "always ms",
        "os ms",
        "memory ms",
        "always - memory ms",
        "always / memory",
        "os / memory",
        "always, 95th percentile ms",
    )
    return results.table(head, rows)


def recovery_table(data_dir: Path, count: int) -> str:
    """Kill a server that has ``count`` sessions, and measure the next one."""
    params = {"w": np.zeros(SESSION_SIZE, np.float32)}
    grads = {"w": np.ones(SESSION_SIZE, np.float32)}
    names = [f"s{number}" for number in range(count)]
    with ServerProcess(data_dir=data_dir) as server, Client(server.url) as client:
        for name in names:
            client.create("Adam", params, id=name).step(grads, returns="none")
        server.stop(signal.SIGKILL)
    began = time.perf_counter()
    with ServerProcess(data_dir=data_dir) as server:
        ready = time.perf_counter() - began
        with Client(server.url) as client:
            client.session(names[count // 2]).params()
            first = time.perf_counter() - began
            again = time.perf_counter()
            for name in names:
                assert client.session(name).step(grads, returns="none").version == 2
            all_s = time.perf_counter() - again
    rows = [
        ["exec to the ready line", f"{ready:.2f}"],
        ["exec to the first answer of a session", f"{first:.2f}"],
        ["one step of every session, each read back first", f"{all_s:.2f}"],
    ]
    return results.table((f"{count:,} sessions of {SESSION_SIZE:,} parameters, killed", "s"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench durability", description=__doc__)
    parser.add_argument("--share", type=float, default=1.0, help="of the rounds [default: 1]")
    parser.add_argument("--sessions", type=int, default=SESSIONS, help="that come back")
    parser.add_argument("--dry", action="store_true", help="print only")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=Path.cwd() / "benchmarks") as directory:
        steps = step_table(Path(directory) / "steps", options.share)
        recovery = recovery_table(Path(directory) / "recovery", options.sessions)
    text = (
        "Step latency, Adam, float32, one client over loopback, medians; the three take turns, one "
        f"step each.\n\n{steps}\nRecovery: the server is killed and started again.\n\n{recovery}"
    )
    print(text)
    if not options.dry:
        command = shlex.join(["scripts/bench", "durability", *sys.argv[1:]])
        results.write("Durability", command, text)


if __name__ == "__main__":
    main()
