"""The tables of the SQL store, and its statements, compiled once for a database.

The statements of a write run on the driver's own connection: compiling and wrapping each of them
anew would cost more than half of what the database needs for a synced commit.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import sqlalchemy as sa
from sqlalchemy import bindparam as bind
from sqlalchemy.dialects import postgresql

from optserve.store.payloads import INLINE_BYTES

#: A larger payload without a file is cut into parts of this size.
PART_BYTES = 4 * 2**20
#: What this release reads and writes; see :mod:`optserve.store.migrations`.
FORMAT = 1
#: Who writes.
RELEASE = version("optserve")

metadata = sa.MetaData()

# PostgreSQL would compare by the rules of a language: slower, and another order than bytes have.
_Name = sa.Text().with_variant(postgresql.TEXT(collation="C"), "postgresql")


def _table(name: str, *columns: sa.Column[Any], extra: tuple[sa.Index, ...] = ()) -> sa.Table:
    """A table whose key starts with tenant and session, stored in the order of its key."""
    return sa.Table(
        name,
        metadata,
        sa.Column("tenant", _Name, primary_key=True),
        sa.Column("session", _Name, primary_key=True),
        *columns,
        *extra,
        sqlite_with_rowid=False,
    )


def _lsn() -> sa.Column[int]:
    return sa.Column("lsn", sa.BigInteger, primary_key=True, autoincrement=False)


#: One row. ``clean``: the last server closed the store. ``boot``: see ``Database.boot``.
#: ``store_id``: random; directories of payload files that belong to this database know it.
meta = sa.Table(
    "meta",
    metadata,
    sa.Column("format", sa.Integer, nullable=False),
    sa.Column("release", sa.Text, nullable=False),
    sa.Column("top_epoch", sa.BigInteger, nullable=False),
    sa.Column("boot", sa.Text, nullable=False),
    sa.Column("clean", sa.Integer, nullable=False),
    sa.Column("store_id", sa.Text, nullable=False),
)

sessions = _table(
    "sessions",
    #: Place in the order of creation.
    sa.Column("place", sa.BigInteger, nullable=False),
    sa.Column("owner_epoch", sa.BigInteger, nullable=False),
    sa.Column("last_lsn", sa.BigInteger, nullable=False),
    sa.Column("version", sa.BigInteger, nullable=False),
    sa.Column("updates", sa.BigInteger, nullable=False),
    sa.Column("created", sa.Double, nullable=False),
    sa.Column("changed", sa.Double, nullable=False),
    sa.Column("about", sa.Text, nullable=False),
    sa.Column("durability", sa.Text, nullable=False),
    #: Under which boot events were acknowledged that the medium need not have; null: none were.
    sa.Column("dirty", sa.Text),
    sa.Column("suspect", sa.Integer, nullable=False),
    #: Up to this lsn the events have lost their payloads.
    sa.Column("bare_lsn", sa.BigInteger, nullable=False),
    sa.Column("create_key", sa.Text),
    sa.Column("create_digest", sa.LargeBinary, nullable=False),
)

#: ``payload_file`` is null for a payload in ``parts``, and where ``payload_bytes`` is null: none.
events = _table(
    "events",
    _lsn(),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("version", sa.BigInteger, nullable=False),
    sa.Column("updates", sa.BigInteger, nullable=False),
    sa.Column("time", sa.Double, nullable=False),
    sa.Column("owner_epoch", sa.BigInteger, nullable=False),
    sa.Column("worker", sa.Text),
    sa.Column("epoch", sa.BigInteger),
    sa.Column("seq", sa.BigInteger),
    sa.Column("idempotency_key", sa.Text),
    sa.Column("digest", sa.LargeBinary, nullable=False),
    sa.Column("record", sa.Text, nullable=False),
    sa.Column("loss", sa.Double),
    sa.Column("grad_norm", sa.Double),
    sa.Column("payload_bytes", sa.BigInteger),
    sa.Column("payload_digest", sa.LargeBinary),
    sa.Column("payload_file", sa.Text),
)
_METRICS = events.c.kind == sa.literal_column("'metrics'")
sa.Index(
    "events_metrics",
    events.c.tenant,
    events.c.session,
    events.c.lsn,
    sqlite_where=_METRICS,
    postgresql_where=_METRICS,
)
_HAS_FILE = events.c.payload_file.is_not(None)
sa.Index("events_files", events.c.payload_file, sqlite_where=_HAS_FILE, postgresql_where=_HAS_FILE)

snapshots = _table(
    "snapshots",
    _lsn(),
    sa.Column("version", sa.BigInteger, nullable=False),
    sa.Column("time", sa.Double, nullable=False),
    sa.Column("pin", sa.Text),
    sa.Column("payload_bytes", sa.BigInteger, nullable=False),
    sa.Column("payload_digest", sa.LargeBinary, nullable=False),
    sa.Column("payload_file", sa.Text),
)

#: Idempotency-Keys of the ``create`` events of deleted sessions.
spent_keys = sa.Table(
    "spent_keys",
    metadata,
    sa.Column("tenant", _Name, primary_key=True),
    sa.Column("idempotency_key", _Name, primary_key=True),
    sa.Column("session", _Name, nullable=False),
    sa.Column("digest", sa.LargeBinary, nullable=False),
    sa.Column("created", sa.Double, nullable=False),
    sqlite_with_rowid=False,
)

#: Payloads of events (``frame`` 0) and frames of snapshots (1) that are not in files.
parts = _table(
    "parts",
    sa.Column("frame", sa.Integer, primary_key=True, autoincrement=False),
    _lsn(),
    sa.Column("part", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("data", sa.LargeBinary, nullable=False),
)


# Constants stand in the text, so that a text has no parameters but the named ones.
_NO: sa.ColumnElement[int]
_YES: sa.ColumnElement[int]
_NO, _YES, _NULL = sa.literal_column("0"), sa.literal_column("1"), sa.null()


def _of(table: sa.Table) -> sa.ColumnElement[bool]:
    """The rows of one session."""
    return sa.and_(table.c.tenant == bind("k_tenant"), table.c.session == bind("k_session"))


def _insert(table: sa.Table) -> sa.Insert:
    return sa.insert(table).values({c.name: bind(c.name) for c in table.columns})


_of_event = sa.and_(_of(parts), parts.c.frame == _NO)
_of_frame = sa.and_(_of(parts), parts.c.frame == _YES)
_moved: dict[str, Any] = {
    "last_lsn": bind("lsn"),
    "version": bind("version"),
    "updates": bind("updates"),
    "changed": bind("time"),
    "about": sa.func.coalesce(bind("about"), sessions.c.about),
    "durability": bind("durability"),
    "dirty": bind("dirty"),
}
_owned = sa.and_(_of(sessions), sessions.c.owner_epoch == bind("k_owner_epoch"))

#: Every statement of the write path; each takes its values by name.
STATEMENTS: dict[str, sa.ClauseElement] = {
    # Refusals are decided here, by the database: no row, no event.
    "advance": sa.update(sessions)
    .where(_owned, sessions.c.last_lsn == bind("k_last_lsn"), sessions.c.suspect == _NO)
    .values(_moved),
    "rewind": sa.update(sessions)
    .where(_owned, sessions.c.last_lsn >= bind("k_last_lsn"))
    .values({**_moved, "suspect": _NO, "bare_lsn": bind("bare_lsn")}),
    "create": sa.insert(sessions).from_select(
        [c.name for c in sessions.columns],
        sa.select(*[bind(c.name, type_=c.type).label(c.name) for c in sessions.columns]).where(
            ~sa.exists().where(_of(sessions))
        ),
    ),
    "session": sa.select(sessions).where(_of(sessions)),
    "sessions": sa.select(sessions).order_by(sessions.c.place),
    "claim_epoch": sa.update(meta).values(top_epoch=bind("top")),
    "claim_session": sa.update(sessions).where(_of(sessions)).values(owner_epoch=bind("top")),
    "raise_epoch": sa.update(meta)
    .where(meta.c.top_epoch < bind("top"))
    .values(top_epoch=bind("top")),
    "event": _insert(events),
    "part": _insert(parts),
    "read_part": sa.select(parts.c.data)
    .where(_of(parts), parts.c.frame == bind("k_frame"), parts.c.lsn == bind("k_lsn"))
    .where(parts.c.part == bind("k_part")),
    "snapshot": _insert(snapshots),
    "snapshots": sa.select(snapshots).where(_of(snapshots)).order_by(snapshots.c.lsn),
    "snapshot_at": sa.select(snapshots).where(_of(snapshots), snapshots.c.lsn == bind("k_lsn")),
    "drop_snapshot": sa.delete(snapshots).where(_of(snapshots), snapshots.c.lsn == bind("k_lsn")),
    "drop_frame": sa.delete(parts).where(_of_frame, parts.c.lsn == bind("k_lsn")),
    "unpin": sa.update(snapshots)
    .where(_of(snapshots), snapshots.c.lsn == bind("k_lsn"), snapshots.c.pin.is_not(None))
    .values(pin=_NULL),
    # Before the first event that only this process keeps.
    "mark": sa.update(sessions)
    .where(_owned, sessions.c.last_lsn == bind("k_last_lsn"), sessions.c.suspect == _NO)
    .values(dirty=bind("dirty"), durability=bind("durability")),
    "clear_dirty": sa.update(sessions).where(_of(sessions)).values(dirty=_NULL),
    "set_bare": sa.update(sessions).where(_of(sessions)).values(bare_lsn=bind("bare_lsn")),
    "moved_to": sa.update(sessions)
    .where(_of(sessions))
    .values({k: v for k, v in _moved.items() if k != "dirty"}),
    "event_files": sa.select(events.c.payload_file).where(
        _of(events), events.c.lsn.between(bind("k_from"), bind("k_upto")), _HAS_FILE
    ),
    "files": sa.select(
        events.c.payload_file, events.c.payload_bytes, events.c.payload_digest
    ).where(_of(events), _HAS_FILE),
    "frame_files": sa.select(snapshots.c.payload_file).where(
        _of(snapshots), snapshots.c.lsn >= bind("k_from"), snapshots.c.payload_file.is_not(None)
    ),
    "bare_events": sa.update(events)
    .where(_of(events), events.c.lsn.between(bind("k_from"), bind("k_upto")), _HAS_FILE)
    .values(payload_file=_NULL),
    "bare_parts": sa.delete(parts).where(
        _of_event, parts.c.lsn.between(bind("k_from"), bind("k_upto"))
    ),
    "drop_events_upto": sa.delete(events).where(_of(events), events.c.lsn <= bind("k_upto")),
    "drop_events_from": sa.delete(events).where(_of(events), events.c.lsn >= bind("k_from")),
    "drop_parts_from": sa.delete(parts).where(_of(parts), parts.c.lsn >= bind("k_from")),
    "drop_snapshots_from": sa.delete(snapshots).where(
        _of(snapshots), snapshots.c.lsn >= bind("k_from")
    ),
    "spend_key": sa.insert(spent_keys).from_select(
        ["tenant", "idempotency_key", "session", "digest", "created"],
        sa.select(
            sessions.c.tenant,
            sessions.c.create_key,
            sessions.c.session,
            sessions.c.create_digest,
            sessions.c.created,
        ).where(_of(sessions), sessions.c.create_key.is_not(None)),
    ),
    "unspend_key": sa.delete(spent_keys).where(
        spent_keys.c.tenant == bind("k_tenant"),
        spent_keys.c.idempotency_key.in_(sa.select(sessions.c.create_key).where(_of(sessions))),
    ),
    "spent_keys": sa.select(spent_keys).order_by(spent_keys.c.created),
    "forget_keys": sa.delete(spent_keys).where(spent_keys.c.created < bind("k_before")),
    "drop_session": sa.delete(sessions).where(_of(sessions)),
    "first_lsn": sa.select(sa.func.min(events.c.lsn)).where(_of(events)),
    "version_at": sa.select(events.c.version).where(_of(events), events.c.lsn == bind("k_lsn")),
    "file_known": sa.select(_YES).where(events.c.payload_file == bind("k_file")),
    "frame_known": sa.select(_YES).where(snapshots.c.payload_file == bind("k_file")),
    "all_files": sa.union_all(
        sa.select(events.c.payload_file).where(_HAS_FILE),
        sa.select(snapshots.c.payload_file).where(snapshots.c.payload_file.is_not(None)),
    ),
    # At open.
    "suspect": sa.update(sessions)
    .where(
        sessions.c.dirty.is_not(None),
        sa.or_(
            sessions.c.durability == sa.literal_column("'memory'"),
            sessions.c.dirty != bind("k_boot"),
        ),
    )
    .values(suspect=_YES),
    "doubt": sa.update(sessions).where(_of(sessions)).values(suspect=_YES),
    # After a crash of the database, not of the server: that still has what it has alone.
    "suspect_os": sa.update(sessions)
    .where(
        sessions.c.dirty != bind("k_boot"),
        sessions.c.durability != sa.literal_column("'memory'"),
    )
    .values(suspect=_YES),
    # At close.
    "all_clean": sa.update(sessions)
    .where(
        sessions.c.durability != sa.literal_column("'memory'"),
        sessions.c.dirty == bind("k_boot"),
        sessions.c.suspect == _NO,
    )
    .values(dirty=_NULL),
    "dirty": sa.select(sessions.c.tenant, sessions.c.session).where(
        sessions.c.dirty.is_not(None), sessions.c.suspect == _NO
    ),
    "last_place": sa.select(sa.func.max(sessions.c.place)),
    "meta": sa.select(meta),
    "store_id": sa.select(meta.c.store_id),
    "meta_row": _insert(meta),
    "opened": sa.update(meta).values(
        boot=bind("boot"), release=bind("release"), clean=bind("clean")
    ),
}

#: The payload of an event, read in the same go as its row if it is small.
_first_part = sa.and_(
    parts.c.tenant == events.c.tenant,
    parts.c.session == events.c.session,
    parts.c.frame == _NO,
    parts.c.lsn == events.c.lsn,
    parts.c.part == _NO,
    events.c.payload_bytes <= sa.literal_column(str(INLINE_BYTES)),
)


def page(kinds: int | None, payloads: bool) -> sa.Select[Any]:
    """Rows of a session after ``k_after`` up to ``k_upto``, of ``kinds`` kinds; None: of all."""
    columns: list[Any] = list(events.columns)
    source: sa.FromClause = events
    if payloads:
        columns.append(parts.c.data)
        source = events.outerjoin(parts, _first_part)
    found = (
        sa.select(*columns)
        .select_from(source)
        .where(_of(events), events.c.lsn > bind("k_after"), events.c.lsn <= bind("k_upto"))
        .order_by(events.c.lsn)
        .limit(bind("k_limit", type_=sa.Integer))
        .offset(_NO)  # SQLite would get a parameter without a name of ours
    )
    if kinds is not None:
        found = found.where(events.c.kind.in_([bind(f"k_kind{i}") for i in range(kinds)]))
    return found


class Sql:
    """The statements as text for one database: ``sql["advance"]``."""

    def __init__(self, dialect: sa.Dialect) -> None:
        self._dialect = dialect
        self._texts = {name: self._compile(clause) for name, clause in STATEMENTS.items()}
        self._pages: dict[tuple[int | None, bool], str] = {}

    def _compile(self, clause: sa.ClauseElement) -> str:
        return str(clause.compile(dialect=self._dialect))

    def __getitem__(self, name: str) -> str:
        return self._texts[name]

    def page(self, kinds: int | None, payloads: bool) -> str:
        shape = (kinds, payloads)
        if shape not in self._pages:
            self._pages[shape] = self._compile(page(*shape))
        return self._pages[shape]
