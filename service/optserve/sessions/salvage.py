"""A damaged session made usable again, at the cost of what came after the damage.

Reads and writes rows only, and computes nothing: what can be rebuilt is the newest snapshot that
reads back, or the create event, and the unbroken events after it.
"""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass
from typing import Any, NamedTuple

from optserve.sessions.kinds import WITH_PAYLOAD
from optserve.store.base import Event, Key, Payload, SessionRow, Store
from optserve.store.check import fault_of, frame_fault, rows
from optserve_client import wire


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How far a session can be rebuilt."""

    #: As it is.
    row: SessionRow
    #: The last event that can be rebuilt, and the version and updates after it.
    lsn: int
    version: int
    updates: int

    @property
    def lost_events(self) -> int:
        return self.row.last_lsn - self.lsn

    @property
    def lost_versions(self) -> tuple[int, int] | None:
        """The first and the last version that is lost; None: no version is."""
        if self.row.version <= self.version:
            return None
        return self.version + 1, self.row.version

    @property
    def loss(self) -> str:
        """What is lost, in words."""
        events = f"{self.lost_events} event{'' if self.lost_events == 1 else 's'}"
        if not self.lost_events:
            return "nothing"
        if self.lost_versions is None:
            return f"no version, but the {events} after event {self.lsn}"
        first, last = self.lost_versions
        versions = f"version {first}" if first == last else f"versions {first} to {last}"
        return f"{versions} ({events})"


class _Point(NamedTuple):
    lsn: int
    version: int
    updates: int


def plan(store: Store, row: SessionRow) -> Plan | None:
    """Return how far the session can be rebuilt; None: not at all."""
    for snapshot in reversed(store.snapshots(row.key)):
        fault, frame = frame_fault(store, row.key, snapshot)
        if fault is None and frame is not None:
            updates = _updates(store, row.key, snapshot.lsn, frame)
            return _follow(store, row, _Point(snapshot.lsn, snapshot.version, updates))
    first = next(rows(store, row.key, 0, 1)).event
    if first is None or first.payload is None or fault_of(first.payload) is not None:
        return None
    return _follow(store, row, _Point(1, first.version, first.updates))


def _updates(store: Store, key: Key, lsn: int, frame: Payload) -> int:
    """Return the updates at a snapshot: its event says it, or the frame where that row has gone."""
    event = next(rows(store, key, lsn - 1, lsn)).event
    if event is not None:
        return event.updates
    _, metadata = wire.decode(frame.read())
    return int(json.loads(metadata[wire.META_KEY])["updates"])


def _follow(store: Store, row: SessionRow, reached: _Point) -> Plan:
    for at in rows(store, row.key, reached.lsn, row.last_lsn):
        event = at.event
        if event is None or not _whole(event):
            break
        reached = _Point(at.lsn, event.version, event.updates)
    return Plan(row=row, lsn=reached.lsn, version=reached.version, updates=reached.updates)


def _whole(event: Event) -> bool:
    if event.payload is None:
        return event.kind not in WITH_PAYLOAD
    return fault_of(event.payload) is None


def salvage(store: Store, plan: Plan) -> str:
    """Drop what cannot be rebuilt and begin a new generation; return that. Raises OptserveError."""
    key: Key = plan.row.key
    generation = secrets.token_hex(8)
    about: dict[str, Any] = {**plan.row.about, "generation": generation}
    event = Event(
        key=key,
        lsn=plan.lsn + 1,
        kind="rewind",
        version=plan.version,
        updates=plan.updates,
        time=time.time(),
        owner_epoch=store.claim(key),
        record={"generation": generation, "reply": {"applied_version": None}},
        about=about,
        durability=plan.row.durability,
    )
    [outcome] = store.append([event])
    if outcome.error is not None:
        raise outcome.error
    return generation
