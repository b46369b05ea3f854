"""A session read back: the newest snapshot and the events after it, by the code that serves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import structlog

from optserve.optim import checkpoint, devices
from optserve.optim.engine import Engine
from optserve.optim.hyper import from_json
from optserve.optim.recipe import Recipe
from optserve.sessions import config as configs
from optserve.sessions import frames, operations, rounds, stepping
from optserve.sessions.intake import Step, StepIntake
from optserve.sessions.ledger import Ledger
from optserve.sessions.state import SessionState, expected_of, restore
from optserve.sessions.step import Expected, Lease
from optserve.store.base import BytesLike, Durability, Event, Key, Payload, Store
from optserve_client import wire
from optserve_client.errors import Damaged, Internal, SessionNotFound

log = structlog.get_logger(__name__)


class PayloadGone(Exception):
    """An event cannot be replayed: its tensors were not kept."""


def write_frame(
    store: Store,
    buffers: Iterable[bytes | memoryview],
    durability: Durability = "always",
) -> Payload:
    """Return a payload with these bytes, for an event or a snapshot of this durability."""
    parts = [memoryview(buffer) for buffer in buffers]
    writer = store.writer(sum(part.nbytes for part in parts), durability)
    try:
        for part in parts:
            writer.write(part)
        return writer.seal()
    finally:
        writer.discard()


def replay(
    store: Store, key: Key, upto_lsn: int | None = None, *, lossy: bool = False
) -> SessionState:
    """Return the state after event ``upto_lsn`` (None: the last one), bit for bit.

    A snapshot that does not read back is passed over for the one before. With ``lossy`` the state
    ends before the first event whose payload was not kept or does not read back. Raises
    SessionNotFound, and Damaged, Internal or PayloadGone when something that is needed is gone.
    """
    state = _fold(store, key, upto_lsn, lossy)
    if state.engine.line_search is not None:
        state.engine.line_search.catch_up(state.engine.params)
    return state


def _fold(store: Store, key: Key, upto_lsn: int | None, lossy: bool) -> SessionState:
    state = _newest_snapshot(store, key, upto_lsn)
    events = store.events(key, after_lsn=state.lsn if state else 0, upto_lsn=upto_lsn)
    for event in events:
        try:
            if state is None:
                state = first_state(event)
            else:
                _apply(state, event)
        except (Damaged, PayloadGone):
            if state is None or not lossy:
                raise
            log.warning("the journal ends early", session=key.session, lsn=event.lsn)
            return state
        state.commit(event)
    if state is None:
        raise SessionNotFound(f"no session {key.session!r}")
    return state


def _newest_snapshot(store: Store, key: Key, upto_lsn: int | None) -> SessionState | None:
    """Return the state in the newest snapshot up to an lsn that can be read; None: from the start.

    A pinned one below the retained ones stands for itself only: the payloads after it are gone.
    """
    kept = [row for row in store.snapshots(key) if upto_lsn is None or row.lsn <= upto_lsn]
    damage: Damaged | None = None
    for row in reversed(kept):
        try:
            payload = store.read_snapshot(key, row.lsn)
            if payload is not None:
                return read_frame(payload)
        except Damaged as exc:
            log.error("a snapshot is passed over", session=key.session, lsn=row.lsn, why=str(exc))
            damage = exc
    first = next(iter(store.events(key, upto_lsn=1)), None)
    if damage is not None and (first is None or first.payload is None):
        raise damage
    return None


def read_frame(payload: Payload) -> SessionState:
    """Return the state whose own frame this is."""
    frame = frames.decode(payload.read())
    recipe = _recipe(frame.meta["config"])
    engine = checkpoint.load(recipe, frame.layout, frame.meta["engine"], frame.tensors)
    return restore(frame.meta, engine)


def _recipe(config: Mapping[str, Any]) -> Recipe:
    """Return what computes; Invalid for a device that this server does not have."""
    devices.resolve(config["device"])
    return configs.recipe(config)


def first_state(event: Event) -> SessionState:
    """Return the state that a create event begins: from params, or from a whole state file."""
    record = event.record
    if event.payload is None:
        raise Internal(f"session {event.key.session!r}: the payload of its creation is gone")
    data = event.payload.read()
    ledger = Ledger()
    if record["from_frame"]:
        frame = frames.decode(data)
        recipe = _recipe(record["config"])
        engine = checkpoint.load(recipe, frame.layout, frame.meta["engine"], frame.tensors)
        if record["keeps_ledger"]:
            ledger = Ledger.load(frame.meta["ledger"])
    else:
        tensors, _ = wire.decode(data)
        params = {name.removeprefix("param/"): tensor for name, tensor in tensors.items()}
        layout = configs.layout_of(params)
        engine = Engine(_recipe(record["config"]), layout, params)
    return SessionState(
        config=record["config"],
        origin=record["origin"],
        engine=engine,
        generation=record["generation"],
        created=event.time,
        ledger=ledger,
        inexact=record.get("inexact"),
    )


def _apply(state: SessionState, event: Event) -> None:
    if event.kind == "rewind":
        state.rewind(event.record["generation"])
    elif event.kind == "skip" and event.payload is None:
        state.engine.assign(_changes(event))
    elif event.kind == "contribution" and "round" in event.record["request"]:
        if event.payload is None:
            raise _gone(event)
    elif event.kind == "close":
        state.note_replay(event)
        recorded = {**event.record["outcome"], "applied": event.record["reply"]["applied"]}
        rounds.close(state, event.record["reply"]["round"]["closed_by"], recorded)
    elif event.kind in ("step", "contribution", "evaluate", "skip"):
        step = read_step(state, event)
        state.note_replay(event)
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
        inspected=None if event.kind == "evaluate" else stepping.inspect(state, step),
    )
    recorded = {**event.record["outcome"], "applied": event.record["reply"]["applied"]}
    stepping.apply(state, prepared, recorded=recorded)


def read_step(state: SessionState, event: Event) -> Step:
    """Return the step whose wire bytes the journal holds."""
    if event.payload is None:
        raise _gone(event)
    return decode(event.payload.chunks(), expected_of(state), state.engine.pool.lease)


def decode(pieces: Iterable[BytesLike], expected: Expected, lease: Lease) -> Step:
    """Return the step whose wire bytes the journal holds."""
    intake = StepIntake(expected=expected, lease=lease, writer=None)
    for piece in pieces:
        intake.feed(piece)
    return intake.finish()


def _gone(event: Event) -> PayloadGone:
    return PayloadGone(f"session {event.key.session!r}: the payload of event {event.lsn} is gone")
