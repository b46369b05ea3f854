"""Events that wait for their commit, each with what is known of it so far."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future

from optserve.store.base import Event, Outcome
from optserve.store.frozen import Frozen
from optserve.store.placing import Placed
from optserve.store.writing import After
from optserve_client.errors import OptserveError, Unavailable


def database_has(event: Event) -> bool:
    """Say whether the event goes to the database, whatever its durability."""
    return event.durability != "memory" or event.kind in ("create", "rewind")


class Item:
    """One event on its way."""

    __slots__ = ("after", "done", "durability", "error", "event", "job", "pending", "placed", "row")

    def __init__(self, job: Job, event: Event) -> None:
        self.job = job
        self.event = event
        self.durability = event.durability
        self.row: Frozen | None = None
        self.placed: Placed | None = None
        #: The sync of the payload.
        self.pending: Future[object] | None = None
        self.error: OptserveError | None = None
        self.done = False
        self.after = After()

    @property
    def database_has(self) -> bool:
        return database_has(self.event)

    def finish(self) -> None:
        if not self.done:
            self.done = True
            if self.error is not None and self.placed is not None and not self._open_outcome:
                self.placed.give_up()
            self.job.one_less()

    @property
    def _open_outcome(self) -> bool:
        """Whether a row may have been committed that names the payload."""
        return isinstance(self.error, Unavailable)


class Job:
    """The events of one call."""

    def __init__(self, events: Sequence[Event]) -> None:
        self.items = [Item(self, event) for event in events]
        self.keys = {event.key for event in events}
        self.future: Future[list[Outcome]] = Future()
        self.future.set_running_or_notify_cancel()
        self._left = len(self.items)

    def one_less(self) -> None:
        self._left -= 1
        if self._left == 0:
            outcomes = [
                Outcome(key=i.event.key, lsn=i.event.lsn, error=i.error) for i in self.items
            ]
            # Let go of the payloads now: their files wait for the last who holds them.
            self.items = []
            self.future.set_result(outcomes)

    def pending(self) -> list[Future[object]]:
        return [i.pending for i in self.items if i.pending and not i.pending.done()]
