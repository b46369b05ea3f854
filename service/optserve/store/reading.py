"""Reading journals without holding them in memory, while others write."""

from __future__ import annotations

import json
from collections.abc import Collection, Generator, Iterator
from contextlib import suppress
from typing import Any, cast

from sqlalchemy.pool import PoolProxiedConnection

from optserve.store.base import Event, Key, Payload, SessionRow, SpentKey
from optserve.store.database import Connection, Database, Row
from optserve.store.placing import EVENT, FRAME, LostPayload, Placing
from optserve.store.tail import Tails
from optserve.store.writing import of
from optserve_client.errors import Damaged

#: Rows in one go; with payloads, 4 MiB at most.
PAGE_ROWS = 1000
PAGE_ROWS_PAYLOADS = 64


class Reading:
    """What a store can be asked; any thread may call."""

    def __init__(self, database: Database, placing: Placing, tails: Tails) -> None:
        self._database = database
        self._sql = database.sql
        self._placing = placing
        self._tails = tails

    # --- events ---

    def events(
        self,
        key: Key,
        after_lsn: int,
        upto_lsn: int | None,
        kinds: Collection[str] | None,
        payloads: bool,
    ) -> Iterator[Event]:
        """Yield events of one state of the journal, that of now."""
        with self._tails.lock:
            tail = self._tails.get(key)
            rows = list(tail.rows) if tail else []
            # Where there is a tail, no commit may come between it and the database.
            opened = self._open(key) if tail else None
        pooled, session = opened or self._open(key)
        upto = 2**62 if upto_lsn is None else upto_lsn
        if session is None:
            pooled.close()
            return iter(())
        kept = [
            row
            for row in rows
            if max(after_lsn, session["last_lsn"]) < row.event.lsn <= upto
            and (kinds is None or row.event.kind in kinds)
        ]
        walk = self._walk(
            pooled, key, session, after_lsn, min(upto, session["last_lsn"]), kinds, payloads
        )
        # From its first yield on, the connection goes back however the walk ends.
        next(walk)
        return self._both(cast(Iterator[Event], walk), (row.thaw(payloads) for row in kept))

    @staticmethod
    def _both(first: Iterator[Event], second: Iterator[Event]) -> Iterator[Event]:
        yield from first
        yield from second

    def _open(self, key: Key) -> tuple[PoolProxiedConnection, Row | None]:
        """Begin to read; what is seen is what was committed up to here."""
        pooled = self._database.reader()
        try:
            connection = Connection(pooled.dbapi_connection)
            connection.driver.execute(f"BEGIN {self._database.read_mode}")
            return pooled, connection.row(self._sql["session"], of(key))
        except BaseException as exc:
            pooled.invalidate()
            if isinstance(exc, self._database.error):
                raise self._database.translated(exc) from exc
            raise

    def _walk(
        self,
        pooled: PoolProxiedConnection,
        key: Key,
        session: Row,
        after: int,
        upto: int,
        kinds: Collection[str] | None,
        payloads: bool,
    ) -> Generator[Event | None]:
        try:
            yield None
            connection = Connection(pooled.dbapi_connection)
            limit = PAGE_ROWS_PAYLOADS if payloads else PAGE_ROWS
            where = of(key, k_limit=limit)
            if kinds is not None:
                where |= {f"k_kind{i}": kind for i, kind in enumerate(sorted(kinds))}
            text = self._sql.page(None if kinds is None else len(kinds), payloads)
            while after < upto:
                page = connection.rows(text, where | {"k_after": after, "k_upto": upto})
                for row in page:
                    yield self._event(connection, key, session, row, payloads)
                after = page[-1]["lsn"] if len(page) == limit else upto
        except self._database.error as exc:
            raise self._database.translated(exc) from exc
        finally:
            pooled.close()

    def _event(
        self, connection: Connection, key: Key, session: Row, row: Row, payloads: bool
    ) -> Event:
        payload = None
        if payloads and row["payload_bytes"] is not None and row["lsn"] > session["bare_lsn"]:
            payload = self._placing.find(connection, key, row, EVENT, row["data"])
            if isinstance(payload, LostPayload) and not self._still(key, session, row):
                payload = None
        return Event(
            key=key,
            lsn=row["lsn"],
            kind=row["kind"],
            version=row["version"],
            updates=row["updates"],
            time=row["time"],
            owner_epoch=row["owner_epoch"],
            worker=row["worker"],
            epoch=row["epoch"],
            seq=row["seq"],
            idempotency_key=row["idempotency_key"],
            digest=bytes(row["digest"]),
            record=self._json(row["record"], f"event {row['lsn']} of session {key.session!r}"),
            loss=row["loss"],
            grad_norm=row["grad_norm"],
            payload=payload,
        )

    def _still(self, key: Key, session: Row, row: Row) -> bool:
        """Whether a payload should be there: what this walk sees may be dropped by now."""
        with self._database.reading() as now:
            current = now.row(self._sql["session"], of(key))
            if current is None or current["place"] != session["place"]:
                return False
            if row["lsn"] <= current["bare_lsn"] or row["payload_file"] is None:
                return bool(row["lsn"] > current["bare_lsn"])
            return bool(now.column(self._sql["file_known"], {"k_file": row["payload_file"]}))

    @staticmethod
    def _json(text: str, what: str) -> dict[str, Any]:
        try:
            value = json.loads(text)
        except ValueError as exc:
            raise Damaged(f"{what} cannot be read: {exc}") from exc
        if not isinstance(value, dict):
            raise Damaged(f"{what} cannot be read: it is no JSON object")
        return value

    def first_at(self, key: Key, version: int) -> int | None:
        """Search by halves: versions never fall along a journal, and no lsn is missing."""
        with self._tails.lock:
            tail = self._tails.get(key)
            rows = list(tail.rows) if tail else []
            found = self._first_in_database(key, version) if tail else None
        if tail is None:
            found = self._first_in_database(key, version)
        if found is not None:
            return found
        return next((row.event.lsn for row in rows if row.event.version >= version), None)

    def _first_in_database(self, key: Key, version: int) -> int | None:
        with self._database.reading() as now:
            session = now.row(self._sql["session"], of(key))
            [first] = now.column(self._sql["first_lsn"], of(key))
            if session is None or first is None:
                return None
            low, high = first, session["last_lsn"] + 1
            while low < high:
                middle = (low + high) // 2
                versions = now.column(self._sql["version_at"], of(key, k_lsn=middle))
                if not versions:
                    raise Damaged(f"event {middle} of session {key.session!r} is missing")
                low, high = (low, middle) if versions[0] >= version else (middle + 1, high)
            return low if low <= session["last_lsn"] else None

    # --- sessions ---

    def sessions(self) -> list[SessionRow]:
        with self._tails.lock:
            with self._database.reading() as now:
                rows = now.rows(self._sql["sessions"])
            return [self._session_row(row) for row in rows]

    def session(self, key: Key) -> SessionRow | None:
        with self._tails.lock:
            with self._database.reading() as now:
                row = now.row(self._sql["session"], of(key))
            return None if row is None else self._session_row(row)

    def _session_row(self, row: Row) -> SessionRow:
        key = Key(row["tenant"], row["session"])
        about, moved = row["about"], row
        if (tail := self._tails.get(key)) is not None:
            last = tail.last
            about = about if tail.about is None else tail.about
            moved = row | {
                "last_lsn": last.lsn,
                "version": last.version,
                "updates": last.updates,
                "changed": last.time,
            }
        return SessionRow(
            key=key,
            last_lsn=moved["last_lsn"],
            version=moved["version"],
            updates=moved["updates"],
            created=row["created"],
            changed=moved["changed"],
            about=self._about(about),
            durability=row["durability"],
            suspect=bool(row["suspect"]),
            create_key=row["create_key"],
            create_digest=bytes(row["create_digest"]),
        )

    @staticmethod
    def _about(text: str) -> dict[str, Any]:
        """One that cannot be read leaves a gap in a list, and no more."""
        with suppress(ValueError):
            value = json.loads(text)
            return value if isinstance(value, dict) else {}
        return {}

    def spent_keys(self) -> list[SpentKey]:
        with self._database.reading() as now:
            return [
                SpentKey(
                    key=Key(row["tenant"], row["session"]),
                    idempotency_key=row["idempotency_key"],
                    digest=bytes(row["digest"]),
                    created=row["created"],
                )
                for row in now.rows(self._sql["spent_keys"])
            ]

    # --- snapshots ---

    def snapshots(self, key: Key) -> list[Row]:
        with self._database.reading() as now:
            return now.rows(self._sql["snapshots"], of(key))

    def snapshot(self, key: Key, lsn: int) -> Payload | None:
        # Once more where the file is gone: another frame may have taken the place of the first.
        for _ in range(2):
            with self._database.reading() as now:
                row = now.row(self._sql["snapshot_at"], of(key, k_lsn=lsn))
                if row is None:
                    return None
                payload = self._placing.find(now, key, row, FRAME)
            if not isinstance(payload, LostPayload):
                break
        return payload
