"""What is on disk, and how an older format becomes the one of this release."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence

import sqlalchemy as sa
from sqlalchemy.schema import CreateIndex, CreateTable

from optserve.store.database import Connection, Database, Row
from optserve.store.schema import FORMAT, RELEASE, meta, metadata


class CannotOpen(Exception):
    """A store cannot be opened; one sentence that says why, and what to do."""


class InUse(CannotOpen):
    """Another process has the store open."""


Migration = Callable[[Connection], None]

#: ``MIGRATIONS[n - 1]`` makes format ``n + 1`` of format ``n``, in the transaction that it is
#: given. Plain SQL, which does not change when the tables of today do.
MIGRATIONS: list[Migration] = []


def prepare(database: Database, migrations: Sequence[Migration] | None = None) -> None:
    """Make the tables in an empty database, bring older ones up to date. Raises CannotOpen."""
    steps = MIGRATIONS if migrations is None else migrations
    target = len(steps) + 1
    with database.transaction() as tx:
        found = found_format(database, tx)
        if found is None:
            _create(database, tx, target)
        elif found > target:
            raise CannotOpen(
                f"{database.where} has format {found}, and optserve {RELEASE} reads "
                f"formats up to {target}: use a newer release"
            )
        else:
            for step in steps[found - 1 :]:
                step(tx)
            if found < target:
                tx.run(str(sa.update(meta).values(format=sa.literal_column(str(target)))))


def found_format(database: Database, tx: Connection) -> int | None:
    """Return the format of the tables, or None where there are none."""
    names = set(sa.inspect(database.engine).get_table_names())
    ours = {table.name for table in metadata.sorted_tables}
    if "meta" in names:
        columns = {c["name"] for c in sa.inspect(database.engine).get_columns("meta")}
        rows = tx.column("SELECT format FROM meta") if "format" in columns else []
        if len(rows) == 1 and isinstance(rows[0], int):
            return rows[0]
    if names & ours:
        raise CannotOpen(
            f"{database.where} has tables {', '.join(sorted(names & ours))} that are not "
            "optserve's: name another database"
        )
    return None


def _create(database: Database, tx: Connection, target: int) -> None:
    dialect = database.engine.dialect
    for table in metadata.sorted_tables:
        tx.run(str(CreateTable(table).compile(dialect=dialect)))
        for index in sorted(table.indexes, key=lambda index: str(index.name)):
            tx.run(str(CreateIndex(index).compile(dialect=dialect)))
    first: Row = {"format": target, "release": RELEASE, "top_epoch": 0, "boot": "", "clean": 1}
    first["store_id"] = secrets.token_hex(8)
    tx.run(database.sql["meta_row"], first)


assert len(MIGRATIONS) + 1 == FORMAT
