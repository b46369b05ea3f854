"""A session read back: the newest snapshot and the events after it, by the code that serves."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import structlog

from optserve.optim import checkpoint
from optserve.optim.engine import Engine
from optserve.optim.hyper import from_json
from optserve.sessions import config as configs
from optserve.sessions import frames, operations, stepping
from optserve.sessions.intake import Step, StepIntake
from optserve.sessions.ledger import Ledger
from optserve.sessions.state import SessionState, restore
from optserve.sessions.step import Expected
from optserve.store import Event, Key, Payload, Store
from optserve_client import wire
from optserve_client.errors import Internal, SessionNotFound

log = structlog.get_logger(__name__)

#: A snapshot is written when replay would read more than this many events, or this many bytes and
#: four times the state.
SNAPSHOT_EVENTS = 1_000
SNAPSHOT_BYTES = 4 * 2**20


def write_frame(store: Store, buffers: Iterable[bytes | memoryview]) -> Payload:
    """Return a payload with these bytes."""
    writer = store.writer()
    try:
        for buffer in buffers:
            writer.write(buffer)
        return writer.seal()
    finally:
        writer.discard()


def replay(store: Store, key: Key, upto_lsn: int | None = None) -> SessionState:
    """Return the state after event ``upto_lsn`` (None: the last one), bit for bit.

    Raises SessionNotFound, or Internal when a payload that is needed was dropped.
    """
    state: SessionState | None = None
    after = 0
    if (snapshot := store.latest_snapshot(key, upto_lsn)) is not None:
        after, payload = snapshot
        frame = frames.decode(payload.read())
        recipe = configs.recipe(frame.meta["config"])
        engine = checkpoint.load(recipe, frame.layout, frame.meta["engine"], frame.tensors)
        state = restore(frame.meta, engine)
    for event in store.events(key, after_lsn=after, upto_lsn=upto_lsn):
        if state is None:
            state = first_state(event)
        else:
            _apply(state, event)
        state.commit(event)
    if state is None:
        raise SessionNotFound(f"no session {key.session!r}")
    return state


def first_state(event: Event) -> SessionState:
    """Return the state that a create event begins: from params, or from a whole state file."""
    record = event.record
    if event.payload is None:
        raise Internal(f"session {event.key.session!r}: the payload of its creation is gone")
    data = event.payload.read()
    ledger = Ledger()
    if record["from_frame"]:
        frame = frames.decode(data)
        recipe = configs.recipe(record["config"])
        engine = checkpoint.load(recipe, frame.layout, frame.meta["engine"], frame.tensors)
        if record["keeps_ledger"]:
            ledger = Ledger.load(frame.meta["ledger"])
    else:
        tensors, _ = wire.decode(data)
        params = {name.removeprefix("param/"): tensor for name, tensor in tensors.items()}
        layout = configs.layout_of(params)
        engine = Engine(configs.recipe(record["config"]), layout, params)
    return SessionState(
        config=record["config"],
        origin=record["origin"],
        engine=engine,
        generation=record["generation"],
        created=event.time,
        ledger=ledger,
    )


def _apply(state: SessionState, event: Event) -> None:
    if event.kind == "skip" and event.payload is None:
        state.engine.assign(_changes(event))
    elif event.kind in ("step", "contribution", "evaluate", "skip"):
        step = read_step(state, event)
        try:
            _apply_step(state, step, event)
        finally:
            step.buffer.release()
    elif (operation := operations.of_event(event)) is not None:
        operation.apply(state)


def _changes(event: Event) -> list[dict[str, Any]]:
    return [from_json(change) for change in event.record["request"]["groups"]]


def _apply_step(state: SessionState, step: Step, event: Event) -> None:
    prepared = stepping.Prepared(
        step=step,
        changes=_changes(event),
        inspected=None
        if event.kind == "evaluate"
        else state.engine.inspect(step, step.fields.loss_scale),
    )
    stepping.apply(state, prepared, recorded=event.record["outcome"])


def read_step(state: SessionState, event: Event) -> Step:
    """Return the step whose wire bytes the journal holds."""
    if event.payload is None:
        raise Internal(f"session {event.key.session!r}: the payload of event {event.lsn} is gone")
    intake = StepIntake(
        expected=Expected(layout=state.layout, sparse=state.engine.recipe.sparse),
        lease=state.engine.pool.lease,
        writer=None,
    )
    for chunk in event.payload.chunks():
        intake.feed(chunk)
    return intake.finish()


class SnapshotPolicy:
    """When a session writes its next snapshot."""

    def __init__(self, store: Store, key: Key) -> None:
        self._store = store
        self._key = key
        self._events = 0
        self._bytes = 0

    def count(self, event: Event) -> None:
        """Note one committed event."""
        self._events += 1
        self._bytes += event.payload.nbytes if event.payload is not None else 0

    def write_if_due(self, state: SessionState) -> None:
        """Write a snapshot from live memory if replay became too long."""
        large = max(SNAPSHOT_BYTES, 4 * 3 * state.layout.nbytes)
        if self._events < SNAPSHOT_EVENTS and self._bytes < large:
            return
        self._events = self._bytes = 0
        try:
            self._store.snapshot(self._key, state.lsn, state.frame())
        except Exception:
            # The event is committed, and its request must not hear that it failed.
            log.exception("no snapshot was written", session=self._key.session)
