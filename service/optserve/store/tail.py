"""Events of ``memory`` sessions that no snapshot covers yet: only this process has them."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from optserve.store.base import Event, Key, refusal
from optserve.store.frozen import Frozen
from optserve_client.errors import OptserveError


@dataclass(slots=True)
class Tail:
    """The end of one journal, behind what the database holds."""

    #: The last lsn in the database.
    base: int
    owner_epoch: int
    rows: list[Frozen] = field(default_factory=list)
    #: The latest row of the list; None: as the database has it.
    about: str | None = None

    @property
    def last_lsn(self) -> int:
        return self.base + len(self.rows)

    @property
    def last(self) -> Event:
        return self.rows[-1].event

    def append(self, row: Frozen) -> OptserveError | None:
        """Append ``row``, or return why it cannot follow."""
        if error := refusal(row.event, self.last_lsn, self.owner_epoch):
            return error
        self.rows.append(row)
        if row.about is not None:
            self.about = row.about
        return None

    def upto(self, lsn: int) -> list[Frozen]:
        return self.rows[: max(lsn - self.base, 0)]

    def written(self, lsn: int) -> None:
        """Let go of the rows up to ``lsn``: the database has them now."""
        del self.rows[: max(lsn - self.base, 0)]
        self.base = max(self.base, lsn)


class Tails:
    """The tails of all sessions.

    ``lock`` is held for moments, except where a commit changes a tail and the database together:
    whoever sees a tail under it sees the database that belongs to it.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._tails: dict[Key, Tail] = {}

    def get(self, key: Key) -> Tail | None:
        return self._tails.get(key)

    def start(self, key: Key, base: int, owner_epoch: int) -> Tail:
        tail = self._tails[key] = Tail(base, owner_epoch)
        return tail

    def drop(self, key: Key) -> None:
        self._tails.pop(key, None)

    def keys(self) -> list[Key]:
        return list(self._tails)
