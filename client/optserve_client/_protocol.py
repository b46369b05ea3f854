"""The pure half of both clients: what to send, when to send it again, what it all came to.

An operation is a generator. It yields :class:`Send` or :class:`Sleep`, is told what came of it, and
returns the answer; ``client.py`` and ``aio.py`` only do what it asks. So what must not go wrong is
written once: a change carries worker, epoch and seq, a repeat carries the same ones, and a seq that
may have been applied never goes out with another payload.
"""

from __future__ import annotations

import random
import secrets
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, Generic, TypeAlias, TypeVar

from optserve_client import errors, wire
from optserve_client._messages import Answer, Draft, Request

T = TypeVar("T")
#: threading.Lock or asyncio.Lock.
L = TypeVar("L")

#: Answers after which the same request is sent again.
_AGAIN = frozenset({408, 429, 500, 502, 503, 504})
#: Refusals that say nothing about an earlier copy of the same request.
_AT_THE_DOOR = frozenset({401, 403, 408, 421, 429})


@dataclass(frozen=True, slots=True)
class Send:
    """Send this; answer with an :class:`Answer` or raise a :class:`errors.TransportError`."""

    request: Request


@dataclass(frozen=True, slots=True)
class Sleep:
    """Wait so many seconds."""

    seconds: float


Steps: TypeAlias = Generator[Send | Sleep, Answer | None, T]


@dataclass(frozen=True, kw_only=True, slots=True)
class Retry:
    """When a request that failed is sent again: exponential backoff with jitter, within limits."""

    #: Times that a request is sent again; 0: never.
    retries: int = 6
    #: Longest time from the first attempt to the start of the last one.
    total_s: float = 60.0
    first_s: float = 0.1
    longest_s: float = 5.0
    clock: Callable[[], float] = field(default=time.monotonic, repr=False)
    jitter: Callable[[], float] = field(default=random.random, repr=False)

    def pause_s(self, attempt: int, retry_after_s: float) -> float:
        """Return how long to wait after failed attempt ``attempt``, counted from 0."""
        backoff = min(self.longest_s, self.first_s * 2.0**attempt)
        return max(retry_after_s, backoff * (0.5 + self.jitter() / 2))


@dataclass(slots=True)
class Trail:
    """What is known about a request that was sent, maybe several times."""

    #: Whether the server may have done it without our having seen it say so.
    maybe_done: bool = False


def exchange(request: Request, retry: Retry, trail: Trail) -> Steps[Answer]:
    """Send ``request`` until there is an answer to keep; raise the last failure if there is none.

    ConnectFailed and a RequestError mean that no attempt did anything: where an earlier one may
    have, it is a plain TransportError.
    """
    give_up = retry.clock() + retry.total_s
    for attempt in count():
        before, trail.maybe_done = trail.maybe_done, request.method != "GET"
        failure: errors.OptserveError
        again, after_s = True, 0.0
        try:
            answer = yield Send(request)
        except errors.ConnectFailed as exc:
            trail.maybe_done = before
            failure = _doubted(exc) if before else exc
        except errors.TransportError as exc:
            failure = exc
        else:
            assert answer is not None
            again, after_s = answer.status in _AGAIN, answer.retry_after_s()
            turned_away = answer.status in _AT_THE_DOOR
            if turned_away or answer.status < 500:
                trail.maybe_done = before and turned_away
            if not again and not trail.maybe_done:
                return replace(answer, doubtful=before)
            failure = answer.error()
            if turned_away and before:
                failure = _doubted(failure)
        pause_s = retry.pause_s(attempt, after_s)
        if not again or attempt >= retry.retries or retry.clock() + pause_s > give_up:
            raise _tried(failure, attempt + 1, retry)
        yield Sleep(pause_s)
    raise AssertionError("count() ended")


def _doubted(failure: errors.OptserveError) -> errors.TransportError:
    doubted = errors.TransportError(f"{failure.detail}; an earlier attempt may have worked")
    doubted.__cause__ = failure.__cause__
    return doubted


def _tried(failure: errors.OptserveError, attempts: int, retry: Retry) -> errors.OptserveError:
    """Return ``failure``; what the network did is told with the number of tries and the limit."""
    if not isinstance(failure, errors.TransportError):
        return failure
    times = "once" if attempts == 1 else f"{attempts} times"
    told = type(failure)(f"{failure.detail} (tried {times}, limit {retry.total_s:g} s)")
    told.__cause__ = failure.__cause__
    return told


