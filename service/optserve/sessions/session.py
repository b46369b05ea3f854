"""One session: every request takes its turn, and each change is one committed event.

A change goes check -> apply -> append -> count in. Whatever fails after the first number changed
drops the state in memory; the next job reads it back from the journal, as of the last committed
event. So does the first job after a start, and the first one after the session was put away.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from typing import Any, TypeVar

import structlog

from optserve.optim.layout import Layout
from optserve.sessions import describe, operations, stepping
from optserve.sessions.holding import Holding, Home, Shape
from optserve.sessions.intake import Step, StepIntake, step_from_json
from optserve.sessions.journaling import KEPT_BYTES, Unkept
from optserve.sessions.ledger import Duplicate, Identity
from optserve.sessions.operation import Reaching
from optserve.sessions.published import Published
from optserve.sessions.pushes import Pushes
from optserve.sessions.recovery import event_of
from optserve.sessions.replay import write_frame
from optserve.sessions.reply import Reply, counters, step_reply
from optserve.sessions.state import SessionState
from optserve.sessions.stepping import Change
from optserve.sessions.turn import Back, Waiting
from optserve.sessions.weights import publish
from optserve.store.base import Durability, PayloadWriter, SessionRow
from optserve_client.errors import OptserveError, SessionNotFound, Unavailable

log = structlog.get_logger(__name__)

T = TypeVar("T")


class Session:
    """The one place that changes a :class:`SessionState`, under its turn.

    Methods that return a Future run in the order of their calls; the others look at the last
    commit.
    """

    def __init__(
        self,
        home: Home,
        row: SessionRow,
        state: SessionState | None = None,
        owner_epoch: int | None = None,
    ) -> None:
        """``state`` None: it is read back at first use; ``owner_epoch`` None: claimed then."""
        self.key = row.key
        #: Deleted: requests that still wait for their turn find nothing.
        self.closed = False
        #: Create bodies that were found to be equal to this session's.
        self.same: set[bytes] = set()
        #: Somebody else than its creator was told that it is there.
        self.shared = False
        #: When somebody last asked for something, on the monotonic clock.
        self.used_at = time.monotonic()
        self.pushes = Pushes()  # steps that come tensor by tensor
        self._store = home.store
        self._executor = home.executor
        self._scribes = home.scribes
        self._turn = home.executor.turn()
        self._held = Holding(home, row, state, owner_epoch)

    @property
    def id(self) -> str:
        return self.key.session

    @property
    def generation(self) -> str:
        generation: str = self.row.about["generation"]
        return generation

    @property
    def version(self) -> int:
        return self.row.version

    @property
    def row(self) -> SessionRow:
        """What is known without reading the journal, as of the last commit."""
        return self._held.row

    @property
    def origin(self) -> Mapping[str, Any]:
        """What a second PUT is compared with."""
        return self._held.known_origin()

    @property
    def cold(self) -> bool:
        """Whether :meth:`load` must come before intake, step_from_json, layout and origin."""
        return self._held.shape is None

    @property
    def layout(self) -> Layout:
        return self._held.known_shape().expected.layout

    def summary(self) -> dict[str, Any]:
        """Return the row of the session list, as of the last commit."""
        return describe.summary(self.row)

    # --- reading ---------------------------------------------------------------------------------

    def run(self, job: Callable[[SessionState], T]) -> Future[T]:
        """Run a job that only reads, under the session's turn."""
        self.used_at = time.monotonic()
        return self._turn.run(lambda: job(self._loaded()))

    def in_turn(self, job: Callable[[], T]) -> Future[T]:
        """Run a job that needs no state, under the session's turn; nobody counts it as a use."""
        return self._turn.run(job)

    def load(self) -> Future[None]:
        """Read the session back if it is not in memory."""
        return self.run(lambda state: None)

    def status(self) -> Future[dict[str, Any]]:
        return self.run(lambda state: describe.status(self.row, state))

    def published(self, weights: str = "live") -> Future[Published]:
        """Return a read-only copy of the weights at the current version."""
        return self.run(lambda state: self._held.publish(state, weights))

    def export(self) -> Future[list[bytes]]:
        """Return the state file as buffers."""
        return self.run(lambda state: [bytes(part) for part in state.frame()])

    def scheduler(self) -> Future[dict[str, Any]]:
        return self.run(describe.scheduler)

    def outlook(self) -> Future[describe.Outlook]:
        """Return what a look ahead needs; looking takes long, so it is not done in the turn."""
        return self.run(describe.Outlook.of)

    def history(self, after_version: int, limit: int) -> list[dict[str, Any]]:
        """Return one row per version above ``after_version``, oldest first."""
        return describe.history(self._store, self.key, after_version, limit)

    def versions(self, after: int, limit: int) -> list[dict[str, Any]]:
        """Return the versions above ``after`` that can be gone back to, oldest first."""
        return self._held.past.versions(after, limit)

    def state_at(self, version: int, state: SessionState) -> SessionState:
        """Return the state at ``version``, for a job that has the current one; do not change it."""
        return self._held.past.state_at(version, state)

    # --- the step --------------------------------------------------------------------------------

    def intake(self, limit_bytes: int) -> StepIntake:
        """Return the reader of one binary step body."""
        shape = self._held.known_shape()
        return StepIntake(
            expected=shape.expected,
            lease=shape.pool.lease,
            writer=self._writer,
            limit_bytes=limit_bytes,
            scribes=self._scribes,
        )

    def step_from_json(self, body: dict[str, Any], digest: bytes) -> Step:
        """Return a step from a parsed JSON body."""
        shape = self._held.known_shape()
        return step_from_json(
            body,
            expected=shape.expected,
            lease=shape.pool.lease,
            writer=self._writer,
            digest=digest,
        )

    def stage(self) -> tuple[Shape, Callable[[int], PayloadWriter | Unkept]]:
        """Return what :attr:`pushes` need to know, in a request to one of them."""
        self.used_at = time.monotonic()
        return self._held.known_shape(), self._writer

    def _writer(self, size: int) -> PayloadWriter | Unkept:
        durability = self.row.about["durability"]
        if durability == "memory" and size > KEPT_BYTES:
            return Unkept()
        return self._store.writer(size, durability)

    def step(self, step: Step, identity: Identity, back: Back | None = None) -> Future[Reply]:
        """Take one step; its buffer is given back whatever happens.

        With ``back``, which leads to the thread that calls, a small one is taken here and now.
        """
        self.used_at = time.monotonic()
        if back is not None and self._held.quick:
            done = self._turn.run_here(lambda: self._step(step, identity, back), back)
            if done is not None:
                return done
        begun = False

        def job() -> Waiting[Reply]:
            nonlocal begun
            begun = True
            return self._step(step, identity)

        def ended(_: Future[Reply]) -> None:
            if not begun:
                step.discard()

        try:
            future: Future[Reply] = self._turn.run(job)
        except OptserveError:
            step.discard()
            raise
        future.add_done_callback(ended)
        return future

    def _step(self, step: Step, identity: Identity, back: Back | None = None) -> Waiting[Reply]:
        fields = step.fields
        held, payload = True, step.payload
        try:
            state = self._loaded()
            if fields.dry_run:
                return self._dry_run(state, step)
            if known := state.check_identity(identity, time.time()):
                return self._step_reply(state, step, self._repeat(state, known), None)
            prepared = stepping.prepare(state, step)
            self._held.own()
            before = self._held.publish(state, "live") if fields.return_ == "delta" else None
            with self._held.changing():
                began = time.perf_counter()
                change = stepping.apply(state, prepared)
                seconds = time.perf_counter() - began
                # The next gradient can come while this one is made durable.
                held = False
                step.buffer.release()
                if change.payload is not None:
                    payload = None  # the commit's from here on
                scalars = yield from self._commit(state, change, identity, seconds, back=back)
            self._held.snapshots.write_if_due(state)
            return self._step_reply(state, step, scalars, before)
        finally:
            if held:
                step.buffer.release()
            if payload is not None:
                payload.discard()

    def _dry_run(self, state: SessionState, step: Step) -> Reply:
        """Step a copy that is thrown away; neither journal nor ledger hear of it."""
        copy = state.clone()
        change = stepping.apply(copy, stepping.prepare(copy, step))
        copy.version += int(change.moves)
        copy.updates += change.updates
        made = copy.version if change.moves else None
        scalars = {**counters(self.id, copy, made), **change.reply, "dry_run": True}
        weights = "trial" if change.reply.get("need") else "live"
        return step_reply(step, scalars, lambda: publish(copy, weights))

    def _step_reply(
        self, state: SessionState, step: Step, scalars: dict[str, Any], before: Published | None
    ) -> Reply:
        search = state.engine.line_search
        if scalars.get("need") and search is not None and search.open:  # a repeat needs them too
            return step_reply(step, scalars, lambda: publish(state, "trial"))
        return step_reply(step, scalars, lambda: self._held.publish(state, "live"), before)

    # --- other changes ---------------------------------------------------------------------------

    def change(
        self,
        operation: operations.Operation,
        identity: Identity,
        *,
        if_match: str | None = None,
        abandon: bool = False,
    ) -> Future[Reply]:
        """Apply any change but a step: see :mod:`optserve.sessions.operations`."""
        self.used_at = time.monotonic()
        return self._turn.run(lambda: self._change(operation, identity, if_match, abandon))

    def _change(
        self,
        operation: operations.Operation,
        identity: Identity,
        if_match: str | None,
        abandon: bool,
    ) -> Waiting[Reply]:
        state = self._loaded()
        if known := state.check_identity(identity, time.time()):
            return Reply(scalars=self._repeat(state, known))
        state.check_match(if_match)
        if isinstance(operation, Reaching):
            operation = operation.reach(self._held.past, state)
        self._held.admit(operation.check(state, abandon), self.put_away)
        self._held.own()
        before = state.config["durability"]
        if before == "memory" and operations.hardens(operation):
            self._held.snapshots.write(state)
        payload = write_frame(self._store, operation.frame, before) if operation.frame else None
        with self._held.changing():
            began = time.perf_counter()
            try:
                change = replace(operation.apply(state), payload=payload)
            except BaseException:
                if payload is not None:
                    payload.discard()
                raise
            seconds = time.perf_counter() - began
            scalars = yield from self._commit(state, change, identity, seconds, before)
        self._held.snapshots.write_if_due(state)
        return Reply(scalars=scalars)

    def remove(self, identity: Identity, forget: Callable[[], None]) -> Future[Reply]:
        """Close the session and call ``forget``; also one that cannot be read back any more."""

        def job() -> Reply:
            if self.closed:
                raise SessionNotFound(f"no session {self.id!r}")
            state = None
            with suppress(OptserveError):  # what cannot be read back can still be deleted
                state = self._loaded()
            if state is not None:
                state.check_identity(identity, time.time())
            forget()
            return Reply(scalars={"id": self.id, "deleted": True, "version": self.version})

        return self._turn.run(job)

    # --- memory ----------------------------------------------------------------------------------

    def _loaded(self) -> SessionState:
        if self.closed:
            raise SessionNotFound(f"no session {self.id!r}")
        return self._held.loaded(self.put_away)

    def put_away(self) -> bool:
        """Free the session's memory if nobody uses it right now; its next use reads it back."""
        gone = False

        def job() -> None:
            nonlocal gone
            gone = self._held.put_away()

        try:
            return self._turn.run_if_idle(job) and gone
        except OptserveError as exc:
            log.warning("a session stays in memory", session=self.id, why=exc.detail)
            return False

    def ending(self) -> AbstractContextManager[None]:
        """Keep no snapshot any more, in a job that deletes the session; unless that fails."""
        return self._held.snapshots.ending()

    def snapshot(self) -> Future[None]:
        """Write a snapshot if anything was committed since the last one; wait until it is kept."""
        return self._turn.run(lambda: self._held.write_snapshot(self.put_away))

    # --- commit ----------------------------------------------------------------------------------

    def _commit(
        self,
        state: SessionState,
        change: Change,
        identity: Identity,
        seconds: float,
        durability: Durability | None = None,
        *,
        back: Back | None = None,
    ) -> Waiting[dict[str, Any]]:
        """Append the event of an applied change, count it in, and return the reply's scalars.

        ``back`` leads to this thread, which must not wait for a disk.
        """
        made = state.version + 1 if change.moves else None
        if change.kind != "step" or state.updates == 0:
            self._held.measure(state)
        reply = {"applied_version": made, **change.reply}
        owner_epoch, news = self._held.own(), self._held.news(state)
        event = event_of(self.key, state, change, identity, reply, owner_epoch, news, durability)
        if self._executor.spare and back is None:
            [outcome] = self._store.append([event])
        else:  # the thread is better used for somebody else's numbers
            [outcome] = yield self._store.submit([event], back)
        if outcome.error is not None:
            # After Unavailable the event may be committed all the same, and name its payload.
            if event.payload is not None and not isinstance(outcome.error, Unavailable):
                event.payload.discard()
            raise outcome.error
        state.commit(event)
        if change.moves:
            self._held.unpublish()
        self._held.show(state)
        self._held.snapshots.count(event, seconds)
        self._held.apply_s = seconds
        return {**counters(self.id, state, made), **reply}

    def _repeat(self, state: SessionState, known: Duplicate) -> dict[str, Any]:
        told = counters(self.id, state, known.applied_version)
        return {**known.reply, **told, "duplicate": True}
