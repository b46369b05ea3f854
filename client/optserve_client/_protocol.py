"""The pure half of both clients: what is sent, as whose which request, and what it all came to.

``_exchange.py`` sends one request until it is answered. Here is written, once, what must not go
wrong around it: a change carries worker, epoch and seq, a repeat carries the same ones, and a seq
that may have been applied never goes out with another payload.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from optserve_client import errors, wire
from optserve_client._exchange import Retry, Steps, Trail, exchange
from optserve_client._messages import Answer, Draft, Request
from optserve_client._pushes import Commit, Pushed

T = TypeVar("T")
#: threading.Lock or asyncio.Lock.
L = TypeVar("L")

_UNKNOWN = "an earlier copy of this request may have been applied"


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
    unsettled: Request | Pushed | None = None
    #: The last seq that the server knows, if it refused one and said so.
    last_seq: int | None = None
    #: What the program has to know before it changes the session again; :meth:`resume` clears it.
    blocked: errors.OptserveError | None = None
    #: Whether a deletion may have been carried out without our having seen it.
    deleting: bool = False

    def stamped(self, draft: Draft | Commit) -> Request | Pushed:
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


def change(lane: Lane, draft: Draft | Commit, retry: Retry) -> Steps[Answer]:
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


def _settle(lane: Lane, request: Request | Pushed, retry: Retry) -> Steps[Answer]:
    trail = Trail(lane.unsettled is not None)
    answer = None
    try:
        answer = yield from _sent(request, retry, trail)
    finally:  # also when the caller was interrupted or cancelled
        lane.unsettled = request.kept() if answer is None and trail.maybe_done else None
    lane.settled(answer)
    return answer


def _sent(request: Request | Pushed, retry: Retry, trail: Trail) -> Steps[Answer]:
    if isinstance(request, Pushed):
        return request.sent(retry, trail)
    return exchange(request, retry, trail)


def remove(lane: Lane, draft: Draft | Commit, retry: Retry) -> Steps[Answer]:
    """Send the deletion of the session, which makes whatever else is open of no account.

    It is numbered as any change, unless another one is open: that could be one that cannot be
    settled, because the session is damaged.
    """
    lane.check()
    if lane.unsettled is None or lane.unsettled.same_as(lane.stamped(draft)):
        return (yield from change(lane, draft, retry))
    trail = Trail(lane.deleting)
    try:
        return (yield from _sent(draft.request(), retry, trail))
    finally:
        lane.deleting = trail.maybe_done


@dataclass(frozen=True, kw_only=True, slots=True)
class Call(Generic[T]):
    """One operation of the API: what to send, and how to read what comes back."""

    draft: Draft | Commit
    read: Callable[[Answer], T]
    #: The session that it changes; None if it changes none.
    changes: str | None = None
    #: Whether it deletes that session. Not to find it is success then, if an earlier copy of the
    #: request may have been carried out.
    deletes: bool = False
    #: When it is sent again, if not as everything else.
    retry: Retry | None = None


def perform(call: Call[T], retry: Retry, lane: Lane | None) -> Steps[T]:
    """Run ``call`` to its end: return what it returns or raise what the server refused it with."""
    retry = call.retry or retry
    if lane is None:
        answer = yield from _sent(call.draft.request(), retry, Trail())
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
        known = self._lanes.get(session_id)
        if known is not None:
            return known
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

    def generation(self, session_id: str) -> str | None:
        """Return the generation of the session that this client knows, if it knows one."""
        known = self._lanes.get(session_id)
        return known[0].generation if known else None

    def forget(self, session_id: str) -> None:
        self._lanes.pop(session_id, None)

    def resume(self, session_id: str) -> None:
        self.get(session_id)[0].resume()
