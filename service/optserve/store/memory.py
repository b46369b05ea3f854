"""The memory twin of the SQL store: the same promises, for as long as the process lives."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path

from optserve.store.base import (
    KEPT_ROWS,
    KEPT_SNAPSHOTS,
    SPENT_S,
    Durability,
    Event,
    Key,
    Outcome,
    Payload,
    PayloadWriter,
    SessionRow,
    SnapshotRow,
    Soon,
    SpentKey,
    refusal,
)
from optserve.store.frozen import Frozen
from optserve.store.payloads import Spool
from optserve_client.errors import OptserveError, SessionNotFound, Unavailable


@dataclass(slots=True)
class _Kept:
    row: SnapshotRow
    frame: Payload


@dataclass(slots=True)
class _Journal:
    owner_epoch: int
    rows: list[Frozen] = field(default_factory=list)
    about: str = "{}"
    create: Frozen | None = None
    #: Lsn of the event before ``rows[0]``.
    gone: int = 0
    #: Up to here payloads have been dropped.
    bare: int = 0
    #: By lsn.
    snapshots: list[_Kept] = field(default_factory=list)

    @property
    def last_lsn(self) -> int:
        return self.gone + len(self.rows)

    def append(self, row: Frozen) -> None:
        if row.event.kind == "rewind":
            at = row.event.lsn
            del self.rows[max(at - 1 - self.gone, 0) :]
            self.gone = min(self.gone, at - 1)
            self.bare = min(self.bare, at - 1)
            self.snapshots = [kept for kept in self.snapshots if kept.row.lsn < at]
        self.create = self.create or row
        self.rows.append(row)
        if row.about is not None:
            self.about = row.about


class MemoryStore:
    """A Store (see :mod:`optserve.store.base`) whose large payloads are not on the heap."""

    promise: Durability = "memory"
    name = "memory"

    def __init__(self, spool_dir: str | Path | None = None, *, kept_rows: int = KEPT_ROWS) -> None:
        self._spool = Spool(spool_dir)
        self._kept_rows = kept_rows
        self._lock = threading.Lock()
        #: In the order of creation, as dicts are.
        self._spent: list[SpentKey] = []
        self._journals: dict[Key, _Journal] = {}
        self._top_epoch = 0
        self._closed = False

    def writer(
        self,
        size_hint: int | None = None,
        durability: Durability = "always",
        *,
        read_soon: bool = False,
    ) -> PayloadWriter:
        return self._spool.writer(size_hint)

    def submit(self, events: Sequence[Event], soon: Soon | None = None) -> Future[list[Outcome]]:
        future: Future[list[Outcome]] = Future()
        future.set_result(self.append(events))
        return future

    def append(self, events: Sequence[Event]) -> list[Outcome]:
        with self._lock:
            self._check_open()
            return [
                Outcome(key=event.key, lsn=event.lsn, error=self._append(event)) for event in events
            ]

    def _append(self, event: Event) -> OptserveError | None:
        journal = self._journals.get(event.key)
        last, epoch = (journal.last_lsn, journal.owner_epoch) if journal else (None, 0)
        if error := refusal(event, last, epoch):
            return error
        try:
            row = Frozen.of(event)
        except OptserveError as exc:
            return exc
        if journal is None:
            journal = self._journals[event.key] = _Journal(event.owner_epoch)
            self._top_epoch = max(self._top_epoch, event.owner_epoch)
        journal.append(row)
        return None

    def claim(self, key: Key) -> int:
        with self._lock:
            self._check_open()
            self._top_epoch += 1
            if journal := self._journals.get(key):
                journal.owner_epoch = self._top_epoch
            return self._top_epoch

    def events(
        self,
        key: Key,
        after_lsn: int = 0,
        upto_lsn: int | None = None,
        kinds: Collection[str] | None = None,
        *,
        payloads: bool = True,
    ) -> Iterator[Event]:
        with self._lock:
            self._check_open()
            if (journal := self._journals.get(key)) is None:
                return iter(())
            upto = journal.last_lsn if upto_lsn is None else upto_lsn
            rows = journal.rows[max(after_lsn - journal.gone, 0) : max(upto - journal.gone, 0)]
        return (row.thaw(payloads) for row in rows if kinds is None or row.event.kind in kinds)

    def first_at(self, key: Key, version: int) -> int | None:
        with self._lock:
            self._check_open()
            journal = self._journals.get(key)
            rows = journal.rows if journal else ()
            return next((row.event.lsn for row in rows if row.event.version >= version), None)

    # --- snapshots ---

    def snapshot(self, key: Key, lsn: int, frame: Payload, pin: str | None = None) -> None:
        for _ in frame.chunks():
            pass  # raises Damaged unless it reads back
        with self._lock:
            self._check_open()
            if (journal := self._journals.get(key)) is None:
                raise SessionNotFound(f"no session {key.session!r}")
            if not 1 <= lsn <= journal.last_lsn:
                raise ValueError(f"snapshot lsn must be in [1, {journal.last_lsn}], got {lsn}")
            if lsn <= journal.gone:
                raise ValueError(f"snapshot lsn must be of a kept event, got {lsn}")
            self._keep_snapshot(journal, lsn, frame, pin)

    def _keep_snapshot(self, journal: _Journal, lsn: int, frame: Payload, pin: str | None) -> None:
        old = next((kept for kept in journal.snapshots if kept.row.lsn == lsn), None)
        row = SnapshotRow(
            lsn=lsn,
            version=journal.rows[lsn - journal.gone - 1].event.version,
            nbytes=frame.nbytes,
            time=time.time(),
            pin=old.row.pin if pin is None and old else pin,
        )
        others = [kept for kept in journal.snapshots if kept is not old]
        journal.snapshots = sorted([*others, _Kept(row, frame)], key=lambda kept: kept.row.lsn)
        self._trim(journal)

    def _trim(self, journal: _Journal) -> None:
        """Drop what the newest two snapshots made superfluous."""
        if len(journal.snapshots) < KEPT_SNAPSHOTS:
            return
        newest = journal.snapshots[-KEPT_SNAPSHOTS:]
        pinned = [kept for kept in journal.snapshots[:-KEPT_SNAPSHOTS] if kept.row.pin is not None]
        journal.snapshots = pinned + newest
        upto = newest[0].row.lsn
        for row in journal.rows[max(journal.bare - journal.gone, 0) : max(upto - journal.gone, 0)]:
            row.event = replace(row.event, payload=None)
        journal.bare = max(journal.bare, upto)
        surplus = min(len(journal.rows) - self._kept_rows, upto - journal.gone)
        if surplus > 0:
            del journal.rows[:surplus]
            journal.gone += surplus

    def unpin(self, key: Key, lsn: int) -> bool:
        with self._lock:
            self._check_open()
            journal = self._journals.get(key)
            for kept in journal.snapshots if journal else ():
                if kept.row.lsn == lsn and kept.row.pin is not None:
                    kept.row = replace(kept.row, pin=None)
                    assert journal is not None
                    self._trim(journal)
                    return True
            return False

    def snapshots(self, key: Key) -> list[SnapshotRow]:
        with self._lock:
            self._check_open()
            journal = self._journals.get(key)
            return [kept.row for kept in journal.snapshots] if journal else []

    def read_snapshot(self, key: Key, lsn: int) -> Payload | None:
        with self._lock:
            self._check_open()
            journal = self._journals.get(key)
            kept = journal.snapshots if journal else ()
            return next((k.frame for k in kept if k.row.lsn == lsn), None)

    # --- sessions ---

    def delete(self, key: Key) -> bool:
        with self._lock:
            self._check_open()
            if (journal := self._journals.pop(key, None)) is None:
                return False
            self._spend(key, journal)
            return True

    def _spend(self, key: Key, journal: _Journal) -> None:
        assert journal.create is not None
        created = journal.create.event
        if created.idempotency_key is not None:
            self._spent.append(
                SpentKey(
                    key=key,
                    idempotency_key=created.idempotency_key,
                    digest=created.digest,
                    created=created.time,
                )
            )
        before = time.time() - SPENT_S
        self._spent = [spent for spent in self._spent if spent.created >= before]

    def spent_keys(self) -> list[SpentKey]:
        with self._lock:
            self._check_open()
            return sorted(self._spent, key=lambda spent: spent.created)

    def sessions(self) -> list[SessionRow]:
        with self._lock:
            self._check_open()
            return [self._session(key, journal) for key, journal in self._journals.items()]

    def session(self, key: Key) -> SessionRow | None:
        with self._lock:
            self._check_open()
            journal = self._journals.get(key)
            return self._session(key, journal) if journal else None

    @staticmethod
    def _session(key: Key, journal: _Journal) -> SessionRow:
        assert journal.create is not None
        first, last = journal.create.event, journal.rows[-1].event
        return SessionRow(
            key=key,
            last_lsn=last.lsn,
            version=last.version,
            updates=last.updates,
            created=first.time,
            changed=last.time,
            about=json.loads(journal.about),
            durability="memory",
            create_key=first.idempotency_key,
            create_digest=first.digest,
        )

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._journals.clear()
        self._spool.close()

    def _check_open(self) -> None:
        if self._closed:
            raise Unavailable("the store is closed")
