"""How long a step takes: all contestants in turns, one process tree, one run.

In each round each contestant takes a step (a batch of small ones), so that whatever else the
machine does meets all of them alike. Ratios are medians over rounds of the ratios within a round.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.speed.contestants import BY_KEY, CROWD, FEWS, TCP, Contestant, Rig
from benchmarks.speed.process import Process, WorkerFailed
from benchmarks.speed.progress import say
from benchmarks.speed.shapes import numel, shapes_of

#: Size -> rounds and steps of one round.
ROUNDS = {
    "10": (16, 40),
    "1k": (12, 40),
    "100k": (16, 10),
    "1M": (20, 2),
    "25M": (15, 1),
    "resnet50": (10, 1),
    "100M": (7, 1),
}
QUICK = {"10": (4, 20), "1k": (4, 20), "100k": (4, 5), "1M": (5, 1), "25M": (4, 1)}
#: Rounds before those that count.
WARM_UP = 2
#: Before each turn: OpenMP's threads spin for some milliseconds after a step, and would take a
#: processor from whoever is next.
PAUSE_S = 0.02

#: What is kept of a contestant's steps: seconds of one step, processor seconds per step, and the
#: median of each round.
Summary = dict[str, Any]


@dataclass
class Taken:
    """What one contestant's steps at one size took."""

    #: Seconds of each step, by number of the round.
    rounds: dict[int, list[float]] = field(default_factory=dict)
    #: Processor seconds of all steps.
    server_cpu_s: float = 0.0
    client_cpu_s: float = 0.0

    @property
    def steps(self) -> list[float]:
        return [seconds for one in self.rounds.values() for seconds in one]

    def medians(self) -> dict[int, float]:
        return {number: statistics.median(one) for number, one in self.rounds.items()}

    def quantile(self, share: float) -> float:
        """Return the seconds below which ``share`` of the steps stay, by nearest rank."""
        ordered = sorted(self.steps)
        return ordered[max(0, math.ceil(share * len(ordered)) - 1)]

    def summary(self) -> Summary:
        count = len(self.steps)
        return {
            "p50_s": self.quantile(0.5),
            "p99_s": self.quantile(0.99),
            "steps": count,
            "server_cpu_s": self.server_cpu_s / count,
            "client_cpu_s": self.client_cpu_s / count,
            "rounds_s": {str(number): s for number, s in self.medians().items()},
        }


#: By key of the contestant.
Field = dict[str, Taken]


def ratio(above: Summary | None, below: Summary | None) -> float | None:
    """Return the median of the ratios of the rounds in which both took part."""
    if above is None or below is None:
        return None
    over, under = above["rounds_s"], below["rounds_s"]
    both = [over[number] / under[number] for number in over if number in under]
    return statistics.median(both) if both else None


def measure(
    rig: Rig, size: str, contestants: Sequence[Contestant], quick: bool = False
) -> dict[str, Summary]:
    """Let ``contestants`` take steps of ``size`` in turns; return summaries by key."""
    rounds, batch = (QUICK if quick else ROUNDS)[size]
    ready = [one for one in contestants if one.most >= numel(size)]
    if numel(size) <= CROWD:
        fews = [ready]
    else:
        present = {one.key for one in ready}
        fews = [[BY_KEY[key] for key in few if key in present] for few in FEWS]
    field_: Field = {}
    # What all are compared with needs no turn without anybody.
    fews = [few for few in fews if few and ([one.key for one in few] != [TCP] or ready == few)]
    for number, few in enumerate(fews):
        _turns(rig, size, few, range(number * rounds, (number + 1) * rounds), batch, field_)
    return {key: taken.summary() for key, taken in field_.items()}


def _turns(
    rig: Rig, size: str, few: Sequence[Contestant], numbers: range, batch: int, into: Field
) -> None:
    began = time.monotonic()
    opened = _open(rig, size, few)
    try:
        for number in range(numbers.start - WARM_UP, numbers.stop):
            # Back and forth: nobody always follows the same one.
            for one in few if number % 2 else reversed(few):
                if one.worker in opened:
                    count = max(1, batch // one.slow)
                    warm = number < numbers.start
                    _batch(rig, opened, one, 1 if warm else count, None if warm else number, into)
    finally:
        for worker, process in opened.items():
            _guarded(rig, worker, process, "close")
    say(f"latency, {size}: {len(few)} contestants in {time.monotonic() - began:.0f} s")


def _open(rig: Rig, size: str, few: Sequence[Contestant]) -> dict[str, Process]:
    opened: dict[str, Process] = {}
    for worker in dict.fromkeys(one.worker for one in few):
        process = rig.get(worker)
        variants = [one.variant for one in few if one.worker == worker]
        if process is not None:
            shapes = shapes_of(size)
            if _guarded(rig, worker, process, "open", shapes=shapes, variants=variants)[0]:
                opened[worker] = process
    return opened


def _guarded(rig: Rig, worker: str, process: Process, do: str, **fields: Any) -> tuple[bool, Any]:
    """Ask, and let a worker that fails not take part from then on."""
    try:
        return True, process.ask(do, **fields)
    except WorkerFailed as exc:
        rig.drop(worker, exc)
        return False, None


def _batch(
    rig: Rig,
    opened: dict[str, Process],
    one: Contestant,
    count: int,
    number: int | None,
    into: Field,
) -> None:
    process = opened[one.worker]
    time.sleep(PAUSE_S)
    server_s, client_s = process.cpu_s()
    fine, seconds = _guarded(rig, one.worker, process, "steps", variant=one.variant, count=count)
    if not fine:
        del opened[one.worker]
    elif number is not None:
        taken = into.setdefault(one.key, Taken())
        taken.rounds[number] = seconds
        server_now, client_now = process.cpu_s()
        taken.server_cpu_s += server_now - server_s
        taken.client_cpu_s += client_now - client_s
