"""The workers of a session: register one, remove one, say what is known of all."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from optserve.sessions import rounds, workers
from optserve.sessions.state import SessionState
from optserve.sessions.stepping import Change

#: Workers that are remembered.
_MOST = 10_000


@dataclass(frozen=True, kw_only=True)
class Register:
    """Begin a new epoch of a worker: whoever goes by its name with an older one is refused."""

    worker: str
    frame: None = None

    def check(self, state: SessionState, abandon: bool) -> None: ...

    def apply(self, state: SessionState) -> Change:
        epoch = state.ledger.next_epoch(self.worker)
        return Change(
            kind="worker",
            moves=False,
            request={"worker": self.worker, "epoch": epoch, "removed": False},
            reply={"worker": self.worker, "epoch": epoch, "last_seq": 0},
        )


@dataclass(frozen=True, kw_only=True)
class Remove:
    """Take nothing more from a worker before it registers again. A push of it that is in the open
    round stays in."""

    worker: str
    frame: None = None

    def check(self, state: SessionState, abandon: bool) -> None:
        state.ledger.check_known(self.worker)

    def apply(self, state: SessionState) -> Change:
        epoch, last_seq = state.ledger.position(self.worker)
        return Change(
            kind="worker",
            moves=False,
            request={"worker": self.worker, "epoch": epoch, "removed": True},
            reply={"worker": self.worker, "epoch": epoch, "last_seq": last_seq, "removed": True},
        )


class Sightings:
    """When workers last sent something, also what was not committed; Unix seconds."""

    def __init__(self) -> None:
        self._seen: dict[str, float] = {}

    def note(self, worker: str) -> None:
        if len(self._seen) >= _MOST:
            self._seen.clear()  # what was committed is in the ledger
        self._seen[worker] = time.time()

    def last(self, worker: str) -> float:
        return self._seen.get(worker, 0.0)


def listed(state: SessionState, seen: Sightings) -> dict[str, Any]:
    """Return the workers of a session and its open round."""
    rows = [
        {
            **row,
            "staleness": None if row["version"] is None else state.version - row["version"],
            "last_seen": max(row["last_seen"], seen.last(row["worker"])),
        }
        for row in state.ledger.workers()
    ]
    return {"version": state.version, "workers": rows, "round": _open_round(state)}


def _open_round(state: SessionState) -> dict[str, Any] | None:
    if workers.rounds(state.config) is None or not state.round.open:
        return None
    return {
        **rounds.progress(state),
        "quorum": rounds.rules(state)["quorum"],
        "opened_at": state.round.opened_at,
    }
