"""The pure half of both clients: what to send, when to send it again, what it all came to.

An operation is a generator. It yields :class:`Send` or :class:`Sleep`, is told what came of it, and
returns the answer; ``client.py`` and ``aio.py`` only do what it asks. So what must not go wrong is
written once: a change carries worker, epoch and seq, a repeat carries the same ones, and a seq that
may have been applied never goes out with another payload.
"""

from __future__ import annotations

import logging
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
_AGAIN = frozenset({408, 429, 500, 502, 503, 504, 507})
#: Refusals that say nothing about an earlier copy of the same request.
_AT_THE_DOOR = frozenset({401, 403, 408, 421, 429})
#: Failures of the server that say that this copy was not carried out; nothing about an earlier one.
_NOTHING_DONE = (errors.Damaged, errors.OutOfSpace)
#: How often a request is sent again that the server fails on, and would probably fail on for ever.
_FEW = 5
_UNKNOWN = "an earlier copy of this request may have been applied"
#: What is told once when a request was sent again for so long.
_PATIENCE_S = 2.0

log = logging.getLogger("optserve_client")


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

    #: Times that a request is sent again; 0: never; None: as often as ``total_s`` allows.
    retries: int | None = None
    #: Longest time from the first failure to the start of the last attempt. A server that was
    #: killed has to start again, read back and see its disk again in it.
    total_s: float = 60.0
    first_s: float = 0.1
    longest_s: float = 5.0
    clock: Callable[[], float] = field(default=time.monotonic, repr=False)
    jitter: Callable[[], float] = field(default=random.random, repr=False)

    def pause_s(self, attempt: int, retry_after_s: float) -> float:
        """Return how long to wait after failed attempt ``attempt``, counted from 0."""
        backoff = min(self.longest_s, self.first_s * 2.0 ** min(attempt, 60))
        return max(retry_after_s, backoff * (0.5 + self.jitter() / 2))

    @classmethod
    def of(cls, retries: int | Retry | None) -> Retry:
        return retries if isinstance(retries, Retry) else cls(retries=retries)


@dataclass(slots=True)
class Trail:
    """What is known about a request that was sent, maybe several times."""

    #: Whether the server may have done it without our having seen it say so.
    maybe_done: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class _Verdict:
    """What one attempt came to."""

    failure: errors.OptserveError
    #: Whether this copy may have been carried out; None: it was answered, as every copy would be.
    done: bool | None
    #: Whether to send it again.
    again: bool = True
    #: Whether the server fails on it, and would probably do so for ever.
    stuck: bool = False
    after_s: float = 0.0

    @property
    def final(self) -> bool:
        """Whether this copy was refused for good before anything was done."""
        return self.done is False and not self.again


def _verdict(answer: Answer) -> _Verdict | None:
    """Return what is wrong with ``answer``; None if it is whole and good."""
    if answer.ok:
        fault = answer.fault()
        return None if fault is None else _Verdict(failure=fault, done=True, stuck=True)
    failure = answer.error()
    nothing_done = isinstance(failure, _NOTHING_DONE) or answer.status in _AT_THE_DOOR
    return _Verdict(
        failure=failure,
        done=False if nothing_done else True if answer.status >= 500 else None,
        again=answer.status in _AGAIN and not isinstance(failure, errors.Damaged),
        stuck=answer.status == 500,
        after_s=answer.retry_after_s(),
    )


def exchange(request: Request, retry: Retry, trail: Trail) -> Steps[Answer]:
    """Send ``request`` until there is an answer to keep; raise the last failure if there is none.

    ConnectFailed, OutOfSpace, Damaged and a RequestError mean that no attempt did anything: where
    an earlier one may have, the sentence says so, and what was turned away is a TransportError.
    """
    begun: float | None = None
    stuck, told = 0, False
    for attempt in count():
        before, trail.maybe_done = trail.maybe_done, request.method != "GET"
        try:
            answer = yield Send(request)
        except errors.TransportError as exc:
            verdict = _Verdict(failure=exc, done=not isinstance(exc, errors.ConnectFailed))
        else:
            assert answer is not None
            found = _verdict(answer)
            if found is None or found.done is None or (found.final and not before):
                trail.maybe_done = False
                return replace(answer, doubtful=before)
            verdict = found
        failure = verdict.failure
        if not verdict.done:
            trail.maybe_done = before
            failure = _doubted(failure) if before else failure
        now = retry.clock()
        begun, stuck = now if begun is None else begun, stuck + verdict.stuck
        pause_s = retry.pause_s(attempt, verdict.after_s)
        over = attempt == retry.retries or stuck > _FEW or now + pause_s > begun + retry.total_s
        if not verdict.again or over:
            raise _tried(failure, attempt + 1, retry)
        if now - begun >= _PATIENCE_S and not told:
            told = True
            log.warning("%s; trying again for %g s", failure.detail, retry.total_s)
        yield Sleep(pause_s)
    raise AssertionError("count() ended")


