"""PostgreSQL through psycopg: for servers whose disk is elsewhere."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from typing import Any

import psycopg
import sqlalchemy as sa

from optserve.store.database import Connection, Database, Fault
from optserve.store.migrations import InUse
from optserve.store.sqlite import machine_boot
from optserve_client.errors import Unavailable

#: Of the advisory lock: "optserve" in ASCII.
LOCK = 0x6F70747365727665
#: How long a lock of our own that broke with its connection may outlive it on the server.
LOCK_WAIT_S = 5.0
CONNECT_TIMEOUT_S = 10
_NAME = "optserve"


def _how() -> dict[str, Any]:
    return {
        "autocommit": True,  # BEGIN is ours
        "application_name": f"{_NAME} {os.getpid()}",
        "connect_timeout": CONNECT_TIMEOUT_S,
        "client_encoding": "utf8",
    }


class Postgresql(Database):
    """A database that one server uses at a time."""

    name = "postgresql"
    read_mode = "ISOLATION LEVEL REPEATABLE READ READ ONLY"
    error = psycopg.Error

    def __init__(self, url: sa.URL, *, with_files: bool) -> None:
        engine = sa.create_engine(
            url,
            pool_size=4,
            max_overflow=-1,
            pool_pre_ping=True,
            connect_args=_how(),
        )
        super().__init__(engine, f"the database {url.render_as_string(hide_password=True)}")
        self._with_files = with_files
        self._was_open = False

    def connect(self) -> Connection:
        arguments, values = self.engine.dialect.create_connect_args(self.engine.url)
        driver: Any = psycopg.connect(*arguments, **{**values, **_how()})
        connection = Connection(driver)
        try:
            self._lock(connection)
            # A server may have it off by default; what waits for nothing is asked for below.
            if connection.column("SHOW synchronous_commit") == ["off"]:
                connection.run("SET synchronous_commit TO on")
        except BaseException:
            driver.close()
            raise
        self._was_open = True
        return connection

    def _lock(self, connection: Connection) -> None:
        """Lock the database on the connection that writes: without the lock, nothing is written."""
        end = time.monotonic() + (LOCK_WAIT_S if self._was_open else 0)
        while connection.column("SELECT pg_try_advisory_lock(%(key)s)", {"key": LOCK}) != [True]:
            if time.monotonic() >= end:
                sentence = f"{self.where} is used by {self._holder(connection)}"
                if self._was_open:
                    raise Unavailable(sentence)
                raise InUse(f"{sentence}: stop it, or name another database")
            time.sleep(0.05)

    @staticmethod
    def _holder(connection: Connection) -> str:
        names = connection.column(
            "SELECT application_name FROM pg_locks JOIN pg_stat_activity USING (pid) "
            "WHERE locktype = 'advisory' AND granted AND "
            "(classid::bigint << 32) + objid::bigint = %(key)s",
            {"key": LOCK},
        )
        said = str(names[0]).removeprefix(_NAME).strip() if names else ""
        return f"the server with pid {said}" if said.isdigit() else "another server"

    def begin(self, writer: Connection, sync: bool) -> None:
        writer.driver.execute("BEGIN")
        if not sync:
            writer.driver.execute("SET LOCAL synchronous_commit TO off")

    def settle(self) -> None:
        """Nothing to do: the next synced commit covers what came before it."""

    def tidy(self) -> None:
        """Nothing to do: autovacuum does."""

    def integrity(self) -> Iterator[str]:
        return iter(())  # pg_amcheck, which needs rights that a server has not

    def boot(self) -> str:
        """Name the time since the server last lost its memory.

        An unlogged table is empty after a crash of PostgreSQL, and after nothing else: exactly
        when commits that were not synced may be gone. Files of ours go with this machine.
        """
        writer = self.writer
        try:
            writer.run("CREATE UNLOGGED TABLE IF NOT EXISTS alive (mark TEXT NOT NULL)")
            if not (marks := writer.column("SELECT mark FROM alive")):
                marks = [str(uuid.uuid4())]
                writer.run("INSERT INTO alive VALUES (%(mark)s)", {"mark": marks[0]})
        except psycopg.Error as exc:
            raise self.translated(exc) from exc
        return f"{marks[0]} {machine_boot()}" if self._with_files else str(marks[0])

    def fault(self, exc: BaseException) -> Fault:
        if not isinstance(exc, psycopg.Error):
            return "value"  # the driver cannot pass it on
        state = exc.sqlstate or ""
        if state in ("53100", "54000", "22P05"):
            return "full" if state == "53100" else "value"
        if state in ("XX001", "XX002"):
            return "damaged"
        # Constraints, values, and what psycopg itself cannot adapt.
        if state[:2] in ("22", "23", "42") or (not state and isinstance(exc, psycopg.DataError)):
            return "value"
        if isinstance(exc, psycopg.ProgrammingError) and not state:
            return "value"
        return "broken"
