"""What a request that wants a session gets: a new one, or the one that is there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from optserve.optim.hyper import json_value
from optserve.sessions import config as configs
from optserve.sessions import describe
from optserve.sessions.reply import Reply
from optserve.sessions.session import Session
from optserve.sessions.state import SessionState
from optserve_client import wire
from optserve_client.errors import SessionExists

#: Create bodies of one-call steps that are known to be equal to a session's, per session.
_REMEMBERED_BODIES = 8


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
        return Reply(scalars=json_value({**describe.status(made.session.row, state), **told}))

    return made.session.run(job)


def check_same(session: Session, body: Mapping[str, Any], device: str, promise: str) -> None:
    """Raise SessionExists if a create body would have made another session than this."""
    text = json.dumps(body, default=str).encode()
    if text in session.same:
        return
    fields, shape = configs.CreateFields.parse(body), configs.origin_layout(session.origin)
    configs.check_dtype(fields.dtype)
    same_dtype = fields.dtype in (None, wire.dtype_name(shape.dtype))
    if not same_dtype or fields.order not in (None, shape.names):
        field = "order" if same_dtype else "dtype"
        raise SessionExists(
            f"session {session.id!r} exists with another {field}", version=session.version
        )
    config = configs.normalise(fields, shape, device, promise)
    check_origin(session, session.origin, configs.origin(config, shape))
    if len(session.same) >= _REMEMBERED_BODIES:
        session.same.clear()
    session.same.add(text)