def _doubted(failure: errors.OptserveError) -> errors.OptserveError:
    kind = type(failure) if isinstance(failure, errors.ServerError) else errors.TransportError
    doubted = kind(f"{failure.detail}; an earlier attempt may have worked", **failure.extra)
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
    #: What the program has to know before it changes the session again; :meth:`resume` clears it.
    blocked: errors.OptserveError | None = None
    #: Whether a deletion may have been carried out without our having seen it.
    deleting: bool = False

    def stamped(self, draft: Draft) -> Request:
        stamp = {"worker": self.worker, "epoch": self.epoch, "seq": self.seq}
        if draft.guarded and self.generation is not None:
            return draft.request({**stamp, "generation": self.generation})
        return draft.request(stamp)

    @property
    def unused(self) -> bool:
        """Whether no number can be known to the server."""
        return self.seq == 1 and self.unsettled is None and self.blocked is None

    def check(self) -> None:
        """Raise what the program has not answered with :meth:`resume`."""
        if self.blocked is not None:
            raise type(self.blocked)(self.blocked.detail, **self.blocked.extra)

    def settled(self, answer: Answer) -> None:
        """Learn from what the server said to the request that had this lane's seq."""
        if answer.ok:
            self.seq += 1
            self.last_seq = None
            # Another generation than the one that is known is for the server to refuse.
            self.generation = self.generation or answer.scalars.get("generation")
            return
        error = answer.error()
        self.last_seq = error.extra.get("last_seq", self.last_seq)
        unknown = answer.doubtful and (
            isinstance(error, errors.Fenced)
            or (isinstance(error, errors.OutOfSequence) and (self.last_seq or 0) >= self.seq)
        )
        if unknown:  # somebody else goes by this worker's name
            self.blocked = type(error)(f"{error.detail}; {_UNKNOWN}", **error.extra)
        elif isinstance(error, errors.SessionRewound):
            self.blocked = error
        self.check()

    def resume(self) -> None:
        """Go on after what the server remembers; give up what is open."""
        if self.last_seq is not None:
            self.seq = self.last_seq + 1
        self.generation = self.blocked.extra.get("generation") if self.blocked else None
        self.unsettled = self.last_seq = self.blocked = None


def change(lane: Lane, draft: Draft, retry: Retry) -> Steps[Answer]:
    """Send a change with the lane's next seq; settle what an earlier failure left open first.

    If the last change ended without an answer, its seq may be used up. The same change again is
    that request again, with its seq: it is applied once. Before any other change the open one is
    sent again, so that the server has it or has refused it. After SessionRewound nothing is sent
    until :meth:`Lane.resume`.
    """
    lane.check()
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
        lane.unsettled = request.kept() if answer is None and trail.maybe_done else None
    lane.settled(answer)
    return answer


def remove(lane: Lane, draft: Draft, retry: Retry) -> Steps[Answer]:
    """Send the deletion of the session, which makes whatever else is open of no account.

    It is numbered as any change, unless another one is open: that could be one that cannot be
    settled, because the session is damaged.
    """
    lane.check()
    if lane.unsettled is None or lane.unsettled.same_as(lane.stamped(draft)):
        return (yield from change(lane, draft, retry))
    trail = Trail(lane.deleting)
    try:
        return (yield from exchange(draft.request(), retry, trail))
    finally:
        lane.deleting = trail.maybe_done


@dataclass(frozen=True, kw_only=True, slots=True)
class Call(Generic[T]):
    """One operation of the API: what to send, and how to read what comes back."""

    draft: Draft
    read: Callable[[Answer], T]
    #: The session that it changes; None if it changes none.
    changes: str | None = None
    #: Whether it deletes that session. Not to find it is success then, if an earlier copy of the
    #: request may have been carried out.
    deletes: bool = False


def perform(call: Call[T], retry: Retry, lane: Lane | None) -> Steps[T]:
    """Run ``call`` to its end: return what it returns or raise what the server refused it with."""
    if lane is None:
        answer = yield from exchange(call.draft.request(), retry, Trail())
    else:
        answer = yield from (remove if call.deletes else change)(lane, call.draft, retry)
    if answer.ok or (call.deletes and answer.doubtful and answer.status == 404):
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
        generation = reply.get("generation")
        lane, _ = self.get(session_id)
        new = reply.get("created") or reply.get("duplicate")
        if imported or ((new or lane.unused) and lane.generation != generation):
            self.forget(session_id)  # whatever had this id before is gone
            lane, _ = self.get(session_id)
        if imported:  # its file may know this worker, and other numbers of it
            lane.worker = f"{self.worker[:110]}.{secrets.token_hex(8)}"
        lane.generation = lane.generation or generation
        return session_id

    def forget(self, session_id: str) -> None:
        self._lanes.pop(session_id, None)

    def resume(self, session_id: str) -> None:
        self.get(session_id)[0].resume()
