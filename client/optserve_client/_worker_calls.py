"""The operations on the workers of a session as :class:`Call`: see ``_calls.py``."""

from __future__ import annotations

from optserve_client import wire
from optserve_client._calls import get, new_id, scalars, session_path
from optserve_client._messages import Draft
from optserve_client._protocol import Call
from optserve_client._values import Json


def register(session_id: str, worker: str) -> Call[Json]:
    # By a key: its seq begins when this is answered.
    draft = Draft(
        method="POST",
        path=session_path(session_id, "workers"),
        fields={"name": worker},
        headers={"Idempotency-Key": new_id()},
    )
    return Call(draft=draft, read=scalars)


def workers(session_id: str) -> Call[Json]:
    return get(session_path(session_id, "workers"), scalars)


def remove_worker(session_id: str, worker: str) -> Call[Json]:
    wire.check_id("worker", worker)
    draft = Draft(
        method="DELETE",
        path=session_path(session_id, "workers", worker),
        headers={"Idempotency-Key": new_id()},
    )
    return Call(draft=draft, read=scalars)
