"""What the two databases have in common: one connection that writes, a pool of those that read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.pool import PoolProxiedConnection

from optserve.store.schema import Sql
from optserve_client.errors import Damaged, Internal, OptserveError, OutOfSpace, Unavailable

Row = dict[str, Any]
#: What an error of the driver means: no space; the file is damaged; the values cannot be stored;
#: somebody else has the lock; or anything else, after which the connection is not to be trusted.
Fault = Literal["full", "damaged", "value", "busy", "broken"]


class Connection:
    """A connection of the driver, whose statements take their values by name."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def run(self, text: str, values: Mapping[str, Any] | None = None) -> int:
        """Return how many rows the statement touched."""
        return int(self.driver.execute(text, values or {}).rowcount)

    def rows(self, text: str, values: Mapping[str, Any] | None = None) -> list[Row]:
        cursor = self.driver.execute(text, values or {})
        names = [column[0] for column in cursor.description]
        return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]

    def row(self, text: str, values: Mapping[str, Any] | None = None) -> Row | None:
        return next(iter(self.rows(text, values)), None)

    def column(self, text: str, values: Mapping[str, Any] | None = None) -> list[Any]:
        return [row[0] for row in self.driver.execute(text, values or {}).fetchall()]


class Database(ABC):
    """One database; :meth:`transaction` is for one thread at a time, :meth:`reading` for any."""

    #: ``sqlite`` or ``postgresql``.
    name: str
    #: What follows BEGIN where a transaction only reads; it sees one state all along.
    read_mode: str
    #: The driver's base error.
    error: type[Exception]

    def __init__(self, engine: sa.Engine, where: str) -> None:
        self.engine = engine
        #: How messages call it.
        self.where = where
        self.sql = Sql(engine.dialect)
        self._writer: Connection | None = None
        #: Called when the connection that writes is there again after an error, before any use.
        self.reopened: Callable[[], None] | None = None

    # --- what differs ---

    @abstractmethod
    def connect(self) -> Connection:
        """Return a connection that writes, once all that was committed before is durable."""

    @abstractmethod
    def begin(self, writer: Connection, sync: bool) -> None:
        """Begin a transaction whose commit returns when it is durable, if ``sync``."""

    @abstractmethod
    def fault(self, exc: BaseException) -> Fault:
        """Say what kind of error this is."""

    @abstractmethod
    def boot(self) -> str:
        """Name the time since when nothing but a synced commit can have been lost."""

    @abstractmethod
    def settle(self) -> None:
        """Make what was committed without a sync durable."""

    @abstractmethod
    def tidy(self) -> None:
        """Give room back to the disk, after much was dropped."""

    @abstractmethod
    def integrity(self) -> Iterator[str]:
        """Yield a sentence for each fault that the database finds in itself."""

    #: Whether :meth:`catch_up` is due.
    behind = False

    @property
    def at_hand(self) -> bool:
        """Whether a commit without a sync takes no longer than a few system calls, as a rule."""
        return False

    def due(self) -> bool:
        """Find out, right after a commit, whether :meth:`catch_up` is due; does not raise."""
        return False

    def catch_up(self) -> None:
        """Do what is due now and then, and waits for the disk; does not raise."""
        self.behind = False

    # --- writing ---

    @property
    def writer(self) -> Connection:
        """The connection that writes; opens it again after it broke. Raises Unavailable."""
        if self._writer is None:
            try:
                self._writer = self.connect()
            except self.error as exc:
                if self.fault(exc) == "damaged":
                    raise self.translated(exc) from exc
                raise Unavailable(f"{self.where} cannot be opened: {first_line(exc)}") from exc
            except (OSError, sa.exc.SQLAlchemyError) as exc:
                raise Unavailable(f"{self.where} cannot be opened: {first_line(exc)}") from exc
            self._tell()
        return self._writer

    def _tell(self) -> None:
        try:
            if self.reopened is not None:
                self.reopened()
        except BaseException:
            self.drop_writer()
            raise

    @contextmanager
    def transaction(self, sync: bool = True, hurried: bool = False) -> Iterator[Connection]:
        """Commit what the block does, or nothing of it; ``hurried``: do nothing else meanwhile.

        Raises OutOfSpace, Damaged and Internal, after which nothing is committed, and Unavailable,
        after which it may be. Only then the connection is opened anew.
        """
        writer = self.writer
        try:
            self.begin(writer, sync)
            yield writer
            writer.driver.execute("COMMIT")
            self.behind = self.due()
            if self.behind and not hurried:
                self.catch_up()
        except (self.error, OverflowError, UnicodeError) as exc:
            fault = self.fault(exc)
            if fault == "broken":
                self.drop_writer()
            else:
                self._roll_back()
            raise self.translated(exc, fault) from exc
        except BaseException:
            self._roll_back()
            raise

    def _roll_back(self) -> None:
        if self._writer is None:
            return
        try:
            self._writer.driver.rollback()
        except self.error:
            self.drop_writer()

    def drop_writer(self) -> None:
        """Close the connection that writes."""
        writer, self._writer = self._writer, None
        if writer is not None:
            with suppress(self.error):  # it is gone either way
                writer.driver.close()

    def translated(self, exc: BaseException, fault: Fault | None = None) -> OptserveError:
        """Return the error of ours that stands for one of the driver's."""
        said = first_line(exc)
        match fault or self.fault(exc):
            case "full":
                return OutOfSpace(f"{self.where} has no more space: {said}")
            case "damaged":
                return Damaged(f"{self.where} is damaged: {said}; run optserve fsck")
            case "value":
                return Internal(f"{self.where} does not take a value: {said}")
        return Unavailable(f"{self.where} failed: {said}")

    # --- reading ---

    def reader(self) -> PoolProxiedConnection:
        """Take a connection out of the pool; its ``close`` puts it back."""
        try:
            return self.engine.raw_connection()
        except Exception as exc:
            raise Unavailable(f"{self.where} cannot be read: {first_line(exc)}") from exc

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """Read one state of the database in the block."""
        pooled = self.reader()
        try:
            connection = Connection(pooled.dbapi_connection)
            connection.driver.execute(f"BEGIN {self.read_mode}")
            yield connection
        except self.error as exc:
            pooled.invalidate()
            raise self.translated(exc) from exc
        finally:
            pooled.close()  # rolls back

    def close(self) -> None:
        self.drop_writer()
        self.engine.dispose()


def first_line(exc: BaseException) -> str:
    """The first line of what an error says: those of PostgreSQL have many."""
    cause = getattr(exc, "orig", None) or exc
    return (str(cause).strip() or type(cause).__name__).splitlines()[0]
