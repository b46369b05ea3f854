"""Workers as processes of their own, which train a net of tests/nets.py and tell what happens.

``Zygote("tests.crew")`` forks them; each does one :class:`Job` and ends.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import socket
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from optserve_client import Worker
from optserve_client.errors import Conflict
from tests import nets
from tests.waiting import wait_until
from tests.zygote import Zygote

LIMIT_S = 600.0
#: What a push may be refused with: it is late, and the params of now came with that; its round
#: failed; or a worker of this name that died has pushed into the round already.
_TOLD = ("stale_gradient", "round_failed", "conflict")
#: Bytes of a version.
_SAID = 8
Say = Callable[..., None]


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one worker does."""

    url: str
    session: str
    name: str
    net: str
    #: Its share of the scans, and the scans of a batch.
    index: int
    of: int
    size: int
    #: Whether it descends by itself and pushes what that changed; else it pushes gradients.
    steps: int = 0
    lr: float = 0.0
    #: Ends at this version, after so many pushes, or at the version that :meth:`Hand.end_at` says.
    until: int | None = None
    pushes: int | None = None


def digest(tensors: Mapping[str, Any]) -> str:
    """Return what tells one gradient from all others; names in byte order."""
    found = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors, key=str.encode):
        found.update(np.ascontiguousarray(tensors[name]).tobytes())
    return found.hexdigest()


def computed(job: Job, shard: nets.Shard, params: Any, number: int) -> tuple[float, nets.Arrays]:
    """Return the loss, and the ``number``-th gradient or delta of a worker, at ``params``."""
    if not job.steps:
        return nets.gradient(job.net, params, shard.batch(number))
    batches = [shard.batch(number * job.steps + i) for i in range(job.steps)]
    return nets.descended(job.net, params, batches, job.lr)


# --- in the process ------------------------------------------------------------------------------


def warm() -> None:
    """Read all that is needed, and compute on one thread, as every process here does."""
    torch.set_num_threads(1)
    for net in nets.SHAPES:
        nets.gradient(net, nets.initial(net), nets.Shard(0, 1, 8).batch(0))


def main(channel: socket.socket, text: str) -> None:
    def say(**told: Any) -> None:
        channel.sendall(json.dumps(told).encode() + b"\n")

    def hear() -> int | None:
        with contextlib.suppress(BlockingIOError):
            return int.from_bytes(channel.recv(_SAID, socket.MSG_DONTWAIT), "little")
        return None

    say(pid=os.getpid())
    work(Job(**json.loads(text)), say, hear)
    say(done=True)


def work(job: Job, say: Say, hear: Callable[[], int | None]) -> None:
    """Push until the job is done; each answer is told. ``hear`` returns when to end, once it is
    said."""
    shard = nets.Shard(job.index, job.of, job.size)
    with Worker(job.url, job.session, job.name) as worker:
        params, number, until = worker.pull(), 0, job.until
        while params.version < (until or params.version + 1) and number != job.pushes:
            loss, tensors = computed(job, shard, params, number)
            which = {"push": [job.name, worker.epoch, _next_seq(worker)], "base": params.version}
            say(sends=number, digest=digest(tensors), **which)
            number += 1
            try:
                result = worker.push(**{"deltas" if job.steps else "grads": tensors}, loss=loss)
            except Conflict as exc:
                if exc.code not in _TOLD:
                    raise
                say(refused=exc.code, **which)
                if exc.code == "conflict":
                    wait_until(lambda: not _pending(worker), "the end of a round", LIMIT_S)
                    worker.pull()
            else:
                round_ = result.round and result.round["number"]
                made, staleness = result.applied_version, result.staleness
                say(made=made, round=round_, staleness=staleness, **which)
            assert worker.params is not None
            params, until = worker.params, hear() or until


def _next_seq(worker: Worker) -> int:
    """Return the number of the next push; one that is refused does not use it up."""
    lane = worker._member._lane
    assert lane is not None
    return lane.seq


def _pending(worker: Worker) -> bool:
    """Say whether the open round has a push that came under this name."""
    found = worker.session.workers()["round"]
    return found is not None and worker.name in found["contributed"]


# --- outside -------------------------------------------------------------------------------------


class Hand:
    """A worker's process, seen from outside."""

    def __init__(self, zygote: Zygote, job: Job) -> None:
        self.job = job
        self._channel = zygote.fork(json.dumps(asdict(job)))
        #: All that it told so far, in order.
        self.told: list[dict[str, Any]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        wait_until(lambda: self.told, "the start of a worker", 30)
        self.pid: int = self.told[0]["pid"]

    def _read(self) -> None:
        with self._channel.makefile("rb") as lines:
            for line in lines:
                if line.endswith(b"\n"):  # else it died in the middle of it
                    self.told.append(json.loads(line))

    @property
    def pushed(self) -> list[dict[str, Any]]:
        """The pushes that were acknowledged, as far as it could tell."""
        return [message for message in list(self.told) if "made" in message]

    @property
    def sent(self) -> list[dict[str, Any]]:
        """The pushes that it made ready, before it sent them."""
        return [message for message in list(self.told) if "sends" in message]

    @property
    def refused(self) -> Counter[str]:
        """How many pushes were refused, and with which code."""
        return Counter(message["refused"] for message in list(self.told) if "refused" in message)

    def end_at(self, version: int) -> None:
        """Have it end at this version."""
        self._channel.sendall(version.to_bytes(_SAID, "little"))

    def signal(self, number: int) -> None:
        assert self._reader.is_alive(), f"{self.job.name} has ended after {self.told[-1]}"
        os.kill(self.pid, number)

    def kill(self) -> None:
        """kill -9; returns when the process is gone."""
        self.signal(signal.SIGKILL)
        self._reader.join(30)
        assert not self._reader.is_alive(), f"{self.job.name} outlives SIGKILL"
        self._channel.close()

    def finish(self, limit_s: float = LIMIT_S) -> None:
        """Wait until it has done its job."""
        self._reader.join(limit_s)
        name = self.job.name
        assert not self._reader.is_alive(), f"{name} hangs after {self.told[-1]}"
        self._channel.close()
        assert self.told[-1].get("done"), f"{name} failed after {self.told[-1]}; stderr says why"

    def abandon(self) -> None:
        """End it if it still runs."""
        if self._reader.is_alive():
            self.signal(signal.SIGCONT)
            self.kill()


def finish(hands: Sequence[Hand]) -> None:
    """Wait for all of them; none is left, whatever happens."""
    try:
        for hand in hands:
            hand.finish()
    finally:
        for hand in hands:
            hand.abandon()
