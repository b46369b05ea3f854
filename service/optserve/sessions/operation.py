"""What every change of a session has in common."""

from __future__ import annotations

from typing import Protocol

from optserve.sessions.state import SessionState
from optserve.sessions.stepping import Change

Buffers = list[bytes | memoryview]


class Operation(Protocol):
    """One change of a session.

    One that needs what the session was (:class:`Reaching`) gets it before ``check``.
    """

    @property
    def frame(self) -> Buffers | None:
        """What the journal keeps as the event's payload."""

    def check(self, state: SessionState, abandon: bool) -> int | None:
        """Raise what speaks against it; return about what the session will take, if that grows."""

    def apply(self, state: SessionState) -> Change: ...


class Reach(Protocol):
    """The past of a session, for an operation that is about to change it."""

    def state_at(self, version: int, state: SessionState) -> SessionState: ...

    def pin(self, version: int, name: str, state: SessionState) -> None: ...

    def unpin(self, version: int, state: SessionState) -> None: ...


class Reaching:
    """An operation on a session's past."""

    def reach(self, past: Reach, state: SessionState) -> Operation:
        """Return the operation with what it needs; raises without having changed the session."""
        raise NotImplementedError
