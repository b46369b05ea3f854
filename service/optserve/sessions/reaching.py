"""Changes that reach into a session's past: rollback and pins."""

from __future__ import annotations

from dataclasses import dataclass, replace

from optserve.optim import checkpoint
from optserve.sessions import config as configs
from optserve.sessions import frames
from optserve.sessions.config import Description
from optserve.sessions.operation import Buffers, Operation, Reach, Reaching
from optserve.sessions.state import SessionState
from optserve.sessions.stepping import Change

#: What belongs to the session, not to one of its versions.
_STAYS = ("durability", "ttl_s", *Description.model_fields)


@dataclass(frozen=True, kw_only=True)
class Rollback(Reaching):
    """A new version whose whole state is an earlier one's.

    What people call the session, how durable it is and which requests it knows stay as they are.
    """

    version: int
    #: The state file of that version.
    data: bytes | None = None

    def reach(self, past: Reach, state: SessionState) -> Operation:
        earlier = past.state_at(self.version, state)
        return replace(self, data=b"".join(earlier.frame()))

    @property
    def frame(self) -> Buffers | None:
        return None if self.data is None else [self.data]

    def check(self, state: SessionState, abandon: bool) -> None:
        state.round.check_not_open()
        state.check_line_search(abandon)

    def apply(self, state: SessionState) -> Change:
        assert self.data is not None
        frame = frames.decode(self.data)
        stays = {name: state.config[name] for name in _STAYS}
        config = {**frame.meta["config"], **stays}
        engine = checkpoint.load(
            configs.recipe(config), frame.layout, frame.meta["engine"], frame.tensors
        )
        updates = frame.meta["updates"] - state.updates
        state.replace_by(config, engine)
        state.inexact = state.inexact or frames.inexact(frame)
        return Change(
            kind="rollback", moves=True, updates=updates, request={"version": self.version}
        )


@dataclass(frozen=True, kw_only=True)
class Pin(Reaching):
    """Keep a snapshot of a version, named, whatever comes. No number changes."""

    version: int
    name: str
    frame: None = None

    def reach(self, past: Reach, state: SessionState) -> Operation:
        past.pin(self.version, self.name, state)
        return self

    def check(self, state: SessionState, abandon: bool) -> None: ...

    def apply(self, state: SessionState) -> Change:
        said = {"version": self.version, "pin": self.name}
        return Change(kind="pin", moves=False, request=said, reply={"pinned": said})


@dataclass(frozen=True, kw_only=True)
class Unpin(Reaching):
    """Let a pinned version go as any other."""

    version: int
    frame: None = None

    def reach(self, past: Reach, state: SessionState) -> Operation:
        past.unpin(self.version, state)
        return self

    def check(self, state: SessionState, abandon: bool) -> None: ...

    def apply(self, state: SessionState) -> Change:
        said = {"version": self.version, "pin": None}
        return Change(kind="pin", moves=False, request=said, reply={"pinned": said})
