"""What a request that wants a session gets: a new one, or the one that is there."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from optserve.sessions import config as configs
from optserve.sessions import describe
from optserve.sessions.reply import Reply
from optserve.sessions.session import Session
from optserve.sessions.state import SessionState
from optserve_client.errors import SessionExists


@dataclass(frozen=True, slots=True)
class Made:
    """A session that a request created, or found as it wanted it."""

    session: Session
    created: bool = False
    duplicate: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)
    #: What the request wanted, where the session was found.
    origin: Mapping[str, Any] | None = None


def check_origin(session: Session, have: Mapping[str, Any], origin: Mapping[str, Any]) -> None:
    if have != origin:
        raise SessionExists(
            f"session {session.id!r} exists with another configuration"
            + configs.difference(have, origin),
            version=session.version,
        )


def answer(made: Made) -> Future[Reply]:
    """Answer with the session's status, read in its own turn."""
    told = {"created": made.created, "duplicate": made.duplicate, **made.extra}

    def job(state: SessionState) -> Reply:
        if made.origin is not None:
            check_origin(made.session, state.origin, made.origin)
        return Reply(scalars={**describe.status(made.session.row, state), **told})

    return made.session.run(job)
