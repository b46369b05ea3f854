"""Which sessions are in memory: the least recently used ones make room for the next."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable

from optserve.store import Key
from optserve_client.errors import TooLarge, Unavailable

#: Puts a session away if it is idle; it then releases its seat itself.
PutAway = Callable[[], bool]


class Residents:
    """The sessions in memory, by last use, and the bytes that they take."""

    def __init__(self, budget: int | None) -> None:
        #: Bytes for all sessions together; None: no limit.
        self.budget = budget
        self._lock = threading.Lock()
        self._seats: OrderedDict[Key, tuple[int, PutAway]] = OrderedDict()
        self._total = 0

    @property
    def total(self) -> int:
        """Bytes that the sessions in memory take, as far as is known."""
        return self._total

    def used(self, key: Key) -> None:
        """Note that a session was used."""
        with self._lock:
            if key in self._seats:
                self._seats.move_to_end(key)

    def admit(self, key: Key, nbytes: int, put_away: PutAway) -> None:
        """Take ``nbytes`` for a session before they are allocated; idle others are put away.

        Raises TooLarge if the session alone is above the budget, Unavailable if it does not fit
        beside those that are busy now.
        """
        if self.budget is not None and nbytes > self.budget:
            raise TooLarge(
                f"session {key.session!r} takes about {nbytes} bytes of memory, the server's "
                f"memory budget is {self.budget} (--memory-budget)",
                needed=nbytes,
                limit=self.budget,
            )
        before = self._leave(key)
        for other in self._others():
            if self._take(key, nbytes, put_away):
                return
            other()
        if not self._take(key, nbytes, put_away):
            if before is not None:
                self._sit(key, *before)
            raise Unavailable(
                f"session {key.session!r} takes about {nbytes} bytes of memory, {self._total} of "
                f"the server's memory budget of {self.budget} are taken by sessions that are busy",
                retry_after=1,
            )

    def _others(self) -> list[PutAway]:
        """Return what puts the others away, the least recently used first."""
        with self._lock:
            return [put_away for _, put_away in self._seats.values()]

    def _take(self, key: Key, nbytes: int, put_away: PutAway) -> bool:
        with self._lock:
            if self.budget is not None and self._total + nbytes > self.budget:
                return False
            self._seats[key] = (nbytes, put_away)
            self._total += nbytes
            return True

    def _sit(self, key: Key, nbytes: int, put_away: PutAway) -> None:
        with self._lock:
            self._seats[key] = (nbytes, put_away)
            self._total += nbytes

    def _leave(self, key: Key) -> tuple[int, PutAway] | None:
        with self._lock:
            seat = self._seats.pop(key, None)
            self._total -= seat[0] if seat else 0
            return seat

    def adjust(self, key: Key, nbytes: int) -> None:
        """Note what a session in memory really takes."""
        with self._lock:
            if key in self._seats:
                before, put_away = self._seats[key]
                self._seats[key] = (nbytes, put_away)
                self._total += nbytes - before

    def release(self, key: Key) -> None:
        """Note that a session is no longer in memory."""
        self._leave(key)
