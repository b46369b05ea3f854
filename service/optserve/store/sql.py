"""The SQL store: journals in a database, large payloads in files beside it.

`commits` queues and groups what is written, `writing` says what that does to the tables, `reading`
reads them; `tail` has what ``memory`` sessions keep in this process, `placing` puts payloads where
they belong, and `database` with its two kinds is the only one that knows a driver.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress

from optserve.store.base import (
    KEPT_ROWS,
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
)
from optserve.store.commits import Commits
from optserve.store.database import Database, Row
from optserve.store.files import PayloadFiles
from optserve.store.migrations import prepare
from optserve.store.placing import Placing
from optserve.store.reading import Reading
from optserve.store.rounds import Rounds
from optserve.store.schema import RELEASE
from optserve.store.tail import Tails
from optserve.store.writing import Writing, of
from optserve_client.errors import Damaged, OptserveError, Unavailable


class SqlStore:
    """A Store (see :mod:`optserve.store.base`) that outlives its process."""

    promise: Durability = "always"

    def __init__(
        self, database: Database, files: PayloadFiles | None, *, kept_rows: int = KEPT_ROWS
    ) -> None:
        """Open ``database``, whose tables are made or brought up to date where that is due.

        The caller has seen to it that nobody else has it open. Raises CannotOpen for a format that
        this release does not know, and what a Store raises where the database fails.
        """
        self.name = database.name
        self._database = database
        self._files = files
        self._closed = False
        prepare(database)
        self._boot = database.boot()
        self._tails = Tails()
        self._placing = Placing(database.sql, files)
        self._writing = Writing(database, self._placing, self._tails, self._boot, kept_rows)
        self._reading = Reading(database, self._placing, self._tails)
        self._recover()
        database.reopened = self._reopened
        rounds = Rounds(database, self._placing, self._tails, self._writing)
        self._commits = Commits(database, self._placing, self._tails, rounds)

    # --- begin and end ---

    def _recover(self) -> None:
        """Find out how the last server ended, and what that may have cost."""
        sql = self._database.sql
        with self._database.transaction() as tx:
            [meta] = tx.rows(sql["meta"])
            self._writing.top_epoch = meta["top_epoch"]
            [last_place] = tx.column(sql["last_place"])
            self._writing.last_place = last_place or 0
            tx.run(sql["suspect"], {"k_boot": self._boot})
            self._writing.dirty = {Key(r["tenant"], r["session"]) for r in tx.rows(sql["dirty"])}
            opened = {"release": RELEASE, "boot": self._boot, "clean": 0}
            tx.run(sql["opened"], opened)
            tx.run(sql["forget_keys"], {"k_before": time.time() - SPENT_S})
        if self._files is None:
            return
        with self._database.reading() as now:
            named = set(now.column(sql["all_files"]))
            unsynced = {key: now.rows(sql["files"], of(key)) for key in self._writing.dirty}
        for key, rows in unsynced.items():
            if not self._settle(self._files, rows):
                with self._database.transaction() as tx:
                    tx.run(sql["doubt"], of(key))
        self._files.sweep(named.__contains__)

    @staticmethod
    def _settle(files: PayloadFiles, rows: list[Row]) -> bool:
        """Sync what a server that was killed has left to the system; return whether it is safe."""
        try:
            for row in rows:
                with suppress(Damaged):  # reading tells
                    digest = bytes(row["payload_digest"])
                    payload = files.open(row["payload_file"], row["payload_bytes"], digest)
                    files.settle(payload)
        except OptserveError:
            return False
        return True

    def _reopened(self) -> None:
        """Look whether the database has lost what was committed to it without a sync."""
        if (boot := self._database.boot()) != self._writing.boot:
            with self._database.transaction() as tx:
                tx.run(self._database.sql["suspect_os"], {"k_boot": boot})
            self._writing.boot = boot
            self._writing.dirty.clear()
            self._writing.untold.clear()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._commits.close()
        with suppress(OptserveError):  # what is not done is due at the next start, as after a crash
            self._leave()
        self._placing.close()
        self._database.close()

    def _leave(self) -> None:
        """Make what is not durable durable, and say so."""
        if self._files is not None:
            self._files.flush()
        self._database.settle()
        with self._database.transaction() as tx:
            tx.run(self._database.sql["all_clean"], {"k_boot": self._writing.boot})
            opened = {"release": RELEASE, "boot": self._writing.boot, "clean": 1}
            tx.run(self._database.sql["opened"], opened)

    def integrity(self) -> Iterator[str]:
        """Yield a sentence for each fault that the database finds in itself."""
        self._check_open()
        return self._database.integrity()

    def _check_open(self) -> None:
        if self._closed:
            raise Unavailable("the store is closed")

    # --- writing ---

    def writer(
        self,
        size_hint: int | None = None,
        durability: Durability = "always",
        *,
        read_soon: bool = False,
    ) -> PayloadWriter:
        self._check_open()
        return self._placing.writer(size_hint, durability, read_soon)

    def submit(self, events: Sequence[Event], soon: Soon | None = None) -> Future[list[Outcome]]:
        self._check_open()
        return self._commits.submit(events, soon)

    def append(self, events: Sequence[Event]) -> list[Outcome]:
        self._check_open()
        return self._commits.append(events)

    def claim(self, key: Key) -> int:
        self._check_open()
        with self._commits.change(key) as (tx, after):
            return self._writing.claim(tx, key, after)

    def snapshot(self, key: Key, lsn: int, frame: Payload, pin: str | None = None) -> None:
        self._check_open()
        placed, committing = None, False
        try:
            placed = self._placing.place(frame)
            if self._files is not None and placed.file is not None:
                self._files.settle(placed.file)
                self._files.verify(placed.file)
            committing = True
            with self._commits.change(key) as (tx, after):
                self._writing.snapshot(tx, key, lsn, placed, pin, after)
        except BaseException as exc:
            # A commit that is Unavailable may name the file; else the next start removes it.
            if not (committing and isinstance(exc, Unavailable)):
                frame.discard()
                if placed is not None:
                    placed.give_up()
            raise

    def unpin(self, key: Key, lsn: int) -> bool:
        self._check_open()
        with self._commits.change(key) as (tx, after):
            return self._writing.unpin(tx, key, lsn, after)

    def delete(self, key: Key) -> bool:
        self._check_open()
        with self._commits.change(key) as (tx, after):
            return self._writing.delete(tx, key, after)

    # --- reading ---

    def events(
        self,
        key: Key,
        after_lsn: int = 0,
        upto_lsn: int | None = None,
        kinds: Collection[str] | None = None,
        *,
        payloads: bool = True,
    ) -> Iterator[Event]:
        self._check_open()
        return self._reading.events(key, after_lsn, upto_lsn, kinds, payloads)

    def first_at(self, key: Key, version: int) -> int | None:
        self._check_open()
        return self._reading.first_at(key, version)

    def snapshots(self, key: Key) -> list[SnapshotRow]:
        self._check_open()
        return [
            SnapshotRow(
                lsn=row["lsn"],
                version=row["version"],
                nbytes=row["payload_bytes"],
                time=row["time"],
                pin=row["pin"],
            )
            for row in self._reading.snapshots(key)
        ]

    def read_snapshot(self, key: Key, lsn: int) -> Payload | None:
        self._check_open()
        return self._reading.snapshot(key, lsn)

    def sessions(self) -> list[SessionRow]:
        self._check_open()
        return self._reading.sessions()

    def spent_keys(self) -> list[SpentKey]:
        self._check_open()
        return self._reading.spent_keys()

    def session(self, key: Key) -> SessionRow | None:
        self._check_open()
        return self._reading.session(key)
