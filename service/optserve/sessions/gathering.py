"""The rounds of one session as they happen: pushes that wait for the others, and the deadline."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any
from weakref import WeakMethod

import structlog

from optserve.sessions import rounds, workers
from optserve.sessions.alarms import Alarms
from optserve.sessions.committing import Committer
from optserve.sessions.fields import StepFields
from optserve.sessions.holding import Holding
from optserve.sessions.identity import Identity
from optserve.sessions.published import Published
from optserve.sessions.reply import Forms, Pending, Reply, counters, step_reply
from optserve.sessions.state import SessionState
from optserve.sessions.stepping import Change
from optserve.sessions.turn import Back, Turn, Waiting
from optserve_client.errors import Internal, OptserveError, OutOfSpace, RoundFailed, Unavailable

log = structlog.get_logger(__name__)

#: How long a push waits that does not say, after the deadline.
PATIENCE_S = 5.0
#: When a round is looked at again that could not be ended in time.
AGAIN_S = 1.0
NOBODY = Identity()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Waiter:
    """A request that waits for the end of the round."""

    worker: str
    seq: int
    fields: StepFields
    duplicate: bool
    future: Future[Reply]


class Gathering:
    """The open round of a session and who waits for it; under the session's turn.

    ``load`` returns the state, read back if need be.
    """

    def __init__(
        self,
        held: Holding,
        committer: Committer,
        turn: Turn,
        alarms: Alarms,
        load: Callable[[], SessionState],
    ) -> None:
        self._held = held
        self._committer = committer
        self._turn = turn
        self._alarms = alarms
        self._load = load
        self._waiters: list[_Waiter] = []
        #: When the alarm that is set goes off, Unix seconds; None: none is.
        self._alarm_at: float | None = None

    # --- a push ----------------------------------------------------------------------------------

    def push(
        self,
        state: SessionState,
        change: Change,
        fields: StepFields,
        identity: Identity,
        back: Back | None,
    ) -> Waiting[Reply]:
        """Commit a push, and close the round if it was the last one."""
        with self._held.committing():
            scalars = yield from self._committer.commit(state, change, identity, 0.0, back=back)
        if change.kind == "skip":
            return step_reply(fields, scalars, lambda: self._held.publish(state, "live"))
        reply = self._wait(state, fields, identity, scalars, duplicate=False)
        yield from self.settle(state, back)
        return reply

    def join(
        self,
        state: SessionState,
        fields: StepFields,
        identity: Identity,
        scalars: dict[str, Any],
        back: Back | None,
    ) -> Waiting[Reply]:
        """Wait with a push that the open round has already."""
        reply = self._wait(state, fields, identity, scalars, duplicate=True)
        yield from self.settle(state, back)  # if the last push could not close it
        return reply

    def _wait(
        self,
        state: SessionState,
        fields: StepFields,
        identity: Identity,
        scalars: dict[str, Any],
        *,
        duplicate: bool,
    ) -> Reply:
        assert identity.worker is not None
        assert identity.seq is not None
        future: Future[Reply] = Future()
        wait_s = fields.wait_s
        if wait_s is None:
            left_s = state.round.deadline(rounds.rules(state)) - self._alarms.now()
            wait_s = max(left_s, 0.0) + PATIENCE_S
        waiter = _Waiter(
            worker=identity.worker,
            seq=identity.seq,
            fields=fields,
            duplicate=duplicate,
            future=future,
        )
        self._waiters = [*(w for w in self._waiters if not w.future.cancelled()), waiter]
        scalars = {**scalars, "round": rounds.progress(state)}
        return Reply(scalars=scalars, pending=Pending(future=future, wait_s=wait_s))

    # --- the end of a round ----------------------------------------------------------------------

    def settle(self, state: SessionState, back: Back | None = None) -> Waiting[None]:
        """Close the round if enough have pushed; see to it that it ends in time if not."""
        how = workers.rounds(state.config)
        if how is None or not state.round.open:
            return
        if _full(state, how):
            yield from self._close(state, "count", back)
        else:
            self.watch(state)

    def watch(self, state: SessionState) -> None:
        """Set an alarm for the end of the open round; wake those whose push is in none."""
        if state.round.open and (how := workers.rounds(state.config)) is not None:
            # Full: the process may have ended between the last push and the close.
            self._remind(0.0 if _full(state, how) else state.round.deadline(how))
        if self._waiters:
            lost = [w for w in self._waiters if not state.round.holds(w.worker, w.seq)]
            self._answer(lost, Unavailable("the push has to be sent again", retry_after=1))

    def _remind(self, at: float) -> None:
        """Have the round looked at then, or before: one alarm at a time, which sets the next."""
        if self._alarm_at is None or at < self._alarm_at:
            self._alarm_at = at
            self._set_alarm(at, at)

    def _set_alarm(self, name: float, at: float) -> None:
        alarm = WeakMethod(self._alarm)  # it must not keep a session that was deleted

        def ring() -> None:
            if (found := alarm()) is not None:
                found(name)

        self._alarms.after(max(at - self._alarms.now(), 0.0), ring)

    def _alarm(self, name: float) -> None:
        try:
            self._turn.run(lambda: self._due(name))
        except Unavailable:  # too many requests wait
            self._set_alarm(name, self._alarms.now() + AGAIN_S)

    def _due(self, name: float) -> Waiting[None]:
        """End the round if its time is over."""
        if name != self._alarm_at:  # an earlier one was set since
            return
        try:
            state = self._load()
            self._alarm_at = None
            yield from self._end_in_time(state)
        except (Unavailable, OutOfSpace) as exc:
            log.warning("a round could not be ended", why=exc.detail)
            self._alarm_at = None
            self._remind(self._alarms.now() + AGAIN_S)
        except Exception as exc:  # it will not get better
            self._alarm_at = None
            self._give_up(exc)

    def _end_in_time(self, state: SessionState) -> Waiting[None]:
        how = workers.rounds(state.config)
        if how is None or not state.round.open:
            return
        pushed = len(state.round.contributions)
        if _full(state, how):
            yield from self._close(state, "count", None)
        elif state.round.deadline(how) > self._alarms.now():
            self.watch(state)
        elif pushed >= how["quorum"]:
            yield from self._close(state, "deadline", None)
        else:
            why = (
                f"{pushed} of {how['count']} workers had pushed after {how['deadline_s']:g} s, "
                f"{how['quorum']} are needed"
            )
            yield from self.fail(state, why)

    def _close(self, state: SessionState, by: str, back: Back | None) -> Waiting[None]:
        wants_delta = any(w.fields.return_ == "delta" for w in self._waiters)
        before = self._held.publish(state, "live") if wants_delta else None
        pushes = state.round.contributions
        try:
            with self._held.changing():
                began = time.perf_counter()
                change = rounds.close(state, by)
                seconds = time.perf_counter() - began
                made = state.version + 1
                yield from self._committer.commit(state, change, NOBODY, seconds, back=back)
        except (Unavailable, OutOfSpace) as exc:  # it may go better later
            self.end(exc)
            self._remind(self._alarms.now() + AGAIN_S)
            raise
        except Exception as exc:  # it would go wrong again
            why = exc.detail if isinstance(exc, OptserveError) else repr(exc)
            log.warning("a round fails", session=self._held.row.key.session, why=why)
            self._remind(self._alarms.now() + AGAIN_S)  # if failing fails
            yield from self.fail(self._load(), why, back)
            return
        self._held.snapshots.write_if_due(state)
        waiters, self._waiters = self._waiters, []
        forms: Forms = {}
        for waiter in waiters:
            answer = pushes[waiter.worker].answer(change.reply)
            self._tell(waiter, state, answer, made, before, forms)

    def _tell(
        self,
        waiter: _Waiter,
        state: SessionState,
        answer: Mapping[str, Any],
        made: int,
        before: Published | None,
        forms: Forms,
    ) -> None:
        if not waiter.future.set_running_or_notify_cancel():
            return
        scalars = {
            **counters(self._held.row.key.session, state, made),
            **answer,
            "duplicate": waiter.duplicate,
        }
        wants_delta = waiter.fields.return_ == "delta" and not waiter.duplicate
        try:
            current = lambda: self._held.publish(state, "live")
            old = before if wants_delta else None
            told = step_reply(waiter.fields, scalars, current, old, forms)
            waiter.future.set_result(told)
        except Exception as exc:  # the round is closed, whatever becomes of an answer
            waiter.future.set_exception(exc)

    def fail(self, state: SessionState, why: str, back: Back | None = None) -> Waiting[None]:
        """Drop the open round, and say so to all who wait for it."""
        number = state.round.number
        with self._held.committing():
            change = rounds.fail(state, why)
            yield from self._committer.commit(state, change, NOBODY, 0.0, back=back)
        told = f"round {number} failed: {why}"
        self.end(RoundFailed(told, version=state.version, round=number))
        # What was dropped is in the journal until snapshots end it.
        self._held.snapshots.write_if_due(state)

    def _give_up(self, exc: Exception) -> None:
        if not isinstance(exc, OptserveError):
            log.error("a round cannot be ended", exc_info=exc)
            exc = Internal("the round cannot be ended")
        self.end(exc)

    def end(self, error: OptserveError) -> None:
        """Nobody waits any longer."""
        self._answer(self._waiters, error)

    def _answer(self, waiters: Iterable[_Waiter], error: OptserveError) -> None:
        answered = {id(waiter): waiter for waiter in waiters}
        self._waiters = [waiter for waiter in self._waiters if id(waiter) not in answered]
        for waiter in answered.values():
            if waiter.future.set_running_or_notify_cancel():
                waiter.future.set_exception(type(error)(error.detail, **error.extra))


def _full(state: SessionState, how: Mapping[str, Any]) -> bool:
    count: int = how["count"]
    return len(state.round.contributions) >= count
