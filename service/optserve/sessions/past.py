"""What a session can go back to: versions that snapshots, events and pins still reach."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from optserve.sessions.kinds import WITH_PAYLOAD
from optserve.sessions.replay import PayloadGone, read_frame, replay, write_frame
from optserve.sessions.state import SessionState
from optserve.store.base import Event, Key, SnapshotRow, Store
from optserve_client.errors import Internal, Invalid


class Past:
    """The reachable versions of one session."""

    def __init__(self, store: Store, key: Key) -> None:
        self._store = store
        self._key = key

    def state_at(self, version: int, state: SessionState) -> SessionState:
        """Return the state at ``version``; do not change it.

        The current version is as it is now (but as before it while a round is open), an earlier one
        as it was right after the event that made it, a pinned one as it was pinned. Raises Invalid
        for a version that is not there yet or cannot be reached any more.
        """
        _check_bounds(version, state)
        if version == state.version and not state.round.open:
            return state
        lsn, kept = self._lsn_of(version), self._store.snapshots(self._key)
        replayable = lsn is not None and lsn > self._base(kept)
        for row in self._standing(kept):
            if row.version == version and (row.pin is not None or not replayable):
                payload = self._store.read_snapshot(self._key, row.lsn)
                if payload is not None:
                    return read_frame(payload)
        if not replayable:
            raise self._unreachable(version)
        try:
            return replay(self._store, self._key, lsn)
        except (Internal, PayloadGone) as exc:  # of a session that keeps its events in memory
            raise self._unreachable(version) from exc

    def _standing(self, kept: list[SnapshotRow]) -> list[SnapshotRow]:
        """Return the snapshots that stand for their versions.

        Those that are pinned, and those taken right after the event that made the version: in the
        others there is what came later without a version of its own.
        """
        return [row for row in kept if row.pin or self._lsn_of(row.version) in (row.lsn, None)]

    def _lsn_of(self, version: int) -> int | None:
        """Return the lsn of the event that made ``version``, if its row is kept."""
        lsn = self._store.first_at(self._key, version)
        if lsn is None:
            return None
        [event] = self._store.events(self._key, lsn - 1, lsn, payloads=False)
        return lsn if event.version == version else None

    def _unreachable(self, version: int) -> Invalid:
        reachable = [row["version"] for row in self.versions(-1, None)]
        return Invalid(
            f"version {version} of session {self._key.session!r} cannot be reached any more; "
            f"{_spans(reachable)} can",
            field="version",
        )

    @staticmethod
    def _base(kept: list[SnapshotRow]) -> int:
        """Return the lsn up to which payloads were dropped: that of the older of two snapshots."""
        return kept[-2].lsn if len(kept) > 1 else 0

    # --- listing ---------------------------------------------------------------------------------

    def versions(self, after: int, limit: int | None) -> list[dict[str, Any]]:
        """Return at most ``limit`` reachable versions above ``after``, oldest first."""
        kept = self._store.snapshots(self._key)
        standing, base = self._standing(kept), self._base(kept)
        by_version = {row.version: row for row in standing}
        rows: dict[int, dict[str, Any]] = {
            row.version: {
                "version": row.version,
                "updates": None,
                "kind": None,
                "time": row.time,
                "snapshot": True,
                "pin": row.pin,
            }
            for row in standing
        }
        made = max((row.version for row in kept if row.lsn <= base), default=-1)
        for event in self._whole(base, frozenset(row.lsn for row in kept)):
            if event.version > made:
                made = event.version
                snapshot = by_version.get(made)
                rows[made] = {
                    "version": made,
                    "updates": event.updates,
                    "kind": event.kind,
                    "time": event.time,
                    "snapshot": snapshot is not None,
                    "pin": snapshot.pin if snapshot else None,
                }
        wanted = [rows[version] for version in sorted(rows) if version > after]
        return wanted[:limit]

    def _whole(self, base: int, snapshots: frozenset[int]) -> Iterator[Event]:
        """Yield the events after ``base`` that a replay reaches."""
        whole = True
        for event in self._store.events(self._key, after_lsn=base):
            lacking = event.payload is None and event.kind in WITH_PAYLOAD
            whole = event.lsn in snapshots or (whole and not lacking)
            if whole:
                yield event

    # --- pins ------------------------------------------------------------------------------------

    def pin(self, version: int, name: str, state: SessionState) -> None:
        """Keep a snapshot of ``version`` outside retention, under ``name``; again: rename it."""
        past = self.state_at(version, state)
        frame = write_frame(self._store, past.frame())
        self._store.snapshot(self._key, past.lsn, frame, pin=name)

    def unpin(self, version: int, state: SessionState) -> None:
        """Let the pinned snapshot of ``version`` go as any other, if there is one.

        A version that is not pinned is no error: a repeat, after a crash between this and the
        commit, finds none either.
        """
        _check_bounds(version, state)
        for row in self._store.snapshots(self._key):
            if row.version == version and row.pin is not None:
                self._store.unpin(self._key, row.lsn)


def _check_bounds(version: int, state: SessionState) -> None:
    if not 0 <= version <= state.version:
        raise Invalid(f"version must be in [0, {state.version}], got {version}", field="version")


def _spans(versions: list[int]) -> str:
    """Return ``0, 5-9, 12``."""
    spans: list[list[int]] = []
    for version in versions:
        if spans and version == spans[-1][1] + 1:
            spans[-1][1] = version
        else:
            spans.append([version, version])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in spans[-20:]) or "none"
