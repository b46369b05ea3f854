"""SQLite in WAL mode: one file beside the data, and nothing to set up."""

from __future__ import annotations

import os
import sqlite3
import sys
import uuid
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from optserve.store.database import Connection, Database, Fault
from optserve_client.errors import Unavailable

BUSY_TIMEOUT_S = 10
#: Free pages that may stay in the file, and how many go at once.
FREE_PAGES = 4096
TIDY_PAGES = 2048
#: Pages that the log may grow by before they are brought into the database.
CHECKPOINT_FRAMES = 1000
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@cache
def machine_boot() -> str:
    """Name this boot of the machine; a name that never comes back where it has none."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return f"unknown-{uuid.uuid4()}"


class Sqlite(Database):
    """A file. Its ``-wal`` and ``-shm`` belong to it."""

    name = "sqlite"
    read_mode = ""
    error = sqlite3.Error

    def __init__(self, path: Path) -> None:
        self.path = path
        engine = sa.create_engine(
            sa.URL.create("sqlite", database=str(path)),
            paramstyle="named",
            pool_size=4,
            max_overflow=-1,
            connect_args={"check_same_thread": False, "timeout": BUSY_TIMEOUT_S},
        )
        sa.event.listen(engine, "connect", _manual_transactions)
        super().__init__(engine, f"the database {path}")
        self._sync: bool | None = None
        #: The file of the log's index.
        self._index: int | None = None
        self._indexes: list[int] = []
        self._copied_frames = 0

    def connect(self) -> Connection:
        driver: Any = self._driver()
        try:
            self._recover(driver)
        except BaseException:
            driver.close()
            raise
        driver.execute("PRAGMA wal_autocheckpoint=0")
        self._sync, self._copied_frames = None, 0
        return Connection(driver)

    def _driver(self) -> Any:
        new = not self.path.exists() or self.path.stat().st_size == 0
        # Outside the pool, which would call it sound again after an error.
        driver = sqlite3.connect(
            self.path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
        )
        if new:  # takes effect before the first table only
            driver.execute("PRAGMA auto_vacuum=INCREMENTAL")
        [mode] = driver.execute("PRAGMA journal_mode=WAL").fetchone()
        if mode != "wal":
            raise Unavailable(f"{self.where} cannot be in WAL mode here, only in {mode!r}")
        # Also if it is not new: who made it may have been killed before this.
        sync_directory(self.path.parent)
        return driver

    def _recover(self, driver: Any) -> None:
        """Bring the whole log into the database, and begin an empty one.

        After a failed sync the kernel may call pages clean that never reached the disk: the next
        sync would succeed without them. Copying writes all of them anew.
        """
        driver.execute("PRAGMA synchronous=FULL")
        busy, _, _ = driver.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if busy:
            raise Unavailable(f"{self.where} is being read; its log cannot be emptied")
        # The old log must not come back: part of it is older than the database now.
        log = Path(f"{self.path}-wal")
        if log.exists():
            fd = os.open(log, os.O_RDWR)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

    def begin(self, writer: Connection, sync: bool) -> None:
        if sync is not self._sync:
            writer.driver.execute(f"PRAGMA synchronous={'FULL' if sync else 'NORMAL'}")
            self._sync = sync
        writer.driver.execute("BEGIN IMMEDIATE")

    def settle(self) -> None:
        try:
            self._recover(self.writer.driver)
        except sqlite3.Error as exc:
            raise self.translated(exc) from exc
        except OSError as exc:
            raise Unavailable(f"{self.where} failed: {exc.strerror}") from exc

    @property
    def at_hand(self) -> bool:
        return self._writer is not None  # else it is opened first, which waits for the disk

    def due(self) -> bool:
        """Say whether the log has grown."""
        try:
            frames = self._log_frames()
        except OSError:  # too many files are open
            return True
        if frames < self._copied_frames:  # a new log was begun
            self._copied_frames = 0
        return frames >= self._copied_frames + CHECKPOINT_FRAMES

    def catch_up(self) -> None:
        """Bring the log into the database.

        SQLite would do so by itself, and keep to itself that a sync failed: the next one would
        succeed, behind a hole.
        """
        super().catch_up()
        if self._writer is None:  # who opens it anew copies everything
            return
        try:
            self._writer.driver.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
            self._copied_frames = self._log_frames()
        except OSError:
            self._copied_frames = 0
        except sqlite3.Error:
            # What was committed is in the log, as safe as it should be. No later sync of this log
            # is to be believed: the next writer copies all of it anew.
            self.drop_writer()

    def _log_frames(self) -> int:
        """Return how many pages the log has: ``mxFrame`` of the index's header (walformat.html)."""
        if self._index is None:
            self._index = os.open(f"{self.path}-shm", os.O_RDONLY | os.O_CLOEXEC)
        return int.from_bytes(os.pread(self._index, 4, 16), sys.byteorder)

    def drop_writer(self) -> None:
        if self._index is not None:
            # Closing it now would take away the locks that SQLite has on the same file.
            self._indexes.append(self._index)
            self._index = None
        super().drop_writer()

    def close(self) -> None:
        super().close()
        while self._indexes:
            os.close(self._indexes.pop())

    def tidy(self) -> None:
        try:
            driver = self.writer.driver
            [free] = driver.execute("PRAGMA freelist_count").fetchone()
            if free > FREE_PAGES:
                pages = min(free - FREE_PAGES, TIDY_PAGES)
                driver.execute(f"PRAGMA incremental_vacuum({pages})").fetchall()
        except sqlite3.Error:
            self.drop_writer()  # nothing is lost; what is wrong shows when it is opened again

    def integrity(self) -> Iterator[str]:
        with self.reading() as now:
            for said in now.column("PRAGMA integrity_check"):
                if said != "ok":
                    yield f"{self.where}: {said}"

    def boot(self) -> str:
        return machine_boot()

    def fault(self, exc: BaseException) -> Fault:
        code = getattr(exc, "sqlite_errorcode", None)
        if code is None:
            return "value"  # the driver cannot pass it on
        match code & 0xFF:
            case sqlite3.SQLITE_FULL:
                return "full"
            case sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_NOTADB:
                return "damaged"
            case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
                return "busy"
            case sqlite3.SQLITE_TOOBIG | sqlite3.SQLITE_MISMATCH | sqlite3.SQLITE_CONSTRAINT:
                return "value"
        return "broken"


def _manual_transactions(driver: Any, _: object) -> None:
    """Leave BEGIN to us: the module would begin none where only reads follow."""
    driver.isolation_level = None
    driver.execute("PRAGMA query_only=ON")


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
