"""A change that was applied becomes an event, and counts once that is committed."""

from __future__ import annotations

from typing import Any

from optserve.sessions.holding import Holding, Home
from optserve.sessions.identity import Identity
from optserve.sessions.recovery import event_of
from optserve.sessions.reply import counters
from optserve.sessions.state import SessionState
from optserve.sessions.stepping import Change
from optserve.sessions.turn import Back, Waiting
from optserve.store.base import Durability, Key
from optserve_client.errors import Unavailable


class Committer:
    """Appends the events of one session, under its turn."""

    def __init__(self, home: Home, key: Key, held: Holding) -> None:
        self._store = home.store
        self._executor = home.executor
        self._now = home.alarms.now
        self._key = key
        self._held = held

    def commit(
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

        ``seconds``: what it took to apply. ``back`` leads to this thread, which must not wait for
        a disk.
        """
        made = state.version + 1 if change.moves else None
        if change.kind != "step" or state.updates == 0:
            self._held.measure(state)
        reply = {"applied_version": made, **change.reply}
        owner_epoch, news = self._held.own(), self._held.news(state)
        event = event_of(
            self._key, state, change, identity, reply, owner_epoch, news, durability, self._now()
        )
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
        # What is no update tells little about the next one, which may be done by the event loop.
        self._held.apply_s = seconds if change.updates else max(seconds, self._held.apply_s)
        return {**counters(self._key.session, state, made), **reply}
