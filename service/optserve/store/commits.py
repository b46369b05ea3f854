"""Group commit: whoever writes takes along what queued meanwhile.

A caller that waits writes itself if nobody does, which saves two changes of thread; a thread of its
own writes for those that do not wait, and for those that came while somebody else wrote.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from typing import Literal

from optserve.store.base import Event, Key, Outcome
from optserve.store.database import Connection, Database
from optserve.store.frozen import Frozen
from optserve.store.jobs import Item, Job
from optserve.store.placing import Placed, Placing
from optserve.store.tail import Tails
from optserve.store.writing import After, Writing
from optserve_client.errors import Internal, OptserveError, Unavailable

#: How an event is committed: without a sync; with one; it is the first that only this process has,
#: which the database is told with a sync; in this process alone.
How = Literal["os", "synced", "mark", "tail"]


class Commits:
    """The queue, and the one place where anything is written."""

    def __init__(
        self, database: Database, placing: Placing, tails: Tails, writing: Writing
    ) -> None:
        self._database = database
        self._placing = placing
        self._tails = tails
        self._writing = writing
        self._changed = threading.Condition()
        self._queue: list[Job] = []
        #: How many queued or running calls a session has.
        self._busy: Counter[Key] = Counter()
        #: Who holds it writes.
        self._writer = threading.Lock()
        #: Sessions with a tail that a commit with an open outcome may have changed.
        self._unsure: set[Key] = set()
        self._settlers = ThreadPoolExecutor(2, thread_name_prefix="store-settle")
        self._closing = False
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="store-commit", daemon=True)
        self._thread.start()

    # --- the calls ---

    def submit(self, events: Sequence[Event]) -> Future[list[Outcome]]:
        job = self._enqueue(events)
        if not job.future.done():
            for pending in job.pending():
                pending.add_done_callback(lambda _: self._wake())
            self._wake()
        return job.future

    def append(self, events: Sequence[Event]) -> list[Outcome]:
        job = self._enqueue(events)
        if pending := job.pending():
            wait(pending)
        if not job.future.done() and self._writer.acquire(blocking=False):
            try:
                self._drain()
            finally:
                self._release()
        return job.future.result()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Write something else in the block."""
        with self._changed:
            self._check_open()
        self._writer.acquire()
        try:
            if self._closed:
                raise Unavailable("the store is closed")
            yield
        finally:
            self._release()

    @contextmanager
    def change(self, key: Key) -> Iterator[tuple[Connection, After]]:
        """Commit what the block does to one session, with a sync."""
        after = After()
        with self.alone(), self._with_tail([key]):
            if key in self._unsure:
                self._reconcile(key)
            try:
                with self._database.transaction() as tx:
                    yield tx, after
            except Unavailable:
                self._open_outcome([key])
                raise
            self._follow_up(after)
        # Unlinking what is large takes time, and nobody needs to wait for it.
        self._remove(after)

    def close(self) -> None:
        """Finish what was submitted; take nothing more."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        self._settlers.shutdown()
        with self._writer:
            self._closed = True

    def _check_open(self) -> None:
        if self._closing:
            raise Unavailable("the store is closed")

    # --- the queue ---

    def _enqueue(self, events: Sequence[Event]) -> Job:
        job = Job(events)
        if not job.items:
            job.future.set_result([])
            return job
        for item in job.items:
            self._prepare(item)
        with self._changed:
            self._check_open()
            if self._in_tails_alone(job):
                return job
            self._queue.append(job)
            self._busy.update(job.keys)
        return job

    def _in_tails_alone(self, job: Job) -> bool:
        """Append to the tails at once what needs neither database nor turn."""
        with self._tails.lock:
            for item in job.items:
                key = item.event.key
                if item.database_has or self._busy[key] or self._tails.get(key) is None:
                    return False
                if key in self._unsure:
                    return False
            for item in job.items:
                self._to_tail(item)
                item.finish()
        return True

    def _prepare(self, item: Item) -> None:
        """Do what can be done without a turn: freeze the event, place the payload."""
        try:
            item.row = Frozen.of(item.event)
            payload = item.event.payload
            if payload is None or not item.database_has:
                return
            item.placed = self._placing.place(payload)
            begins = item.event.kind in ("create", "rewind")  # which leave a session clean
            if item.durability != "os" or begins or item.placed.copied:
                item.pending = self._settling(item.placed)
        except OptserveError as exc:
            item.error = exc

    def _settling(self, placed: Placed) -> Future[object] | None:
        files = self._placing.files
        if files is None or placed.file is None:
            return None
        return self._settlers.submit(files.settle, placed.file)

    def _take(self) -> list[Job]:
        """Take what can be written now: a session's calls stay in order."""
        with self._changed:
            taken, left, blocked = [], [], set[Key]()
            for job in self._queue:
                if job.pending() or not blocked.isdisjoint(job.keys):
                    blocked |= job.keys
                    left.append(job)
                else:
                    taken.append(job)
            self._queue = left
        return taken

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _release(self) -> None:
        self._writer.release()
        # Who found the writer busy since has left its work to the thread.
        if self._queue:
            self._wake()

    def _serve(self) -> None:
        while True:
            with self._changed:
                while not (self._closing or any(not job.pending() for job in self._queue)):
                    self._changed.wait()
                if self._closing:
                    running = [p for job in self._queue for p in job.pending()]
                    if not self._queue:
                        return
            if self._closing:
                wait(running)
            with self._writer:
                self._drain()

    # --- writing ---

    def _drain(self) -> None:
        jobs = self._take()
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
        finally:
            with self._changed:
                for job in jobs:
                    self._busy.subtract(job.keys)
                self._busy = +self._busy

    def _know(self, item: Item) -> None:
        """Find out what an open outcome has left of a tail, before it is written to."""
        if item.event.key in self._unsure:
            try:
                with self._tails.lock:
                    self._reconcile(item.event.key)
            except OptserveError as exc:
                item.error = exc

    def _open_outcome(self, keys: Sequence[Key]) -> None:
        """A commit may have happened or not: believe neither."""
        self._unsure.update(key for key in keys if self._tails.get(key) is not None)
        self._writing.dirty.difference_update(keys)  # the next os event says it again, synced

    def _reconcile(self, key: Key) -> None:
        with self._database.transaction() as tx:
            self._writing.reconcile(tx, key)
        self._unsure.discard(key)

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
            if before == "later" or order.index(group) < order.index(before):
                reached[key] = "later"
                later.append(item)
                continue
            if how == "mark":
                marked.add(key)
            reached[key] = group
            groups[group].append(item)
        self._commit(groups["os"], sync=False)
        self._commit(groups["synced"], sync=True)
        return self._append_to_tails(groups["tail"]) + later

    def _how(self, item: Item, marked: bool) -> How:
        key = item.event.key
        if not item.database_has:
            return "tail" if marked or self._tails.get(key) else "mark"
        if item.durability == "os" and key in self._writing.dirty and item.event.kind != "rewind":
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
                    self._to_tail(item)
        for item in items:
            if item not in later:
                item.finish()  # without the lock: it may call others
        return later

    def _to_tail(self, item: Item) -> None:
        if item.error is None:
            tail = self._tails.get(item.event.key)
            assert tail is not None
            assert item.row is not None
            item.error = tail.append(item.row)

    @contextmanager
    def _with_tail(self, keys: Sequence[Key]) -> Iterator[None]:
        """Let nobody see a tail without the database that belongs to it."""
        with self._tails.lock if any(map(self._tails.get, keys)) else nullcontext():
            yield

    def _commit(self, items: list[Item], *, sync: bool) -> None:
        """Commit ``items`` in one transaction; one that is refused takes no other down."""
        todo = [item for item in items if self._settled(item)]
        if todo:
            with self._with_tail([item.event.key for item in todo]):
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
            with self._database.transaction(sync) as tx:
                for item in items:
                    self._one(tx, item, guarded=len(items) > 1)
        except Unavailable as exc:
            self._all_failed(items, exc)
            self._open_outcome([item.event.key for item in items])
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
                    self._follow_up(item.after)
                    self._remove(item.after)

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

    def _follow_up(self, after: After) -> None:
        for call in after.calls:
            call()
        if after.untidy:
            self._database.tidy()

    def _remove(self, after: After) -> None:
        if self._placing.files is not None and after.files:
            self._placing.files.remove(after.files)
