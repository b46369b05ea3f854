"""Rounds of several workers on one session: what the tests of them share."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import reduce
from typing import Any

import numpy as np
import torch
import xxhash

from optserve.sessions.alarms import Alarms
from optserve.sessions.identity import Identity
from optserve.sessions.registry import Registry
from optserve.sessions.reply import Reply
from optserve.sessions.session import Session
from optserve.store import MemoryStore, Store
from optserve_client import wire
from tests import local
from tests.local import Arrays

#: The deadline of rounds that are to end in another way.
LATE_S = 3600.0
LIMIT_S = 30


class Clock(Alarms):
    """Alarms that go off when a test says what time it is."""

    def __init__(self) -> None:
        super().__init__()
        self.time = 1_700_000_000.0
        self._waiting: list[tuple[float, int, Callable[[], object]]] = []
        self._count = itertools.count()

    def now(self) -> float:  # type: ignore[override]
        return self.time

    def after(self, seconds: float, fn: Callable[[], object]) -> None:
        heapq.heappush(self._waiting, (self.time + seconds, next(self._count), fn))

    def close(self) -> None:
        self._waiting.clear()

    @property
    def pending(self) -> int:
        """Alarms that have not gone off."""
        return len(self._waiting)

    def advance(self, seconds: float, *sessions: Session) -> None:
        """Let time pass, and wait until ``sessions`` have done what was due."""
        end = self.time + seconds
        while self._waiting and self._waiting[0][0] <= end:
            at, _, fn = heapq.heappop(self._waiting)
            self.time = max(self.time, at)
            fn()
            for session in sessions:
                session.in_turn(lambda: None).result(LIMIT_S)
        self.time = end


@contextmanager
def registry(store: Store | None = None, **limits: Any) -> Iterator[tuple[Registry, Clock]]:
    """A registry whose rounds go by a clock that stands still."""
    clock = Clock()
    made = Registry(store or MemoryStore(), threads=torch.get_num_threads(), alarms=clock, **limits)
    try:
        yield made, clock
    finally:
        made.close()


def sync(count: int, **fields: Any) -> dict[str, Any]:
    """Return the create body of an SGD session with rounds."""
    workers = {"mode": "sync", "count": count, "deadline_s": LATE_S, **fields}
    return {"optimizer": {"name": "SGD", "lr": 0.5}, "workers": workers}


def who(worker: str, seq: int, payload: Any = b"", epoch: int | None = None) -> Identity:
    """Return an identity whose digest says what is sent."""
    digest = xxhash.xxh3_128_digest(repr(payload).encode())
    return Identity(worker=worker, seq=seq, epoch=epoch, digest=digest)


def push(
    session: Session,
    worker: str,
    seq: int,
    base: int,
    grads: int | Mapping[str, Any] = 0,
    *,
    epoch: int | None = None,
    kind: str = "grads",
    **fields: Any,
) -> Reply:
    """Send one push and return what is known once it is committed. ``grads``: or their seed."""
    if session.cold:
        session.load().result(LIMIT_S)
    tensors = local.arrays(grads) if isinstance(grads, int) else grads
    body = {kind: local.as_json(tensors), "base_version": base, **fields}
    told = who(worker, seq, body, epoch)
    return session.step(session.step_from_json(body, told.digest), told).result(LIMIT_S)


def ended(reply: Reply) -> Reply:
    """Return the reply at the end of the round; raise what the round failed with."""
    assert reply.pending is not None
    return reply.pending.future.result(LIMIT_S)


def waits(reply: Reply) -> bool:
    assert reply.pending is not None
    return not reply.pending.future.done()


def future_of(reply: Reply) -> Future[Reply]:
    assert reply.pending is not None
    return reply.pending.future


def round_of(session: Session) -> dict[str, Any] | None:
    found: dict[str, Any] | None = session.workers().result(LIMIT_S)["round"]
    return found


def rows_of(session: Session) -> dict[str, dict[str, Any]]:
    """Return what is known of each worker."""
    return {row["worker"]: row for row in session.workers().result(LIMIT_S)["workers"]}


def params(session: Session) -> Mapping[str, wire.Tensor]:
    return session.published().result(LIMIT_S).arrays()


def mean(grads: Sequence[Mapping[str, Any]]) -> Arrays:
    """Return the sum in this order divided by the number, by numpy."""
    names = grads[0]
    count = np.float32(len(grads))
    return {n: np.asarray(reduce(np.add, [g[n] for g in grads]) / count) for n in names}


class Local:
    """The same optimizer in this process, fed with combined gradients."""

    def __init__(self, start: Mapping[str, Any], make: Callable[[Any], Any] | None = None) -> None:
        self.leaves = local.leaves(start)
        self.optimizer = (make or sgd)(list(self.leaves.values()))

    def step(self, grads: Mapping[str, Any]) -> None:
        local.set_grads(self.leaves, grads)
        self.optimizer.step()

    def check(self, served: Mapping[str, wire.Tensor]) -> None:
        local.assert_equal(served, self.leaves)


def sgd(parameters: Any) -> Any:
    return torch.optim.SGD(parameters, lr=0.5, fused=True)


def adamw(parameters: Any) -> Any:
    return torch.optim.AdamW(parameters, lr=0.1, fused=True)


def read_back(session: Session) -> None:
    """Check that the journal has every bit of the session, as it is and when it goes on."""
    live = local.exported(session), session.workers().result(LIMIT_S)
    session.in_turn(session._held.drop).result(LIMIT_S)
    assert (local.exported(session), session.workers().result(LIMIT_S)) == live
