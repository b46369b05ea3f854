"""One session's numbers in memory: read back at first use, dropped after a failure, put away."""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from optserve.optim.arena import GradientPool
from optserve.sessions import describe, workers
from optserve.sessions.alarms import Alarms
from optserve.sessions.lending import Loan
from optserve.sessions.past import Past
from optserve.sessions.published import Published
from optserve.sessions.recovery import read_back
from optserve.sessions.residency import Residents
from optserve.sessions.snapshots import Snapshots
from optserve.sessions.state import SessionState, expected_of
from optserve.sessions.step import Expected
from optserve.sessions.turn import Executor
from optserve.sessions.watching import Watching
from optserve.sessions.weights import publish
from optserve.store.base import SessionRow, Store
from optserve_client.errors import SessionNotFound

#: What is no larger and took no longer than this at the last change may be done on the event loop.
QUICK_BYTES = 16 * 2**10
QUICK_S = 0.001

#: A session that is put away gets a snapshot if replay would take longer than this.
PUT_AWAY_REPLAY_S = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class Home:
    """What the sessions of a server share."""

    store: Store
    #: The threads that compute.
    executor: Executor
    #: The threads that write bodies to the journal as they arrive.
    scribes: Executor
    #: Where snapshots are made durable.
    background: Executor
    alarms: Alarms
    residents: Residents


@dataclass(frozen=True, slots=True)
class Shape:
    """What a step of the session must look like, and buffers of that shape."""

    expected: Expected
    pool: GradientPool