@dataclass(slots=True)
class Lane:
    """The changes that one worker makes to one session: numbered, one at a time.

    The caller holds the lane's lock while :func:`change` runs.
    """

    worker: str
    epoch: int
    #: Of the next change.
    seq: int = 1
    generation: str | None = None
    #: A request with this seq that the server may have done; its own copy of the bytes.
    unsettled: Request | None = None
    #: The last seq that the server knows, if it refused one and said so.
    last_seq: int | None = None

    def stamped(self, draft: Draft) -> Request:
        stamp = {"worker": self.worker, "epoch": self.epoch, "seq": self.seq}
        if draft.guarded and self.generation is not None:
            return draft.request({**stamp, "generation": self.generation})
        return draft.request(stamp)

    def resume(self) -> None:
        """Go on after what the server remembers; give up what is open."""
        if self.last_seq is not None:
            self.seq = self.last_seq + 1
        self.generation = self.unsettled = self.last_seq = None


def change(lane: Lane, draft: Draft, retry: Retry) -> Steps[Answer]:
    """Send a change with the lane's next seq; settle what an earlier failure left open first.

    If the last change ended without an answer, its seq may be used up. The same change again is
    that request again, with its seq: it is applied once. Before any other change the open one is
    sent again, so that the server has it or has refused it.
    """
    request = lane.stamped(draft)
    earlier = lane.unsettled
    if earlier is not None and not request.same_as(earlier):
        yield from _settle(lane, earlier, retry)
        request = lane.stamped(draft)
    return (yield from _settle(lane, request, retry))


def _settle(lane: Lane, request: Request, retry: Retry) -> Steps[Answer]:
    trail = Trail(lane.unsettled is not None)
    answer = None
    try:
        answer = yield from exchange(request, retry, trail)
    finally:  # also when the caller was interrupted or cancelled
        if answer is not None and answer.ok:
            lane.seq += 1
            lane.unsettled = lane.last_seq = None
        else:
            lane.unsettled = request.kept() if trail.maybe_done else None
    if answer.ok:
        lane.generation = answer.scalars.get("generation", lane.generation)
    else:
        lane.last_seq = answer.error().extra.get("last_seq", lane.last_seq)
    return answer


@dataclass(frozen=True, kw_only=True, slots=True)
class Call(Generic[T]):
    """One operation of the API: what to send, and how to read what comes back."""

    draft: Draft
    read: Callable[[Answer], T]
    #: The session that it changes; None if it changes none.
    changes: str | None = None
    #: A refusal that means success if an earlier copy of the request may have been carried out.
    done_already: int | None = None


def perform(call: Call[T], retry: Retry, lane: Lane | None) -> Steps[T]:
    """Run ``call`` to its end: return what it returns or raise what the server refused it with."""
    if lane is None:
        answer = yield from exchange(call.draft.request(), retry, Trail())
    else:
        answer = yield from change(lane, call.draft, retry)
    if answer.ok or (answer.doubtful and answer.status == call.done_already):
        return call.read(answer)
    raise answer.error()


class Lanes(Generic[L]):
    """The lanes of one client, by session, each with its lock."""

    def __init__(self, worker: str | None, epoch: int, lock: Callable[[], L]) -> None:
        self.worker = f"client-{secrets.token_hex(8)}" if worker is None else worker
        wire.check_id("worker", self.worker)
        self._epoch = epoch
        self._lock = lock
        self._lanes: dict[str, tuple[Lane, L]] = {}

    def get(self, session_id: str) -> tuple[Lane, L]:
        # setdefault is atomic, so two threads get the same lane.
        return self._lanes.setdefault(session_id, (Lane(self.worker, self._epoch), self._lock()))

    def opened(self, reply: Mapping[str, Any], *, imported: bool = False) -> str:
        """Note what the server said when it created or opened a session; return the id."""
        session_id: str = reply["id"]
        if reply.get("created") or imported:  # whatever had this id before is gone
            self.forget(session_id)
        lane, _ = self.get(session_id)
        if imported:  # its file may know this worker, and other numbers of it
            lane.worker = f"{self.worker[:110]}.{secrets.token_hex(8)}"
        lane.generation = reply.get("generation", lane.generation)
        return session_id

    def forget(self, session_id: str) -> None:
        self._lanes.pop(session_id, None)

    def resume(self, session_id: str) -> None:
        self.get(session_id)[0].resume()
