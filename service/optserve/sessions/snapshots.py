"""When a session writes a snapshot, and how it goes on meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager

import structlog

from optserve.sessions.replay import write_frame
from optserve.sessions.state import SessionState
from optserve.sessions.turn import Executor
from optserve.store import Event, Key, Payload, Store
from optserve_client.errors import SessionNotFound

log = structlog.get_logger(__name__)

#: A snapshot is written when replay would take longer than this and than so many times what reading
#: the snapshot takes, or read more events than this, or more bytes than this and four times an
#: Adam's state.
REPLAY_S = 2.0
REPLAY_READS = 4
REPLAY_EVENTS = 10_000
REPLAY_BYTES = 4 * 2**20
#: About what a frame is read and decoded with.
READ_BYTES_S = 500e6


class Snapshots:
    """The snapshots of one session. Called under its turn.

    The frame is written from live memory, between two steps; the store makes it durable and reads
    it back on a thread of ``background`` while the session goes on.
    """

    def __init__(self, store: Store, key: Key, kept_lsn: int, background: Executor) -> None:
        """``kept_lsn``: up to here the store has all that a snapshot could add."""
        self._store = store
        self._key = key
        #: Event up to which a snapshot, or the journal as it was found, has everything.
        self.kept_lsn = kept_lsn
        self._background = background
        self._keeping: Future[None] | None = None
        #: Held while one is kept, and while none may be.
        self._lock = threading.Lock()
        self._closed = False
        self._events = self._bytes = 0
        self._seconds = 0.0

    @property
    def behind(self) -> bool:
        """Whether anything was committed since the last one was begun."""
        return self._events > 0

    @property
    def replay_s(self) -> float:
        """About how long replay would take."""
        return self._seconds

    @property
    def under_way(self) -> bool:
        """Whether one was begun and is not kept yet."""
        return self._keeping is not None and not self._keeping.done()

    def count(self, event: Event, seconds: float) -> None:
        """Note one committed event, which took so long to apply."""
        self._events += 1
        self._bytes += event.payload.nbytes if event.payload is not None else 0
        self._seconds += seconds

    def replayed(self, upto_lsn: int, seconds: float) -> None:
        """Note that reading the session back, up to ``upto_lsn``, took so long.

        A server that is killed again and again would else replay more each time.
        """
        kept = self._store.snapshots(self._key)
        self._events = upto_lsn - (kept[-1].lsn if kept else 1)
        self._seconds = seconds if self._events else 0.0

    def write_if_due(self, state: SessionState) -> None:
        """Begin a snapshot if replay became too long and none is under way."""
        # The pushes of an open round are in the journal alone, whose payloads a snapshot may end.
        if self.under_way or state.round.open or not self._due(state.layout.nbytes):
            return
        try:
            self.begin(state)
        except Exception:
            # The event is committed, and its request must not hear that it failed.
            log.exception("no snapshot was written", session=self._key.session)

    def _due(self, nbytes: int) -> bool:
        read_s = 3 * nbytes / READ_BYTES_S
        return (
            self._events >= REPLAY_EVENTS
            or self._bytes >= max(REPLAY_BYTES, 4 * 3 * nbytes)
            or self._seconds >= max(REPLAY_S, REPLAY_READS * read_s)
        )

    def begin(self, state: SessionState) -> None:
        """Write the frame now, and have it kept while the session goes on; failing is logged."""
        self._reset()
        frame, lsn = write_frame(self._store, state.frame()), state.lsn
        try:
            self._keeping = self._background.submit(lambda: self._keep_later(lsn, frame))
        except BaseException:
            frame.discard()
            raise

    def _keep_later(self, lsn: int, frame: Payload) -> None:
        try:
            self._keep(lsn, frame)
        except SessionNotFound:
            log.debug("a deleted session needs no snapshot", session=self._key.session)
        except Exception:
            log.exception("no snapshot was kept", session=self._key.session, lsn=lsn)

    def _keep(self, lsn: int, frame: Payload) -> None:
        with self._lock:
            if self._closed or lsn < self.kept_lsn:
                frame.discard()
                return
            self._store.snapshot(self._key, lsn, frame)
            self.kept_lsn = lsn

    def write(self, state: SessionState) -> None:
        """Write a snapshot and return when it is kept."""
        self._keep(state.lsn, write_frame(self._store, state.frame()))
        self._reset()

    def _reset(self) -> None:
        self._events = self._bytes = 0
        self._seconds = 0.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let none be kept in the block: it changes what a replay reads."""
        with self._lock:
            yield

    @contextmanager
    def ending(self) -> Iterator[None]:
        """Keep none from here on: the next session of this id must not get one.

        If the block fails, the session goes on, and so do its snapshots.
        """
        with self._lock:
            self._closed = True
        try:
            yield
        except BaseException:
            self._closed = False
            raise

    def wait(self) -> None:
        """Wait until none is under way."""
        if self._keeping is not None:
            self._keeping.result()
