"""Every kind of store, as the tests open it, and what they fill it with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optserve.store import Event, Key, Store
from optserve.store.base import KEPT_ROWS, Durability, Outcome, Soon
from optserve.store.opening import open_store
from optserve_client.errors import OutOfSpace, Unavailable
from tests.postgres import shared_cluster

#: ``postgresql`` has its large payloads in files, ``postgresql-alone`` in the database.
BACKENDS = ["memory", "sqlite", "postgresql", "postgresql-alone"]
DURABLE = BACKENDS[1:]


@dataclass(frozen=True)
class Backend:
    """A place that stores are opened on, one after the other."""

    name: str
    url: str | None
    data_dir: Path
    files: Path | None

    def open(self, *, kept_rows: int = KEPT_ROWS) -> Store:
        return open_store(
            url=self.url, data_dir=self.data_dir, files=self.files, kept_rows=kept_rows
        )


@contextmanager
def make_backend(name: str, path: Path) -> Iterator[Backend]:
    """Yield an empty one; skips the test where PostgreSQL is missing."""
    if not name.startswith("postgresql"):
        yield Backend(name, "memory" if name == "memory" else None, path, None)
        return
    cluster = shared_cluster()
    with cluster.database() as database:
        files = path if name == "postgresql" else None
        yield Backend(name, cluster.url(database), path, files)


def event(key: Key, lsn: int, kind: str | None = None, **fields: Any) -> Event:
    """Return an event: ``create`` at lsn 1, else ``step``; its version is lsn - 1."""
    kind = kind or ("create" if lsn == 1 else "step")
    values: dict[str, Any] = {"version": lsn - 1, "updates": lsn - 1, "time": 1e9 + lsn}
    return Event(key=key, lsn=lsn, kind=kind, **(values | fields))


def payload(
    store: Store, data: bytes, hint: int | None = None, durability: Durability = "always"
) -> Any:
    writer = store.writer(hint, durability)
    writer.write(data)
    return writer.seal()


def commit(store: Store, *events: Event) -> None:
    """Append events of which none may be refused."""
    for outcome in store.append(events):
        assert outcome.error is None, outcome.error


def filled(
    store: Store, key: Key, upto: int, *, size: int = 10, durability: Durability = "always"
) -> None:
    """Commit the first events of a session; each payload is its lsn's byte."""
    for lsn in range(1, upto + 1):
        data = payload(store, bytes([lsn % 256]) * size, size, durability)
        commit(store, event(key, lsn, payload=data, durability=durability))


def snapshot(store: Store, key: Key, lsn: int, data: bytes = b"s", pin: str | None = None) -> None:
    store.snapshot(key, lsn, payload(store, data), pin)


def lsns(store: Store, key: Key, **where: Any) -> list[int]:
    return [e.lsn for e in store.events(key, **where)]


def kept(store: Store, key: Key) -> list[int]:
    return [row.lsn for row in store.snapshots(key)]


class Faulty:
    """A store that fails where it is told to: Unavailable with the event committed (``lost``) or
    not (``refused``), or OutOfSpace (``full``)."""

    def __init__(self, store: Store) -> None:
        self._store = store
        #: Kind of event and fault; each happens once, in this order.
        self.faults: list[tuple[str, str]] = []
        #: How many have happened.
        self.met = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def append(self, events: Sequence[Event]) -> list[Outcome]:
        return [self._one(event) for event in events]

    def submit(self, events: Sequence[Event], soon: Soon | None = None) -> Future[list[Outcome]]:
        future: Future[list[Outcome]] = Future()
        future.set_result(self.append(events))
        return future

    def _one(self, event: Event) -> Outcome:
        fault = None
        if self.faults and self.faults[0][0] == event.kind:
            _, fault = self.faults.pop(0)
            self.met += 1
        if fault in (None, "lost"):
            [outcome] = self._store.append([event])
            if fault is None or outcome.error is not None:
                return outcome
        error = OutOfSpace("no room") if fault == "full" else Unavailable("the medium failed")
        return Outcome(key=event.key, lsn=event.lsn, error=error)
