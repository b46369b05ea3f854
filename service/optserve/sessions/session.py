"""One session: every request takes its turn, and each change is one committed event.

A change goes check -> apply -> append -> count in. Whatever fails after the first number changed
drops the state in memory; the next job reads it back from the journal, as of the last committed
event.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from optserve.optim.arena import GradientPool
from optserve.optim.layout import Layout
from optserve.sessions import describe, operations, stepping
from optserve.sessions.intake import Step, StepIntake, step_from_json
from optserve.sessions.ledger import Duplicate, Identity
from optserve.sessions.published import Published
from optserve.sessions.replay import SnapshotPolicy, replay, write_frame
from optserve.sessions.reply import Reply
from optserve.sessions.state import SessionState
from optserve.sessions.step import Expected
from optserve.sessions.stepping import Change
from optserve.sessions.turn import Turn
from optserve.sessions.weights import publish, subtract
from optserve.store import Event, Key, Store
from optserve_client.errors import Internal, OptserveError, PreconditionFailed, SessionNotFound

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Shape:
    """What a step of the session must look like, and buffers of that shape."""

    expected: Expected
    pool: GradientPool


class Session:
    """The one place that changes a :class:`SessionState`, under its turn.

    Methods that return a Future run in the order of their calls; the others look at the last
    commit.
    """

    def __init__(self, key: Key, store: Store, turn: Turn, state: SessionState) -> None:
        self.key = key
        #: Deleted: requests that still wait for their turn find nothing.
        self.closed = False
        #: Create bodies that were found to be equal to this session's.
        self.same: set[bytes] = set()
        self._store = store
        self._turn = turn
        self._state: SessionState | None = None
        self._published: Published | None = None
        self._snapshots = SnapshotPolicy(store, key)
        self._adopt(state)

    def _adopt(self, state: SessionState) -> None:
        self._state = state
        self._show(state)

    def _show(self, state: SessionState) -> None:
        """Make the last commit visible to those who do not wait for a turn."""
        self.generation = state.generation
        self.version = state.version
        # One assignment: who reads it while another thread commits sees all of it or nothing.
        self._shape = Shape(
            Expected(layout=state.layout, sparse=state.engine.recipe.sparse), state.engine.pool
        )
        self.origin = state.origin
        self._summary = describe.summary(self.id, state)

    @property
    def id(self) -> str:
        return self.key.session

    @property
    def layout(self) -> Layout:
        return self._shape.expected.layout

    def summary(self) -> dict[str, Any]:
        """Return the row of the session list, as of the last commit."""
        return self._summary

    # --- reading ---------------------------------------------------------------------------------

    def run(self, job: Callable[[SessionState], T]) -> Future[T]:
        """Run a job that only reads, under the session's turn."""
        return self._turn.run(lambda: job(self._loaded()))

    def status(self) -> Future[dict[str, Any]]:
        return self.run(lambda state: describe.status(self.id, state))

    def published(self, weights: str = "live") -> Future[Published]:
        """Return a read-only copy of the weights at the current version."""
        return self.run(lambda state: self._publish(state, weights))

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

    # --- the step --------------------------------------------------------------------------------

    def intake(self, limit_bytes: int) -> StepIntake:
        """Return the reader of one binary step body."""
        shape = self._shape
        return StepIntake(
            expected=shape.expected,
            lease=shape.pool.lease,
            writer=self._store.writer,
            limit_bytes=limit_bytes,
        )

    def step_from_json(self, body: dict[str, Any], digest: bytes) -> Step:
        """Return a step from a parsed JSON body."""
        shape = self._shape
        return step_from_json(
            body,
            expected=shape.expected,
            lease=shape.pool.lease,
            writer=self._store.writer,
            digest=digest,
        )

    def step(self, step: Step, identity: Identity) -> Future[Reply]:
        """Take one step; its buffer is given back whatever happens."""
        try:
            return self._turn.run(lambda: self._step(step, identity))
        except OptserveError:
            step.discard()
            raise

    def _step(self, step: Step, identity: Identity) -> Reply:
        fields, committed = step.fields, False
        try:
            state = self._loaded()
            if fields.dry_run:
                return self._dry_run(state, step)
            if known := state.ledger.check(identity, time.time()):
                return self._step_reply(state, step, self._repeat(state, known), None)
            prepared = stepping.prepare(state, step)
            before = None
            if fields.return_ == "delta":
                before = self._publish(state, "live")
            with self._changing():
                change = stepping.apply(state, prepared)
                scalars = self._commit(state, change, identity)
            committed = change.payload is not None
            self._snapshots.write_if_due(state)
            return self._step_reply(state, step, scalars, before)
        finally:
            if committed:
                step.buffer.release()
            else:
                step.discard()

    def _dry_run(self, state: SessionState, step: Step) -> Reply:
        """Step a copy that is thrown away; neither journal nor ledger hear of it."""
        copy = state.clone()
        change = stepping.apply(copy, stepping.prepare(copy, step))
        copy.version += int(change.moves)
        copy.updates += change.updates
        made = copy.version if change.moves else None
        scalars = {**_counters(self.id, copy, made), **change.reply, "dry_run": True}
        if step.fields.return_ == "none":
            return Reply(scalars=scalars)
        weights = "trial" if change.reply.get("need") else "live"
        return _reply(step, scalars, publish(copy, weights), "params")

    def _step_reply(
        self, state: SessionState, step: Step, scalars: dict[str, Any], before: Published | None
    ) -> Reply:
        if step.fields.return_ == "none":
            return Reply(scalars=scalars)
        search = state.engine.line_search
        if scalars.get("need") and search is not None and search.open:  # a repeat needs them too
            return _reply(step, scalars, publish(state, "trial"), "params")
        current = self._publish(state, "live")
        if before is not None and scalars["applied_version"] is not None:
            return _reply(step, scalars, subtract(current, before), "delta")
        return _reply(step, scalars, current, "params")

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

        def job() -> Reply:
            state = self._loaded()
            if known := state.ledger.check(identity, time.time()):
                return Reply(scalars=self._repeat(state, known))
            self._check_match(state, if_match)
            operation.check(state, abandon)
            payload = write_frame(self._store, operation.frame) if operation.frame else None
            with self._changing():
                change = operation.apply(state)
                scalars = self._commit(state, replace(change, payload=payload), identity)
            self._snapshots.write_if_due(state)
            return Reply(scalars=scalars)

        return self._turn.run(job)

    def _check_match(self, state: SessionState, if_match: str | None) -> None:
        if if_match is None or if_match.strip() == "*":
            return
        current = f"{state.generation}.{state.version}"
        tags = [tag.strip().removeprefix("W/").strip('"') for tag in if_match.split(",")]
        if not any(tag == current or tag.startswith(f"{current}-") for tag in tags):
            raise PreconditionFailed(
                f"If-Match is {if_match!r:.120}, the session is at {current}",
                version=state.version,
            )

    def remove(self, identity: Identity, forget: Callable[[], None]) -> Future[Reply]:
        """Close the session and call ``forget``; also one that cannot be read back any more."""

        def job() -> Reply:
            if self.closed:
                raise SessionNotFound(f"no session {self.id!r}")
            with suppress(Internal):
                self._loaded().ledger.check(identity, time.time())
            forget()
            return Reply(scalars={"id": self.id, "deleted": True, "version": self.version})

        return self._turn.run(job)

    # --- commit ----------------------------------------------------------------------------------

    def _loaded(self) -> SessionState:
        if self.closed:
            raise SessionNotFound(f"no session {self.id!r}")
        if self._state is None:
            try:
                self._adopt(replay(self._store, self.key))
            except Exception as exc:
                raise Internal(f"session {self.id!r} cannot be read back: {exc!r:.200}") from exc
        assert self._state is not None
        return self._state

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Whatever raises in here may have left numbers half-changed: the journal knows better."""
        try:
            yield
        except BaseException:
            self._state = self._published = None
            raise

    def _commit(self, state: SessionState, change: Change, identity: Identity) -> dict[str, Any]:
        """Append the event of an applied change, count it in, and return the reply's scalars."""
        version = state.version + int(change.moves)
        made = version if change.moves else None
        reply = describe.strict({"applied_version": made, **change.reply})
        event = Event(
            key=self.key,
            lsn=state.lsn + 1,
            kind=change.kind,
            version=version,
            updates=state.updates + change.updates,
            time=time.time(),
            worker=identity.worker,
            epoch=identity.epoch,
            seq=identity.seq,
            idempotency_key=identity.key,
            digest=identity.digest,
            record={
                "request": _said(change.request),
                "outcome": _said(change.outcome),
                "reply": reply,
            },
            loss=change.loss,
            grad_norm=describe.finite(change.grad_norm),
            payload=change.payload,
        )
        [outcome] = self._store.append([event])
        if outcome.error is not None:
            raise outcome.error
        state.commit(event)
        if change.moves:
            self._published = None
        self._show(state)
        self._snapshots.count(event)
        return {**_counters(self.id, state, made), **reply}

    def _repeat(self, state: SessionState, known: Duplicate) -> dict[str, Any]:
        counters = _counters(self.id, state, known.applied_version)
        return {**known.reply, **counters, "duplicate": True}

    def _publish(self, state: SessionState, weights: str) -> Published:
        if weights == "eval" and state.engine.entry.eval_weights:
            with self._changing():  # these classes change their params to and fro
                return publish(state, weights)
        if weights != "live":
            return publish(state, weights)
        if self._published is None:
            self._published = publish(state, "live")
        return self._published


def _counters(session_id: str, state: SessionState, made: int | None) -> dict[str, Any]:
    return {
        "id": session_id,
        "generation": state.generation,
        "version": state.version,
        "applied_version": made,
        "updates": state.updates,
        "duplicate": False,
        "durability": state.config["durability"],
    }


def _said(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _reply(step: Step, scalars: dict[str, Any], params: Published, returned: str) -> Reply:
    if step.fields.return_ != returned:
        scalars = {**scalars, "returned": returned}
    return Reply(
        scalars=scalars,
        params=params,
        returned=returned,
        encoding=step.fields.return_encoding,
        dtype=step.fields.return_dtype,
    )
