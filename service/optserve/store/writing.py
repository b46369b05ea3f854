"""What happens to the tables, inside of a transaction that somebody else began."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from optserve.store.base import KEPT_SNAPSHOTS, Event, Key, refusal
from optserve.store.database import Connection, Database, Row
from optserve.store.frozen import Frozen
from optserve.store.placing import EVENT, FRAME, LostPayload, Placed, Placing
from optserve.store.tail import Tail, Tails
from optserve_client.errors import (
    Damaged,
    Internal,
    OptserveError,
    SessionNotFound,
    Unavailable,
)


@dataclass(slots=True)
class After:
    """What is due once the transaction has committed, and not before."""

    files: list[str] = field(default_factory=list)
    calls: list[Callable[[], None]] = field(default_factory=list)
    #: Something large was dropped.
    untidy: bool = False

    def add(self, other: After) -> None:
        self.files += other.files
        self.calls += other.calls
        self.untidy |= other.untidy


def of(key: Key, **values: object) -> Row:
    """Values that select the rows of a session."""
    return {"k_tenant": key.tenant, "k_session": key.session, **values}


class Writing:
    """The changes that a store can make; one thread at a time."""

    def __init__(
        self, database: Database, placing: Placing, tails: Tails, boot: str, kept_rows: int
    ) -> None:
        self._sql = database.sql
        self._placing = placing
        self._tails = tails
        #: Of what is committed without a sync; see ``Database.boot``.
        self.boot = boot
        self._kept_rows = kept_rows
        #: Sessions with acknowledged ``os`` events that the medium need not have yet.
        self.dirty: set[Key] = set()
        #: Those of them of which the database may not know it.
        self.untold: set[Key] = set()
        self.top_epoch = 0
        self.last_place = 0

    # --- events ---

    def append(
        self, tx: Connection, row: Frozen, placed: Placed | None, durability: str, after: After
    ) -> OptserveError | None:
        """Commit one event with ``tx``; or return why it is refused, and change nothing."""
        event = row.event
        values = row.values() | (placed.columns() if placed else {})
        if event.kind == "create":
            error = self._create(tx, row, values, durability, after)
        elif event.kind == "rewind":
            error = self._rewind(tx, row, durability, after)
        else:
            error = self._advance(tx, row, durability, after)
        if error is None:
            self._insert(tx, values, placed)
        return error

    def _insert(self, tx: Connection, values: Row, placed: Placed | None) -> None:
        tx.run(self._sql["event"], values)
        if placed is not None and placed.file is None:
            self._placing.put_parts(tx, values, EVENT, placed.payload)

    def _create(
        self, tx: Connection, row: Frozen, values: Row, durability: str, after: After
    ) -> OptserveError | None:
        event = row.event
        if error := refusal(event, None, 0):
            return error if not self._exists(tx, event.key) else refusal(event, 1, 0)
        self.last_place += 1
        session = values | {
            "place": self.last_place,
            "last_lsn": 1,
            "created": event.time,
            "changed": event.time,
            "about": row.about or "{}",
            "durability": durability,
            "dirty": None,
            "suspect": 0,
            "bare_lsn": 0,
            "create_key": event.idempotency_key,
            "create_digest": event.digest,
        }
        if tx.run(self._sql["create"], session | of(event.key)) != 1:
            return refusal(event, 1, 0)
        self._raise_epoch(tx, event.owner_epoch, after)
        return None

    def _exists(self, tx: Connection, key: Key) -> bool:
        return self.session(tx, key) is not None

    def session(self, tx: Connection, key: Key) -> Row | None:
        return tx.row(self._sql["session"], of(key))

    def _raise_epoch(self, tx: Connection, epoch: int, after: After) -> None:
        if epoch > self.top_epoch:
            tx.run(self._sql["raise_epoch"], {"top": epoch})
            after.calls.append(lambda: self._epoch_is(epoch))

    def _epoch_is(self, epoch: int) -> None:
        self.top_epoch = max(self.top_epoch, epoch)

    def _moved(self, row: Frozen, durability: str, dirty: str | None) -> Row:
        event = row.event
        return of(
            event.key,
            k_owner_epoch=event.owner_epoch,
            k_last_lsn=event.lsn - 1,
            lsn=event.lsn,
            version=event.version,
            updates=event.updates,
            time=event.time,
            about=row.about,
            durability=durability,
            dirty=dirty,
        )

    def _advance(
        self, tx: Connection, row: Frozen, durability: str, after: After
    ) -> OptserveError | None:
        key = row.event.key
        if (tail := self._tails.get(key)) is not None:
            error = refusal(row.event, tail.last_lsn, tail.owner_epoch)
            return error or Internal(
                f"event {row.event.lsn} of session {key.session!r} has durability {durability!r}: "
                f"the events since {tail.base}, whose durability is 'memory', need a snapshot first"
            )
        dirty = self._dirty_with(tx, key, durability, after)
        if durability == "always" and dirty is not None:
            return Unavailable(
                f"event {row.event.lsn} of session {key.session!r} has durability 'always': "
                "payloads of 'os' events before it cannot be synced"
            )
        if tx.run(self._sql["advance"], self._moved(row, durability, dirty)) != 1:
            return self._why_not(tx, row.event)
        return None

    def _dirty_with(self, tx: Connection, key: Key, durability: str, after: After) -> str | None:
        """What the session is once an event of this durability has committed."""
        if durability == "os":
            after.calls.append(lambda: self._told(key))
            return self.boot
        return self._clean(tx, key, after)

    def _told(self, key: Key) -> None:
        self.dirty.add(key)
        self.untold.discard(key)

    def _clean(self, tx: Connection, key: Key, after: After) -> str | None:
        """Make what came before as durable as the commit that follows, if that is possible."""
        if key not in self.dirty:
            return None
        if self._placing.files is not None:
            everything = of(key, k_from=0, k_upto=2**62)
            try:
                self._placing.files.flush(tx.column(self._sql["event_files"], everything))
            except OptserveError:
                return self.boot
        after.calls.append(lambda: self.dirty.discard(key))
        return None

    def _why_not(self, tx: Connection, event: Event) -> OptserveError:
        row = self.session(tx, event.key)
        if row is None:
            error = refusal(event, None, 0)
        else:
            error = refusal(event, row["last_lsn"], row["owner_epoch"], bool(row["suspect"]))
        return error or Internal(f"event {event.lsn} of session {event.key.session!r} was refused")

    def mark(
        self, tx: Connection, row: Frozen, durability: str, after: After
    ) -> OptserveError | None:
        """Note that from now on this process alone has events; ``row`` is the first of them."""
        event = row.event
        moved = self._moved(row, durability, self.boot)
        if tx.run(self._sql["mark"], moved) != 1:
            return self._why_not(tx, event)
        after.calls.append(lambda: self._start_tail(row))
        return None

    def _start_tail(self, row: Frozen) -> None:
        event = row.event
        self.dirty.discard(event.key)
        self._tails.start(event.key, event.lsn - 1, event.owner_epoch).append(row)

    def _rewind(
        self, tx: Connection, row: Frozen, durability: str, after: After
    ) -> OptserveError | None:
        event, key = row.event, row.event.key
        session, tail = self.session(tx, key), self._tails.get(key)
        if session is None:
            return refusal(event, None, 0)
        last = tail.last_lsn if tail else session["last_lsn"]
        if error := refusal(event, last, session["owner_epoch"], bool(session["suspect"])):
            return error
        if tail is not None:
            self._write_tail(tx, tail, event.lsn - 1, after, payloads=True)
            after.calls.append(lambda: self._tails.drop(key))
        rows_from = of(key, k_from=event.lsn, k_upto=session["last_lsn"])
        after.files += tx.column(self._sql["event_files"], rows_from)
        after.files += tx.column(self._sql["frame_files"], rows_from)
        for name in ("drop_events_from", "drop_parts_from", "drop_snapshots_from"):
            tx.run(self._sql[name], rows_from)
        moved = self._moved(row, durability, self._clean(tx, key, after))
        bare = min(session["bare_lsn"], event.lsn - 1)
        if tx.run(self._sql["rewind"], moved | {"bare_lsn": bare}) != 1:
            return self._why_not(tx, event)
        return None

    def _write_tail(
        self, tx: Connection, tail: Tail, upto: int, after: After, *, payloads: bool
    ) -> None:
        """Write the rows of a tail up to an lsn into the tables."""
        rows = tail.upto(upto)
        for row in rows:
            placed, payload = None, row.event.payload
            if payloads and payload is not None:
                placed = self._placing.place(payload)
                if self._placing.files is not None and placed.file is not None:
                    self._placing.files.settle(placed.file)
            self._insert(tx, row.values() | (placed.columns() if placed else {}), placed)
        if rows:
            about = next((row.about for row in reversed(rows) if row.about is not None), None)
            moved = self._moved(rows[-1], "memory", None) | {"about": about}
            tx.run(self._sql["moved_to"], moved)

    def reconcile(self, tx: Connection, key: Key) -> None:
        """Bring the tail of a session in line with the tables, whatever became of a commit."""
        tail, session = self._tails.get(key), self.session(tx, key)
        if tail is None:
            return
        # Only a commit that left nothing to this process alone takes the mark away.
        if session is None or session["dirty"] is None:
            self._tails.drop(key)
            return
        tail.owner_epoch = session["owner_epoch"]
        self._shorten(key, tail, session["last_lsn"])

    # --- owners ---

    def claim(self, tx: Connection, key: Key, after: After) -> int:
        top = self.top_epoch + 1
        tx.run(self._sql["claim_epoch"], {"top": top})
        tx.run(self._sql["claim_session"], of(key, top=top))
        if (tail := self._tails.get(key)) is not None:
            after.calls.append(lambda: setattr(tail, "owner_epoch", top))
        after.calls.append(lambda: self._epoch_is(top))
        return top

    # --- snapshots ---

    def snapshot(
        self, tx: Connection, key: Key, lsn: int, placed: Placed, pin: str | None, after: After
    ) -> None:
        if (session := self.session(tx, key)) is None:
            raise SessionNotFound(f"no session {key.session!r}")
        tail = self._tails.get(key)
        last = tail.last_lsn if tail else session["last_lsn"]
        if not 1 <= lsn <= last:
            raise ValueError(f"snapshot lsn must be in [1, {last}], got {lsn}")
        if tail is not None:
            self._write_tail(tx, tail, lsn, after, payloads=False)
            after.calls.append(lambda: self._shorten(key, tail, lsn))
        self._keep(tx, key, lsn, placed, pin, after)
        self._trim(tx, key, session["bare_lsn"], last, after)
        if lsn == last and (session["dirty"] is not None) and self._clean(tx, key, after) is None:
            tx.run(self._sql["clear_dirty"], of(key))

    def _shorten(self, key: Key, tail: Tail, lsn: int) -> None:
        tail.written(lsn)
        if not tail.rows:
            self._tails.drop(key)

    def _keep(
        self, tx: Connection, key: Key, lsn: int, placed: Placed, pin: str | None, after: After
    ) -> None:
        if not (versions := tx.column(self._sql["version_at"], of(key, k_lsn=lsn))):
            raise ValueError(f"snapshot lsn must be of a kept event, got {lsn}")
        if old := tx.row(self._sql["snapshot_at"], of(key, k_lsn=lsn)):
            self._drop_snapshot(tx, key, old, after)
        values = placed.columns() | {
            "tenant": key.tenant,
            "session": key.session,
            "lsn": lsn,
            "version": versions[0],
            "time": time.time(),
            "pin": old["pin"] if pin is None and old else pin,
        }
        tx.run(self._sql["snapshot"], values)
        if placed.file is None:
            self._placing.put_parts(tx, values, FRAME, placed.payload)
            found = self._placing.find(tx, key, values, FRAME)
            if isinstance(found, LostPayload):
                raise Damaged(f"the frame does not read back: {found.why}")

    def _drop_snapshot(self, tx: Connection, key: Key, row: Row, after: After) -> None:
        tx.run(self._sql["drop_snapshot"], of(key, k_lsn=row["lsn"]))
        if row["payload_file"] is None:
            tx.run(self._sql["drop_frame"], of(key, k_lsn=row["lsn"]))
        else:
            after.files.append(row["payload_file"])

    def _trim(self, tx: Connection, key: Key, bare: int, last: int, after: After) -> None:
        """Drop what the newest two snapshots made superfluous."""
        kept = tx.rows(self._sql["snapshots"], of(key))
        if len(kept) < KEPT_SNAPSHOTS:
            return
        older = kept[-KEPT_SNAPSHOTS]["lsn"]
        for row in kept[:-KEPT_SNAPSHOTS]:
            if row["pin"] is None:
                self._drop_snapshot(tx, key, row, after)
        if older > bare:
            dropped = of(key, k_from=bare + 1, k_upto=older)
            after.files += tx.column(self._sql["event_files"], dropped)
            tx.run(self._sql["bare_events"], dropped)
            tx.run(self._sql["bare_parts"], dropped)
            tx.run(self._sql["set_bare"], of(key, bare_lsn=older))
            after.untidy = True
        surplus = min(older, last - self._kept_rows)
        if surplus > 0:
            tx.run(self._sql["drop_events_upto"], of(key, k_upto=surplus))

    def unpin(self, tx: Connection, key: Key, lsn: int, after: After) -> bool:
        if tx.run(self._sql["unpin"], of(key, k_lsn=lsn)) != 1:
            return False
        session = self.session(tx, key)
        assert session is not None
        self._trim(tx, key, session["bare_lsn"], session["last_lsn"], after)
        return True

    # --- end ---

    def delete(self, tx: Connection, key: Key, after: After) -> bool:
        everything = of(key, k_from=0, k_upto=2**62)
        after.files += tx.column(self._sql["event_files"], everything)
        after.files += tx.column(self._sql["frame_files"], everything)
        for name in ("drop_events_from", "drop_parts_from", "drop_snapshots_from"):
            tx.run(self._sql[name], everything)
        tx.run(self._sql["unspend_key"], of(key))  # of an earlier session with the same key
        tx.run(self._sql["spend_key"], of(key))
        after.untidy = True
        after.calls.append(lambda: self._tails.drop(key))
        after.calls.append(lambda: self.dirty.discard(key))
        return tx.run(self._sql["drop_session"], of(key)) == 1
