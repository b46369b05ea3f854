"""What goes into the journal, and a session that comes back from it."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping
from typing import Any

import structlog

from optserve.sessions import describe
from optserve.sessions.identity import Identity
from optserve.sessions.replay import replay
from optserve.sessions.state import SessionState
from optserve.sessions.stepping import Change
from optserve.store.base import DURABILITIES, Durability, Event, Key, SessionRow, Store
from optserve_client.errors import Damaged, Invalid, OutOfSpace, SessionNotFound, Unavailable

log = structlog.get_logger(__name__)


def event_of(
    key: Key,
    state: SessionState,
    change: Change,
    identity: Identity,
    reply: Mapping[str, Any],
    owner_epoch: int,
    about: Mapping[str, Any] | None,
    before: Durability | None,
    now: float,
) -> Event:
    """Return the event of a change that was applied to ``state`` but is not counted in yet.

    ``before``: the durability before it; what changes that is as safe as both say. ``now``: Unix
    seconds.
    """
    durability = state.config["durability"]
    record: dict[str, Any] = {
        "request": _said(change.request),
        "outcome": _said(change.outcome),
        "reply": reply,
    }
    if state.fingerprint != state.engine.fingerprint:
        record["fingerprint"] = state.engine.fingerprint
    return Event(
        key=key,
        lsn=state.lsn + 1,
        kind=change.kind,
        version=state.version + int(change.moves),
        updates=state.updates + change.updates,
        time=now,
        owner_epoch=owner_epoch,
        worker=identity.worker,
        epoch=identity.epoch,
        seq=identity.seq,
        idempotency_key=identity.key,
        digest=identity.digest,
        record=record,
        loss=change.loss,
        grad_norm=describe.finite(change.grad_norm),
        payload=change.payload,
        durability=min(before or durability, durability, key=DURABILITIES.index),
        about=about,
    )


def _said(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def read_back(store: Store, row: SessionRow, own: Callable[[], int]) -> SessionState:
    """Return the state of a session as its journal has it.

    Where acknowledged events may be gone, a new generation begins, with the owner epoch that
    ``own`` returns. Raises Damaged, with a cure, for a journal that cannot be read, and Unavailable
    where the journal may be whole and this process cannot read it.
    """
    name = row.key.session
    try:
        # What is kept in memory alone may be in nobody's: see journaling.Unkept.
        state = replay(store, row.key, lossy=row.suspect or row.durability == "memory")
    except (Unavailable, OutOfSpace, SessionNotFound):
        raise
    except (Invalid, MemoryError, OSError) as exc:
        reason = exc.detail if isinstance(exc, Invalid) else repr(exc)
        raise Unavailable(
            f"session {name!r} cannot be read back by this server: {reason:.300}", retry_after=5
        ) from exc
    except Exception as exc:
        log.exception("a session cannot be read back", session=name)
        raise Damaged(
            f"session {name!r} cannot be read back: {str(exc) or repr(exc):.300}; "
            f"`optserve fsck --salvage {name}` goes back to what can be read, "
            "DELETE removes the session"
        ) from exc
    if row.suspect or state.lsn < row.last_lsn:
        _rewind(store, row.key, state, own())
    return state


def _rewind(store: Store, key: Key, state: SessionState, owner_epoch: int) -> None:
    state.rewind(secrets.token_hex(8))
    event = Event(
        key=key,
        lsn=state.lsn + 1,
        kind="rewind",
        version=state.version,
        updates=state.updates,
        time=time.time(),
        owner_epoch=owner_epoch,
        record={"generation": state.generation, "reply": {"applied_version": None}},
        about=describe.about(state, state.engine.nbytes()),
    )
    [outcome] = store.append([event])
    if outcome.error is not None:
        raise outcome.error
    state.commit(event)
    log.warning("acknowledged history is gone", session=key.session, version=state.version)
