"""From a URL and two folders to a store, or to one sentence that says why not."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa

from optserve.store.base import KEPT_ROWS, Store
from optserve.store.database import Database, first_line
from optserve.store.disk import OsDisk
from optserve.store.files import PayloadFiles
from optserve.store.lock import DirectoryLock, Locked
from optserve.store.memory import MemoryStore
from optserve.store.migrations import CannotOpen, InUse, prepare
from optserve.store.sql import SqlStore
from optserve.store.sqlite import Sqlite
from optserve_client.errors import OptserveError

__all__ = ["CannotOpen", "InUse", "open_store"]

DATABASE_NAME = "optserve.db"
PAYLOADS_NAME = "payloads"
#: Beside the payload files: which database they belong to.
OWNER_NAME = "store-id"
_URLS = "expected memory, sqlite:///PATH or postgresql+psycopg://USER@HOST/NAME"


def open_store(
    *, url: str | None, data_dir: Path, files: Path | None, kept_rows: int = KEPT_ROWS
) -> Store:
    """Open the store that ``url`` names, and keep everybody else from it.

    None is SQLite in ``<data_dir>/optserve.db``. Large payloads lie in files below ``files``; None
    is ``data_dir`` for SQLite, and for PostgreSQL the database itself. Raises CannotOpen.
    """
    if url == "memory":
        return MemoryStore(kept_rows=kept_rows)
    try:
        parsed = sa.make_url(url) if url is not None else None
    except sa.exc.ArgumentError as exc:
        raise CannotOpen(f"store must be a URL, got {url!r}: {_URLS}") from exc
    if parsed is None or parsed.drivername in ("sqlite", "sqlite+pysqlite"):
        return _open_sqlite(parsed, data_dir, files or data_dir, kept_rows)
    if parsed.drivername in ("postgresql", "postgresql+psycopg"):
        return _open_postgresql(parsed.set(drivername="postgresql+psycopg"), files, kept_rows)
    raise CannotOpen(f"store {parsed.drivername!r} is not known: {_URLS}")


class _Locked(SqlStore):
    """A store that gives its directories back when it is closed."""

    locks: tuple[DirectoryLock, ...] = ()

    def close(self) -> None:
        super().close()
        for lock in self.locks:
            lock.release()


def _open_sqlite(url: sa.URL | None, data_dir: Path, files: Path, kept_rows: int) -> Store:
    if url is not None and not url.database:
        raise CannotOpen(f"store {str(url)!r} names no file: {_URLS}")
    path = Path(url.database) if url is not None and url.database else data_dir / DATABASE_NAME
    locks = _lock(data_dir, path.parent, files)
    try:
        return _open(Sqlite(path.absolute()), files, locks, kept_rows)
    except BaseException:
        for lock in locks:
            lock.release()
        raise


def _open_postgresql(url: sa.URL, files: Path | None, kept_rows: int) -> Store:
    try:
        from optserve.store.postgresql import Postgresql
    except ImportError as exc:
        raise CannotOpen("PostgreSQL needs a driver: pip install 'optserve[postgres]'") from exc
    locks = _lock(*([files] if files is not None else []))
    try:
        database = Postgresql(url, with_files=files is not None)
        return _open(database, files, locks, kept_rows)
    except BaseException:
        for lock in locks:
            lock.release()
        raise


def _lock(*directories: Path) -> tuple[DirectoryLock, ...]:
    locks: list[DirectoryLock] = []
    try:
        for directory in dict.fromkeys(path.absolute() for path in directories):
            locks.append(_lock_one(directory))
    except BaseException:
        for lock in locks:
            lock.release()
        raise
    return tuple(locks)


def _lock_one(directory: Path) -> DirectoryLock:
    try:
        OsDisk().make_directory(directory)
        return DirectoryLock(directory)
    except Locked as exc:
        who = "another server" if exc.pid is None else f"the server with pid {exc.pid}"
        raise InUse(
            f"data directory {directory} is used by {who}: stop it, or name another directory"
        ) from exc
    except OSError as exc:
        raise CannotOpen(
            f"data directory {directory} cannot be written: {exc.strerror}; "
            "name another one with --data-dir"
        ) from exc


def _claim(files: Path, database: Database) -> None:
    """See to it that the payload files in ``files`` are those of this database.

    The others would have no row here, and be swept. Raises CannotOpen.
    """
    with database.reading() as now:
        [ours] = now.column(database.sql["store_id"])
    path = files / OWNER_NAME
    try:
        theirs = path.read_text().strip()
    except FileNotFoundError:
        theirs = ""
    if theirs and theirs != ours:
        raise CannotOpen(
            f"the payload files in {files} belong to another database (store {theirs}) than "
            f"{database.where} (store {ours}): name that one, or another directory for the files"
        )
    if not theirs:
        path.write_text(f"{ours}\n")
        OsDisk().sync_directory(files)


def _open(
    database: Database, files: Path | None, locks: tuple[DirectoryLock, ...], kept_rows: int
) -> Store:
    payloads = None
    try:
        if files is not None:
            prepare(database)
            _claim(files, database)
        payloads = PayloadFiles(files / PAYLOADS_NAME) if files is not None else None
        store = _Locked(database, payloads, kept_rows=kept_rows)
    except BaseException as exc:
        if payloads is not None:
            payloads.close()
        database.close()
        if isinstance(exc, OptserveError):
            raise CannotOpen(exc.detail) from exc
        if isinstance(exc, (OSError, sa.exc.SQLAlchemyError, database.error)):
            raise CannotOpen(f"{database.where} cannot be opened: {first_line(exc)}") from exc
        raise
    store.locks = locks
    return store
