"""Whether what a store keeps can be read back: every row, payload and snapshot of a session."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from optserve.store.base import Event, Key, Payload, SessionRow, SnapshotRow, Store
from optserve_client.errors import OptserveError

#: Rows that are asked for at once; one at a time behind a fault, to tell the good ones from it.
_SPAN = 512
_PAYLOAD_FILE = re.compile(r"payload file (\w+)")


@runtime_checkable
class SelfChecking(Protocol):
    """A store that can tell what is wrong with it beyond its single sessions."""

    def integrity(self) -> Iterator[str]:
        """Yield a sentence for each fault of the medium itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One thing that is not as it should be."""

    #: None: of the store as a whole.
    key: Key | None
    #: Of the event, or the one that the snapshot follows; None: of the session as a whole.
    lsn: int | None = None
    #: Name of the payload file, if there is one.
    file: str | None = None
    #: What, in words that name the place.
    what: str


@dataclass(slots=True)
class Tally:
    """How much was looked at."""

    sessions: int = 0
    events: int = 0
    snapshots: int = 0
    payloads: int = 0
    payload_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Row:
    """One place in a journal: its event, or why there is none."""

    lsn: int
    event: Event | None
    fault: str = ""


def rows(store: Store, key: Key, after_lsn: int, upto_lsn: int) -> Iterator[Row]:
    """Yield a Row for each lsn in ``(after_lsn, upto_lsn]``: also those that are not there."""
    at, span = after_lsn, _SPAN
    while at < upto_lsn:
        end = min(at + span, upto_lsn)
        try:
            for event in store.events(key, at, end):
                yield from _missing(at, event.lsn)
                yield Row(event.lsn, event)
                at = event.lsn
            yield from _missing(at, end + 1)
            at, span = end, min(span * 2, _SPAN)
        except (OptserveError, ValueError) as exc:  # ValueError: what should be JSON is none
            if span == 1:
                at += 1
                yield Row(at, None, f"event {at} cannot be read: {exc}")
            span = 1


def _missing(before: int, lsn: int) -> Iterator[Row]:
    return (Row(at, None, f"event {at} is missing") for at in range(before + 1, lsn))


def fault_of(payload: Payload) -> str | None:
    """Read ``payload`` to its end; return why that cannot be done, or None."""
    seen = 0
    try:
        for chunk in payload.chunks():
            seen += chunk.nbytes
    except OptserveError as exc:
        return exc.detail
    if seen != payload.nbytes:
        return f"the payload has {seen} bytes, expected {payload.nbytes}"
    return None


def frame_fault(store: Store, key: Key, snapshot: SnapshotRow) -> tuple[str | None, Payload | None]:
    """Return why the frame of a snapshot cannot be read, or None, and the frame if it is there."""
    try:
        frame = store.read_snapshot(key, snapshot.lsn)
    except OptserveError as exc:
        return exc.detail, None
    if frame is None:
        return "it is missing", None
    return fault_of(frame), frame


def base_of(snapshots: list[SnapshotRow]) -> int:
    """Return up to which lsn events may have lost their payloads: the older of two snapshots."""
    return snapshots[-2].lsn if len(snapshots) > 1 else 0


def check_session(store: Store, row: SessionRow, tally: Tally) -> Iterator[Problem]:
    """Yield what is wrong with one session.

    Every snapshot, pinned ones too, must read back; above the older of the two newest ones every
    event must be there, and every payload that it names, byte for byte; the journal must end as
    the session's row says.
    """
    tally.sessions += 1
    snapshots = store.snapshots(row.key)
    for snapshot in snapshots:
        fault, frame = frame_fault(store, row.key, snapshot)
        tally.snapshots += 1
        _count(tally, frame)
        if fault is not None:
            pin = f" (pinned as {snapshot.pin!r})" if snapshot.pin is not None else ""
            what = f"snapshot of version {snapshot.version}{pin}: {fault}"
            yield Problem(key=row.key, lsn=snapshot.lsn, file=_file(fault), what=what)
    yield from _check_journal(store, row, base_of(snapshots), tally)


def _check_journal(store: Store, row: SessionRow, base: int, tally: Tally) -> Iterator[Problem]:
    began = False
    last: Event | None = None
    for at in rows(store, row.key, 0, row.last_lsn):
        began = began or at.event is not None or at.lsn > base
        if at.event is None:
            if began:  # below, old rows may go
                yield Problem(key=row.key, lsn=at.lsn, what=at.fault)
            continue
        last, payload = at.event, at.event.payload
        tally.events += 1
        _count(tally, payload)
        if payload is not None and at.lsn > base and (fault := fault_of(payload)) is not None:
            what = f"event {at.lsn} ({last.kind}, version {last.version}): {fault}"
            yield Problem(key=row.key, lsn=at.lsn, file=_file(fault), what=what)
    if last is not None and last.lsn == row.last_lsn:
        counted, said = (last.version, last.updates), (row.version, row.updates)
        if counted != said:
            what = f"the last event has version and updates {counted}, the session has {said}"
            yield Problem(key=row.key, lsn=last.lsn, what=what)


def _count(tally: Tally, payload: Payload | None) -> None:
    if payload is not None:
        tally.payloads += 1
        tally.payload_bytes += payload.nbytes


def _file(fault: str) -> str | None:
    """Return the name of the payload file that the sentence is about, if it is about one."""
    found = _PAYLOAD_FILE.search(fault)
    return found[1] if found else None
