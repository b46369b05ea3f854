"""Events into the database and the tails, as many in one transaction as can be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Literal

from optserve.store.base import Key
from optserve.store.database import Connection, Database
from optserve.store.frozen import Frozen
from optserve.store.jobs import Item, Job
from optserve.store.placing import Placing
from optserve.store.tail import Tails
from optserve.store.writing import After, Writing
from optserve_client.errors import Internal, OptserveError, Unavailable

#: How an event is committed: without a sync; with one; it is the first that only this process has,
#: which the database is told with a sync; in this process alone.
How = Literal["os", "synced", "mark", "tail"]


class Rounds:
    """The one place where events are written; used by one thread at a time."""

    def __init__(
        self, database: Database, placing: Placing, tails: Tails, writing: Writing
    ) -> None:
        self._database = database
        self._placing = placing
        self._tails = tails
        self._writing = writing
        #: Sessions with a tail that a commit with an open outcome may have changed.
        self.unsure: set[Key] = set()
        self._hurried = False

    def puts_off(self, job: Job) -> bool:
        """Say whether ``job`` is for somebody who may wait for a disk."""
        return any(
            item.error is not None
            or item.event.key in self.unsure
            or self._how(item, marked=False) != "os"
            for item in job.items
        )

    def write(self, jobs: Sequence[Job], hurried: bool) -> None:
        """Write and finish every event of ``jobs``; ``hurried``: nothing else meanwhile."""
        self._hurried = hurried
        todo = [item for job in jobs for item in job.items]
        try:
            for item in todo:
                self._know(item)
            while todo:
                todo = self._round(todo)
        except BaseException as exc:
            # A defect of ours must not leave anybody waiting.
            for job in jobs:
                for item in job.items:
                    if not item.done:
                        item.error = Internal(f"the store failed: {exc!r}")
                        item.finish()
            if not isinstance(exc, Exception):
                raise

    def _know(self, item: Item) -> None:
        """Find out what an open outcome has left of a tail, before it is written to."""
        if item.event.key in self.unsure:
            try:
                with self._tails.lock:
                    self.reconcile(item.event.key)
            except OptserveError as exc:
                item.error = exc

    def open_outcome(self, keys: Sequence[Key]) -> None:
        """A commit may have happened or not: believe neither."""
        self.unsure.update(key for key in keys if self._tails.get(key) is not None)
        self._writing.untold.update(keys)  # the next os event says it again, synced

    def reconcile(self, key: Key) -> None:
        with self._database.transaction() as tx:
            self._writing.reconcile(tx, key)
        self.unsure.discard(key)

    def _round(self, items: list[Item]) -> list[Item]:
        """Write ``items`` in up to three groups; return those that must wait for the next round.

        Those that need no sync go first, so that they do not wait for one.
        """
        groups: dict[str, list[Item]] = {"os": [], "synced": [], "tail": []}
        order = list(groups)
        reached: dict[Key, str] = {}
        marked: set[Key] = set()
        later: list[Item] = []
        for item in items:
            key = item.event.key
            before = reached.get(key, "os")
            how = self._how(item, key in marked)
            group = "synced" if how == "mark" or (how == "os" and before == "synced") else how
            # What is behind a mark comes into the tail, or has to know of it.
            beside = key in marked and group != "tail"
            if before == "later" or beside or order.index(group) < order.index(before):
                reached[key] = "later"
                later.append(item)
                continue
            if how == "mark":
                marked.add(key)
            # What comes behind the first unsynced event is to know of it, which takes its commit.
            first_os = group == "synced" and item.durability == "os"
            reached[key] = "later" if first_os else group
            groups[group].append(item)
        self._commit(groups["os"], sync=False)
        self._commit(groups["synced"], sync=True)
        return self._append_to_tails(groups["tail"]) + later

    def _how(self, item: Item, marked: bool) -> How:
        key = item.event.key
        if not item.database_has:
            return "tail" if marked or self._tails.get(key) else "mark"
        told = key in self._writing.dirty and key not in self._writing.untold
        if item.durability == "os" and told and item.event.kind != "rewind":
            return "os"
        return "synced"

    def _append_to_tails(self, items: list[Item]) -> list[Item]:
        """Append to the tails; return those whose session has none after all."""
        later = []
        with self._tails.lock:
            for item in items:
                if item.error is None and self._tails.get(item.event.key) is None:
                    later.append(item)
                else:
                    item.error = item.error or self.to_tail(item.event.key, item.row)
        for item in items:
            if item not in later:
                item.finish()  # without the lock: it may call others
        return later

    def to_tail(self, key: Key, row: Frozen | OptserveError | None) -> OptserveError | None:
        tail = self._tails.get(key)
        assert tail is not None
        assert row is not None
        return row if isinstance(row, OptserveError) else tail.append(row)

    @contextmanager
    def with_tail(self, keys: Sequence[Key]) -> Iterator[None]:
        """Let nobody see a tail without the database that belongs to it."""
        with self._tails.lock if any(map(self._tails.get, keys)) else nullcontext():
            yield

    def _commit(self, items: list[Item], *, sync: bool) -> None:
        """Commit ``items`` in one transaction; one that is refused takes no other down."""
        todo = [item for item in items if self._settled(item)]
        if todo:
            with self.with_tail([item.event.key for item in todo]):
                self._transact(todo, sync)
        for item in items:
            item.finish()

    def _settled(self, item: Item) -> bool:
        if item.error is None and item.pending is not None:
            error = item.pending.exception()
            if error is not None:
                item.error = error if isinstance(error, OptserveError) else Internal(repr(error))
        return item.error is None

    def _transact(self, items: list[Item], sync: bool) -> None:
        try:
            with self._database.transaction(sync, self._hurried) as tx:
                for item in items:
                    self._one(tx, item, guarded=len(items) > 1)
        except Unavailable as exc:
            self._all_failed(items, exc)
            self.open_outcome([item.event.key for item in items])
        except OptserveError as exc:
            # Nothing is committed. What was too much together may do alone.
            if len(items) == 1:
                self._all_failed(items, exc)
            for item in items if len(items) > 1 else ():
                item.error, item.after = None, After()
                self._transact([item], sync)
        else:
            for item in items:
                if item.error is None:
                    self.follow_up(item.after)
                    self.remove(item.after)

    def _all_failed(self, items: list[Item], exc: OptserveError) -> None:
        for item in items:
            item.error = item.error or exc

    def _one(self, tx: Connection, item: Item, guarded: bool) -> None:
        """Write one event; with others in the transaction, behind a savepoint."""
        if not guarded:
            item.error = self._write(tx, item)
            return
        tx.driver.execute("SAVEPOINT one_event")
        try:
            item.error = self._write(tx, item)
        except OptserveError as exc:
            item.error = exc
        except Exception as exc:
            if (fault := self._database.fault(exc)) != "value":
                raise
            item.error = self._database.translated(exc, fault)
        if item.error is not None:
            tx.driver.execute("ROLLBACK TO SAVEPOINT one_event")
        tx.driver.execute("RELEASE SAVEPOINT one_event")

    def _write(self, tx: Connection, item: Item) -> OptserveError | None:
        assert item.row is not None
        if item.database_has:
            return self._writing.append(tx, item.row, item.placed, item.durability, item.after)
        return self._writing.mark(tx, item.row, item.durability, item.after)

    def follow_up(self, after: After) -> None:
        for call in after.calls:
            call()
        if after.untidy:
            self._database.tidy()

    def remove(self, after: After) -> None:
        if self._placing.files is not None and after.files:
            self._placing.files.remove(after.files)