class Holding:
    """The state of one session, or none, and what is known of it all the same.

    Everything but ``row``, ``shape`` and ``watching`` is used under the session's turn.
    """

    def __init__(
        self, home: Home, row: SessionRow, state: SessionState | None, owner_epoch: int | None
    ) -> None:
        """``state`` None: it is read back at first use; ``owner_epoch`` None: claimed then."""
        self.row = row
        #: Who waits for a later version than that of ``row``.
        self.watching = Watching()
        #: None: the session was never read back by this process.
        self.shape: Shape | None = None
        #: Several workers push into the session; it collects their pushes in rounds. Known with
        #: ``shape``.
        self.shared = self.gathers = False
        #: Config, dtype and shapes as created; known with ``shape``.
        self.origin: Mapping[str, Any] = {}
        #: The live params of the current version, as long as somebody reads them.
        self._loan: weakref.ref[Loan] | None = None
        self.snapshots = Snapshots(
            home.store, row.key, row.last_lsn if state is None else state.lsn, home.background
        )
        self.past = Past(home.store, row.key)
        #: What the last change took to apply.
        self.apply_s = math.inf
        self._home = home
        self._owner_epoch = owner_epoch
        self._state: SessionState | None = None
        self._nbytes: int = row.about["resident_bytes"]
        if state is not None:
            self._adopt(state)

    @property
    def quick(self) -> bool:
        """Whether the next step is so short that changing threads would take longer."""
        state = self._state
        return (
            state is not None
            and self.apply_s < QUICK_S
            and state.layout.nbytes <= QUICK_BYTES
            and self._owner_epoch is not None
        )

    def own(self) -> int:
        """Return the owner epoch to commit with; the first call may write."""
        if self._owner_epoch is None:
            self._owner_epoch = self._home.store.claim(self.row.key)
        return self._owner_epoch

    def known_shape(self) -> Shape:
        assert self.shape is not None, "the session was not loaded"
        return self.shape

    def known_origin(self) -> Mapping[str, Any]:
        assert self.shape is not None, "the session was not loaded"
        return self.origin

    def loaded(self, put_away: Callable[[], bool]) -> SessionState:
        """Return the state; read it back first if need be, when others made room for it."""
        residents = self._home.residents
        if self._state is None:
            residents.admit(self.row.key, self.row.about["resident_bytes"], put_away)
            try:
                self._read_back()
            except BaseException:
                residents.release(self.row.key)
                raise
        residents.used(self.row.key)
        assert self._state is not None
        return self._state

    def _read_back(self) -> None:
        store, key = self._home.store, self.row.key
        with self.snapshots.paused():
            row = store.session(key)  # what it says of lost events may be news
            if row is None:
                raise SessionNotFound(f"no session {key.session!r}")
            began = time.perf_counter()
            state = read_back(store, row, self.own)
            self.snapshots.replayed(state.lsn, time.perf_counter() - began)
        self._adopt(state)
        self.snapshots.write_if_due(state)

    def admit(self, nbytes: int | None, put_away: Callable[[], bool]) -> None:
        """Make room for what a change will make of the session; None: it stays as large."""
        if nbytes is not None and nbytes > self._nbytes:
            self._home.residents.admit(self.row.key, nbytes, put_away)

    def _adopt(self, state: SessionState) -> None:
        self._state = state
        self.measure(state)
        self.show(state)

    def measure(self, state: SessionState) -> None:
        """Note what the session takes in memory, where it may have grown above the estimate."""
        self._nbytes = max(self._nbytes, state.engine.nbytes())
        self._home.residents.adjust(self.row.key, self._nbytes)

    def news(self, state: SessionState) -> dict[str, Any] | None:
        """Return what is known of the session if a commit changes it."""
        about = describe.about(state, self._nbytes)
        return about if about != self.row.about else None

    def show(self, state: SessionState) -> None:
        """Make the last commit visible to those who do not wait for a turn."""
        self.origin = state.origin
        # One assignment each: who reads while another thread commits sees all of it or nothing.
        known = self.shape
        if (
            known is None
            or known.pool is not state.engine.pool
            or known.expected.kind != workers.kind(state.config)
        ):
            self.shape = Shape(expected_of(state), state.engine.pool)
        self.shared = state.config.get("workers") is not None
        self.gathers = workers.rounds(state.config) is not None
        self.row = SessionRow(
            key=self.row.key,
            last_lsn=state.lsn,
            version=state.version,
            updates=state.updates,
            created=state.created,
            changed=state.changed,
            about=describe.about(state, self._nbytes),
            durability=state.config["durability"],
        )
        self.watching.shown(state.version)

    def publish(self, state: SessionState, weights: str) -> Published:
        """Return weights; live ones are shared by all who want them at this version."""
        if weights == "eval" and state.engine.entry.eval_weights:
            with self.changing():  # these classes change their params to and fro
                return publish(state, weights)
        if weights != "live":
            return publish(state, weights)
        published = publish(state, "live", self._lent())
        self._loan = weakref.ref(published.loan)
        return published

    def unpublish(self) -> None:
        """The version is another one: what was published stays as it was."""
        self._loan = None

    def _lent(self) -> Loan | None:
        return self._loan() if self._loan is not None else None

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Numbers change in here. Whatever raises may have left them half-changed: the journal
        knows better."""
        if (loan := self._lent()) is not None:
            loan.settle()
        with self.committing():
            yield

    @contextmanager
    def committing(self) -> Iterator[None]:
        """An event is committed in here. Whatever raises may have left it committed or not."""
        try:
            yield
        except BaseException:
            self.drop()
            raise

    def drop(self) -> None:
        """Forget the state as it is; the next use reads it back."""
        self._state = self._loan = None
        self._home.residents.release(self.row.key)

    def put_away(self) -> bool:
        """Free the memory, unless the journal alone would lose something; return whether it did."""
        state = self._state
        if state is None:
            self._home.residents.release(self.row.key)
            return True
        if self.snapshots.under_way or state.round.open:
            return False
        if self._only_here():
            self.snapshots.write(state)
        elif self.snapshots.replay_s > PUT_AWAY_REPLAY_S:
            self.snapshots.begin(state)
        shape = self.known_shape()
        self.shape = Shape(shape.expected, GradientPool(shape.pool.layout))
        self.drop()
        return True

    def _only_here(self) -> bool:
        """Whether acknowledged events are in this process alone."""
        return self.row.durability == "memory" and self.row.last_lsn > self.snapshots.kept_lsn

    def write_snapshot(self, put_away: Callable[[], bool]) -> None:
        """Write a snapshot if that spares the next start a replay, or loses it nothing."""
        if self._only_here():
            self.snapshots.write(self.loaded(put_away))
        elif self._state is not None and self.snapshots.behind and not self._state.round.open:
            self.snapshots.write(self._state)
