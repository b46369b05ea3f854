"""One step that comes tensor by tensor: where its gradients wait until somebody commits it.

The thread that reads bodies fills and closes a push; others may look at it, throw it away when its
time is over, or put its frame together. A gradient goes to where the update reads it, as with a
body that brings all of them.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from optserve.optim.arena import GradientBuffer
from optserve.sessions.arriving import NOTHING, Arrival, Gradient
from optserve.sessions.fields import StepFields
from optserve.sessions.step import Expected, OpenWriter, Step, write_frame
from optserve_client.errors import Conflict, Invalid, PushNotFound, Unavailable

if TYPE_CHECKING:
    from optserve.sessions.holding import Shape

#: What no session looks like.
NOWHERE = Expected(layout=NOTHING.layout, sparse=frozenset())
#: A push that was committed is known for so long: its sender may not have heard of it.
REMEMBERED_S = 60.0


class Push:
    """One step in the making. Its buffer is leased until it is committed or thrown away."""

    def __init__(
        self,
        fields: StepFields,
        shape: Shape,
        *,
        ttl_s: float,
        clock: Callable[[], float] = time.monotonic,
        key: str | None = None,
        digest: bytes = b"",
    ) -> None:
        """``key`` and ``digest`` are those of the request that opened it."""
        self.id = f"p-{secrets.token_hex(12)}"
        self.fields, self.expected = fields, shape.expected
        self.key, self.digest = key, digest
        self._none = frozenset(fields.none)
        self.state: Literal["open", "committing", "spent", "gone"] = "open"
        #: What it was committed with.
        self.said: StepFields | None = None
        #: Done when it is a step; None while nobody commits it.
        self.made: Future[None] | None = None
        self._again: Step | None = None
        #: Bytes beside the buffer that are there or on their way.
        self.beside_bytes = 0
        self._ttl_s, self._clock = ttl_s, clock
        self._there: dict[str, Gradient] = {}
        #: Those whose bodies are being read, and who of them writes to the place of which tensor.
        self._arriving: list[Arrival] = []
        self._writing: dict[str, Arrival] = {}
        self._lock = threading.Lock()
        self._touched = clock()
        #: The shape that the session had when it was last found to be the same as ours.
        self._same = shape.expected
        self._buffer = shape.pool.keep()

    # --- what is known of it ---------------------------------------------------------------------

    @property
    def left_s(self) -> float:
        """Seconds until its time is over."""
        return self._touched + self._ttl_s - self._clock()

    def progress(self) -> dict[str, Any]:
        """Return what is said whenever something has arrived, as JSON."""
        silent = sum(name not in self._there for name in self._none)
        missing = len(self.expected.layout.slots) - len(self._there) - silent
        return {"push": self.id, "expires_at": self.expires_at, "missing": missing}

    def told(self) -> dict[str, Any]:
        """Return everything that its sender may want to know, as JSON."""
        with self._lock:
            if self.state not in ("open", "committing"):
                raise PushNotFound(f"push {self.id!r} is over")
            names = self.expected.layout.names
            none = {name for name, gradient in self._there.items() if gradient.step.none}
            arrived = [name for name in names if name in self._there and name not in none]
            none |= self._none - set(arrived)
            known = {*arrived, *none}
            return {
                "push": self.id,
                "expires_at": self.expires_at,
                "fields": self.fields.to_json(),
                "arrived": arrived,
                "arriving": [arrival.name for arrival in self._arriving],
                "none": sorted(none),
                "missing": [name for name in names if name not in known],
            }

    @property
    def expires_at(self) -> float:
        """Unix seconds."""
        return time.time() + self.left_s

    @property
    def frame_bytes(self) -> int:
        """About what is to be written when it is committed."""
        return self._buffer.layout.nbytes + self.beside_bytes

    def check_session(self, expected: Expected) -> None:
        """Refuse to go on if the session is not what it was when the push was opened."""
        if expected is self._same:
            return
        if (expected.layout, expected.sparse) != (self.expected.layout, self.expected.sparse):
            raise Conflict(f"the session's params changed after push {self.id!r} was opened")
        self._same = expected

    # --- tensors ---------------------------------------------------------------------------------

    def begin(self, arrival: Arrival) -> None:
        """Expect the body of one gradient."""
        with self._lock:
            self._check_open()
            self._arriving.append(arrival)

    def place(self, arrival: Arrival, beside_bytes: int) -> GradientBuffer:
        """Return where the gradient goes, whose header was read and found right.

        What was there is lost, and whoever else writes there is stopped.
        """
        name = arrival.name
        with self._lock:
            self._check_open()
            other = self._writing.get(name)
            if other is not None and other.finishing:
                raise Unavailable(f"the last body of {name!r} is just being stored", retry_after=1)
            if other is not None:
                self._end(other)
                other.revoke(Unavailable(f"another body of {name!r} came meanwhile", retry_after=1))
            self._writing[name] = arrival
            self._forget(name)
            arrival.beside_bytes = beside_bytes
            self.beside_bytes += beside_bytes
            dense = name in self._buffer.layout.by_name
            return self._buffer.part(name) if dense else NOTHING

    def settle(self, arrival: Arrival, gradient: Gradient) -> None:
        """Keep a gradient that has arrived whole."""
        with self._lock:
            self._end(arrival)
            self._check_open()
            self._forget(arrival.name)
            self._there[arrival.name] = gradient
            self.beside_bytes += gradient.beside_bytes

    def abort(self, arrival: Arrival, *, broken: bool) -> None:
        """Expect it no more. ``broken``: it was not refused but came to an end too early, and its
        sender may take what was there before for what it sent."""
        with self._lock:
            known = arrival in self._arriving
            self._end(arrival)
            if broken and known:
                self._forget(arrival.name)

    def _end(self, arrival: Arrival) -> None:
        if arrival in self._arriving:
            self._arriving.remove(arrival)
            self.beside_bytes -= arrival.beside_bytes
            self._touched = self._clock()
        if self._writing.get(arrival.name) is arrival:
            del self._writing[arrival.name]

    def _forget(self, name: str) -> None:
        if (gradient := self._there.pop(name, None)) is not None:
            self.beside_bytes -= gradient.beside_bytes

    def _check_open(self) -> None:
        if self.state == "committing":
            raise Conflict(f"push {self.id!r} is being committed")
        if self.state != "open":
            raise PushNotFound(f"push {self.id!r} is over")

    # --- its end ---------------------------------------------------------------------------------

    def joined(self, more: Mapping[str, Any]) -> StepFields:
        """Return the fields of the step: those that opened the push and those of its commit."""
        given = self.fields.to_json()
        more = {name: value for name, value in more.items() if value is not None}
        for name in more:
            if name in given:
                raise Invalid(
                    f"{name} came when the push was opened and comes again with its commit; "
                    "send it once",
                    field=name,
                )
        return StepFields.parse({**given, **more})

    def close(self, fields: StepFields) -> None:
        """Take no more tensors. Raises Conflict while one arrives, MissingGradient if one lacks."""
        with self._lock:
            self._check_open()
            if self._arriving:
                raise Conflict(f"the body of {self._arriving[0].name!r} is still arriving")
            self._none_of(fields)
            self.state, self.said, self.made = "committing", fields, Future()

    def reopen(self, why: Exception) -> None:
        """Go on: the step could not be written. ``why`` is for those who wait for it."""
        with self._lock:
            made, self.state, self.said, self.made = self.made, "open", None, None
            self._touched = self._clock()
        if made is not None:
            made.set_exception(why)

    def expired(self) -> bool:
        """Throw everything away if its time is over and nothing arrives; return whether it did."""
        with self._lock:
            over = self.state == "open" and not self._arriving and self.left_s <= 0
            if over:
                self._end_all("gone").release()
            return over

    def give_up(self) -> None:
        """Throw everything away, also what arrives. Raises Conflict while it is committed."""
        with self._lock:
            self._check_open()
            buffer = self._end_all("gone")
            if not self._arriving:  # else it is nobody's any more
                buffer.release()
            for arrival in self._arriving:
                arrival.revoke(PushNotFound(f"push {self.id!r} was given up"))

    def _end_all(self, state: Literal["spent", "gone"]) -> GradientBuffer:
        """Let go of everything; return the buffer."""
        buffer, self._buffer, self.state = self._buffer, NOTHING, state
        self._there.clear()
        self._writing.clear()
        self.beside_bytes = 0
        return buffer

    def _none_of(self, fields: StepFields) -> frozenset[str]:
        nulls = [name for name, gradient in self._there.items() if gradient.step.none]
        given = self._there.keys() - set(nulls)
        return self.expected.check_complete(given, (*fields.none, *nulls))

    def step(self, writer: OpenWriter) -> Step:
        """Return the step of a closed push, as if one body had brought it; the push is spent then.

        Writes the journal's frame, so it may take a while: any thread may call it. The frame, and
        with it the digest, is the same whenever the same tensors come with the same fields, in
        whatever order they came. If it raises, the push can be reopened.
        """
        assert self.said is not None
        none = self._none_of(self.said)
        fields = self.said.model_copy(update={"none": sorted(none)})
        there = {n: self._there[n] for n in self.expected.layout.names if n not in none}
        frame = {full: t for one in there.values() for full, t in one.tensors.items()}
        digest, payload = write_frame(frame, fields, writer)
        for name, gradient in there.items():
            if gradient.in_place:
                self._buffer.adopt(gradient.step.buffer)
            elif name not in self.expected.sparse:
                self._buffer.view(name)[:] = gradient.step.buffer.view(name)
        step = Step(
            fields=fields,
            expected=self.expected,
            buffer=self._buffer,
            none=none,
            sparse={n: coo for one in there.values() for n, coo in one.step.sparse.items()},
            params=None,
            digest=digest,
            payload=payload,
        )
        with self._lock:
            self._end_all("spent")
            self._again = replace(step, expected=NOWHERE, buffer=NOTHING, sparse={}, payload=None)
            self._touched, self._ttl_s = self._clock(), REMEMBERED_S
        return step

    def spent_step(self) -> Step:
        """Return the step without its tensors: what the ledger needs to know it again. No session
        takes it for a new one."""
        assert self._again is not None, "it was not committed"
        return self._again
