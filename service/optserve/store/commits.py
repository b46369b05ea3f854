"""Group commit: whoever writes takes along what queued meanwhile.

A caller that waits writes itself if nobody does, which saves two changes of thread; so does an
event loop, once for all that came in one round of it, as long as no sync is needed. A thread of its
own writes for those that do not wait, and for those that came while somebody else wrote.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager

from optserve.store.base import Event, Key, Outcome, Soon
from optserve.store.database import Connection, Database
from optserve.store.frozen import Frozen
from optserve.store.jobs import Item, Job, database_has
from optserve.store.placing import Placed, Placing
from optserve.store.rounds import Rounds
from optserve.store.tail import Tails
from optserve.store.writing import After
from optserve_client.errors import OptserveError, Unavailable

#: Where a thread that must not wait for a disk waited for longer than this, it leaves its commits
#: to another for a while.
HURRIED_S = 0.02
NO_HURRY_S = 1.0
#: How long who was asked to write is trusted to do so.
ASKED_S = 0.1


class Commits:
    """The queue of what is to be written, and who writes."""

    def __init__(self, database: Database, placing: Placing, tails: Tails, rounds: Rounds) -> None:
        self._database = database
        self._placing = placing
        self._tails = tails
        self._changed = threading.Condition()
        self._queue: list[Job] = []
        #: How many queued or running calls a session has.
        self._busy: Counter[Key] = Counter()
        #: Who holds it writes.
        self._writer = threading.Lock()
        self._rounds = rounds
        self._settlers = ThreadPoolExecutor(2, thread_name_prefix="store-settle")
        #: When somebody was asked to call :meth:`_hurry`, on the monotonic clock, as is:
        self._asked = -math.inf
        self._no_hurry_before = 0.0
        self._closing = False
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="store-commit", daemon=True)
        self._thread.start()

    # --- the calls ---

    def submit(self, events: Sequence[Event], soon: Soon | None = None) -> Future[list[Outcome]]:
        if (outcomes := self._in_tails_alone(events)) is not None:
            ended: Future[list[Outcome]] = Future()
            ended.set_result(outcomes)
            return ended
        job = self._enqueue(events)
        if soon is not None and self._may_hurry(job) and self._asks(soon):
            return job.future
        for pending in job.pending():
            pending.add_done_callback(lambda _: self._wake())
        self._wake()
        return job.future

    def append(self, events: Sequence[Event]) -> list[Outcome]:
        if (outcomes := self._in_tails_alone(events)) is not None:
            return outcomes
        job = self._enqueue(events)
        if pending := job.pending():
            wait(pending)
        if self._writer.acquire(blocking=False):
            try:
                self._drain()
            finally:
                self._release()
        return job.future.result()

    def _may_hurry(self, job: Job) -> bool:
        return (
            self._database.at_hand
            and all(item.durability == "os" and not item.pending for item in job.items)
            and time.monotonic() >= self._no_hurry_before
        )

    def _asks(self, soon: Soon) -> bool:
        now = time.monotonic()
        if now < self._asked + ASKED_S:
            return True
        self._asked = now
        try:
            soon(self._hurry)
        except RuntimeError:  # that thread has ended
            self._asked = -math.inf
            return False
        return True

    def _hurry(self) -> None:
        """Write what needs no sync on this thread, which must not wait for a disk."""
        self._asked = -math.inf
        if not self._writer.acquire(blocking=False):
            return  # who writes sees to the rest
        began = time.monotonic()
        try:
            if self._database.at_hand:
                self._drain(hurried=True)
        finally:
            self._release()
        if (took := time.monotonic() - began) > HURRIED_S:
            self._no_hurry_before = began + took + NO_HURRY_S + 10 * took

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
        with self.alone(), self._rounds.with_tail([key]):
            if key in self._rounds.unsure:
                self._rounds.reconcile(key)
            try:
                with self._database.transaction() as tx:
                    yield tx, after
            except Unavailable:
                self._rounds.open_outcome([key])
                raise
            self._rounds.follow_up(after)
        # Unlinking what is large takes time, and nobody needs to wait for it.
        self._rounds.remove(after)

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
        for item in job.items:
            self._prepare(item)
        with self._changed:
            self._check_open()
            self._queue.append(job)
            self._busy.update(job.keys)
        return job

    def _in_tails_alone(self, events: Sequence[Event]) -> list[Outcome] | None:
        """Append to the tails what needs neither database nor turn; None: these events do."""
        if any(database_has(event) for event in events):
            return None
        frozen = [_frozen(event) for event in events]
        with self._changed:
            self._check_open()
            # Who has it for long commits, and waits for the disk.
            if not self._tails.lock.acquire(blocking=False):
                return None
            try:
                for event in events:
                    key, tail = event.key, self._tails.get(event.key)
                    if self._busy[key] or key in self._rounds.unsure or tail is None:
                        return None
                return [
                    Outcome(key=e.key, lsn=e.lsn, error=self._rounds.to_tail(e.key, row))
                    for e, row in zip(events, frozen, strict=True)
                ]
            finally:
                self._tails.lock.release()

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

    def _split(self, hurried: bool = False) -> tuple[list[Job], list[Job]]:
        """Return what can be written now, and the rest: a session's calls stay in order."""
        now, later, blocked = [], [], set[Key]()
        for job in self._queue:
            waits = job.pending() or (hurried and self._rounds.puts_off(job))
            if waits or not blocked.isdisjoint(job.keys):
                blocked |= job.keys
                later.append(job)
            else:
                now.append(job)
        return now, later

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _release(self) -> None:
        self._writer.release()
        # Who found the writer busy since has left its work to the thread.
        if self._queue or self._database.behind:
            self._wake()

    def _serve(self) -> None:
        while True:
            with self._changed:
                while not (self._closing or self._database.behind or self._split()[0]):
                    self._changed.wait()
                if self._closing and not self._queue:
                    return
                running = [p for job in self._queue for p in job.pending() if self._closing]
            wait(running)
            with self._writer:
                self._drain()
                if self._database.behind:
                    self._database.catch_up()

    # --- writing ---

    def _drain(self, hurried: bool = False) -> None:
        with self._changed:
            jobs, self._queue = self._split(hurried)
        try:
            self._rounds.write(jobs, hurried)
        finally:
            with self._changed:
                for job in jobs:
                    self._busy.subtract(job.keys)
                self._busy = +self._busy


def _frozen(event: Event) -> Frozen | OptserveError:
    try:
        return Frozen.of(event)
    except OptserveError as exc:
        return exc
