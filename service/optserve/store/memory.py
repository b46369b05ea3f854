"""The memory twin of the SQL store: the same promises, for as long as the process lives."""

from __future__ import annotations

import json
import threading
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from optserve.store.base import (
    KEPT_ROWS,
    KEPT_SNAPSHOTS,
    BytesLike,
    Event,
    Key,
    Outcome,
    Payload,
    PayloadWriter,
    record_text,
    refusal,
)
from optserve.store.payloads import Spool
from optserve_client.errors import OptserveError, SessionNotFound, Unavailable


@dataclass(slots=True)
class _Row:
    """An event whose record is text, so that nobody can change what was committed."""

    event: Event
    record: str

    def thaw(self) -> Event:
        return replace(self.event, record=json.loads(self.record))


@dataclass(slots=True)
class _Journal:
    owner_epoch: int
    rows: list[_Row] = field(default_factory=list)
    #: Lsn of the event before ``rows[0]``.
    gone: int = 0
    #: Up to here payloads have been dropped.
    bare: int = 0
    #: ``(lsn, frame)``, the newest last.
    snapshots: list[tuple[int, Payload]] = field(default_factory=list)

    @property
    def last_lsn(self) -> int:
        return self.gone + len(self.rows)


class MemoryStore:
    """A Store (see :mod:`optserve.store.base`) whose large payloads are not on the heap."""

    promise = "memory"

    def __init__(self, spool_dir: str | Path | None = None, *, kept_rows: int = KEPT_ROWS) -> None:
        self._spool = Spool(spool_dir)
        self._kept_rows = kept_rows
        self._lock = threading.Lock()
        #: In the order of creation, as dicts are.
        self._journals: dict[Key, _Journal] = {}
        self._top_epoch = 0
        self._closed = False

    def writer(self, size_hint: int | None = None) -> PayloadWriter:
        return self._spool.writer(size_hint)

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
            row = _Row(replace(event, record={}), record_text(event))
        except OptserveError as exc:
            return exc
        if journal is None:
            journal = self._journals[event.key] = _Journal(event.owner_epoch)
            self._top_epoch = max(self._top_epoch, event.owner_epoch)
        journal.rows.append(row)
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
    ) -> Iterator[Event]:
        with self._lock:
            self._check_open()
            if (journal := self._journals.get(key)) is None:
                return iter(())
            upto = journal.last_lsn if upto_lsn is None else upto_lsn
            rows = journal.rows[max(after_lsn - journal.gone, 0) : max(upto - journal.gone, 0)]
        return (row.thaw() for row in rows if kinds is None or row.event.kind in kinds)

    def snapshot(self, key: Key, lsn: int, chunks: Iterable[BytesLike]) -> None:
        writer = self.writer()
        try:
            for chunk in chunks:
                writer.write(chunk)
            with self._lock:
                self._check_open()
                self._keep_snapshot(key, lsn, writer)
        finally:
            writer.discard()

    def _keep_snapshot(self, key: Key, lsn: int, writer: PayloadWriter) -> None:
        if (journal := self._journals.get(key)) is None:
            raise SessionNotFound(f"no session {key.session!r}")
        if not 1 <= lsn <= journal.last_lsn:
            raise ValueError(f"snapshot lsn must be in [1, {journal.last_lsn}], got {lsn}")
        others = [kept for kept in journal.snapshots if kept[0] != lsn]
        ordered = sorted([*others, (lsn, writer.seal())], key=lambda kept: kept[0])
        journal.snapshots = ordered[-KEPT_SNAPSHOTS:]
        if len(journal.snapshots) == KEPT_SNAPSHOTS:
            self._trim(journal, journal.snapshots[0][0])

    def _trim(self, journal: _Journal, upto: int) -> None:
        """Drop the payloads of the events up to ``upto``, and rows up to there beyond the limit."""
        for at in range(max(journal.bare, journal.gone) - journal.gone, upto - journal.gone):
            row = journal.rows[at]
            journal.rows[at] = _Row(replace(row.event, payload=None), row.record)
        journal.bare = max(journal.bare, upto)
        surplus = min(len(journal.rows) - self._kept_rows, upto - journal.gone)
        if surplus > 0:
            del journal.rows[:surplus]
            journal.gone += surplus

    def latest_snapshot(self, key: Key, upto_lsn: int | None = None) -> tuple[int, Payload] | None:
        with self._lock:
            self._check_open()
            journal = self._journals.get(key)
            kept = reversed(journal.snapshots) if journal else ()
            return next((s for s in kept if upto_lsn is None or s[0] <= upto_lsn), None)

    def delete(self, key: Key) -> bool:
        with self._lock:
            self._check_open()
            return self._journals.pop(key, None) is not None

    def keys(self, tenant: str) -> list[Key]:
        with self._lock:
            self._check_open()
            return [key for key in self._journals if key.tenant == tenant]

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._journals.clear()
        self._spool.close()

    def _check_open(self) -> None:
        if self._closed:
            raise Unavailable("the store is closed")
