"""A store on a disk that forgets: what was done to it, and what must be found after a power loss.

:class:`Play` runs a random history against the real SQL store; its payload files lie on a
:class:`tests.disk.LossyDisk`, its SQLite database is real. The log then holds every operation on
the files, a copy of the database after each commit, and when each call began and ended. For every
place in it, :func:`wrecks` picks what a power loss there may leave; :class:`Found` reads it back.
"""

from __future__ import annotations

import errno
import random
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

from optserve.store.base import Durability, Event, Key, Outcome, Payload
from optserve.store.database import Connection
from optserve.store.files import INLINE_BYTES, PayloadFiles
from optserve.store.sql import SqlStore
from optserve.store.sqlite import Sqlite
from optserve_client.errors import Damaged, OptserveError, OutOfSpace, Unavailable
from tests.disk import Fault, Log, LossyDisk, Medium

#: In memory where that can be: the copy in the log is what survives, not what a real sync did.
FAST = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
_boots = count()
_calls = count()


class Violation(AssertionError):
    """The store broke a promise."""


# --- what must be there ---


@dataclass(frozen=True)
class Journal:
    """What a session has. Payloads are None where there is none, or none any more; Damaged where
    an earlier power loss took one that nobody had promised to keep."""

    events: Mapping[int, bytes | Damaged | None]
    #: Frame and pin, by lsn.
    frames: Mapping[int, tuple[bytes, str | None]] = field(default_factory=dict)

    @property
    def last(self) -> int:
        return max(self.events)

    def step(self, lsn: int, data: bytes | None) -> Journal:
        return replace(self, events={**self.events, lsn: data})

    def snapshot(self, lsn: int, frame: bytes, pin: str | None) -> Journal:
        old = self.frames.get(lsn, (b"", None))[1]
        return replace(self, frames={**self.frames, lsn: (frame, pin or old)})._trimmed()

    def unpin(self, lsn: int) -> Journal:
        return replace(self, frames={**self.frames, lsn: (self.frames[lsn][0], None)})._trimmed()

    def rewind(self, lsn: int, data: bytes | None) -> Journal:
        events = {at: kept for at, kept in self.events.items() if at < lsn}
        frames = {at: kept for at, kept in self.frames.items() if at < lsn}
        return Journal({**events, lsn: data}, frames)

    def _trimmed(self) -> Journal:
        lsns = sorted(self.frames)
        if len(lsns) < 2:
            return self
        frames = {at: kept for at, kept in self.frames.items() if kept[1] or at in lsns[-2:]}
        events = {at: data if at > lsns[-2] else None for at, data in self.events.items()}
        return Journal(events, frames)


@dataclass
class Call:
    """One change of one session."""

    key: Key
    #: The session afterwards, if the call does what it should; corrected when it did not.
    after: Journal | None
    #: Whether nothing that came before may be lost once this was acknowledged.
    firm: bool
    began: int = 0
    ended: int | None = None


# --- the store, recorded ---


class RecordedSqlite(Sqlite):
    """Notes a copy of the database after each commit."""

    def __init__(self, path: Path, log: Log, boot: str) -> None:
        super().__init__(path)
        self.log = log
        self._boot = boot

    def boot(self) -> str:
        return self._boot

    @contextmanager
    def transaction(self, sync: bool = True, hurried: bool = False) -> Iterator[Connection]:
        with super().transaction(sync, hurried) as tx:
            yield tx
            self.log.note("committing")
        self.log.note("commit", image(self.path), sync)


def image(path: Path) -> bytes:
    with closing(sqlite3.connect(path)) as connection:
        return connection.serialize()


class ArmedFaults:
    """Each armed fault happens once, to the next operation of its kind."""

    def __init__(self) -> None:
        self.armed: list[tuple[str, Fault]] = []

    def __call__(self, operation: str, name: str) -> Fault | None:
        for at, (kind, fault) in enumerate(self.armed):
            if kind == operation:
                del self.armed[at]
                return fault
        return None


@dataclass(frozen=True)
class Wreck:
    """What is left: the database and the payload files."""

    database: bytes | None
    files: Mapping[str, bytes]


class Machine:
    """A store that was opened on what an earlier one left."""

    def __init__(self, wreck: Wreck, lag: Callable[[], float] = lambda: 0) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="optserve-test-", dir=FAST))
        self.path = self.directory / "optserve.db"
        if wreck.database is not None:
            self.path.write_bytes(wreck.database)
        self.wreck = wreck
        self.log = Log()
        self.faults = ArmedFaults()
        self.disk = LossyDisk(wreck.files, self.log, self.faults, lag=lag)
        self._boot = f"boot-{next(_boots)}"
        self._start()

    def _start(self) -> None:
        self.files = PayloadFiles(self.directory / "payloads", self.disk)
        self.store = SqlStore(RecordedSqlite(self.path, self.log, self._boot), self.files)
        self.log.note("commit", image(self.path), True)

    def kill(self) -> None:
        """Let the process die and another one start; the power stays on, nothing is lost yet."""
        self.store._leave = lambda: None  # type: ignore[method-assign]
        self.store.close()
        self._start()

    def rows(self) -> dict[str, str]:
        """Return the files that committed rows name, each with the session of the row."""
        both = " UNION ".join(
            f"SELECT payload_file, session FROM {table} WHERE payload_file IS NOT NULL"
            for table in ("events", "snapshots")
        )
        with closing(sqlite3.connect(self.path)) as connection:
            return dict(connection.execute(both))

    def close(self) -> None:
        self.store.close()
        shutil.rmtree(self.directory)

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# --- what was found ---


class Found:
    """Everything that a store says, read to its end."""

    def __init__(self, machine: Machine) -> None:
        store = machine.store
        self.rows = machine.rows()
        self.files = set(machine.disk.contents())
        self.suspect: set[Key] = set()
        self.journals: dict[Key, FoundJournal] = {}
        for row in store.sessions():
            events = {event.lsn: _bytes(event.payload) for event in store.events(row.key)}
            frames = {}
            for kept in store.snapshots(row.key):
                frames[kept.lsn] = (_bytes(store.read_snapshot(row.key, kept.lsn)), kept.pin)
            self.journals[row.key] = FoundJournal(row.last_lsn, events, frames)
            if row.suspect:
                self.suspect.add(row.key)

    def check_files(self) -> None:
        """Every file has a row, every row its file; but a suspect session may have lost some."""
        lossy = {key.session for key in self.suspect}
        missing = {name for name, session in self.rows.items() if session not in lossy} - self.files
        if orphans := self.files - set(self.rows):
            raise Violation(f"files without a row: {sorted(orphans)}")
        if missing:
            whose = {name: self.rows[name] for name in missing}
            raise Violation(f"rows without their file, by session: {whose}")


@dataclass(frozen=True)
class FoundJournal:
    last: int
    events: Mapping[int, bytes | Damaged | None]
    frames: Mapping[int, tuple[bytes | Damaged | None, str | None]]

    def difference(self, expected: Journal, soft: set[int], rot: bool = False) -> str | None:
        """Return how this differs; the payloads of ``soft`` events may be lost, with ``rot`` any,
        but nothing may read as other bytes."""
        if self.last != expected.last or list(self.events) != sorted(expected.events):
            return f"events {list(self.events)} up to {self.last}, not up to {expected.last}"
        for lsn, data in self.events.items():
            lost = isinstance(data, Damaged)
            if lost and (rot or lsn in soft or isinstance(expected.events[lsn], Damaged)):
                continue
            if data != expected.events[lsn]:
                return f"the payload of event {lsn} is {_short(data)}, not what was sent"
        if {at: pin for at, (_, pin) in self.frames.items()} != {
            at: pin for at, (_, pin) in expected.frames.items()
        }:
            return f"snapshots {sorted(self.frames)}, not {sorted(expected.frames)}"
        for lsn, (frame, _) in self.frames.items():
            if frame != expected.frames[lsn][0] and not (rot and isinstance(frame, Damaged)):
                return f"the snapshot at {lsn} is {_short(frame)}, not what was kept"
        return None

    @property
    def recoverable(self) -> bool:
        """Whether one of the newest two snapshots, or the beginning, leads to the last event."""
        newest = sorted(self.frames)[-2:]
        starts = [at for at in newest if isinstance(self.frames[at][0], bytes)]
        starts += [0] if len(newest) < 2 else []
        lost = [at for at, data in self.events.items() if isinstance(data, Damaged)]
        return any(all(at <= start for at in lost) for start in starts)

    def as_journal(self) -> Journal:
        """Return what must stay from here on."""
        return Journal(self.events, self.frames)  # type: ignore[arg-type]


def _bytes(payload: Payload | None) -> bytes | Damaged | None:
    try:
        return None if payload is None else b"".join(payload.chunks(50_000))
    except Damaged as exc:
        return exc


def _short(data: bytes | Damaged | None) -> str:
    return f"{len(data)} bytes" if isinstance(data, bytes) else repr(data)


# --- a history ---


class Play:
    """A random history of a few sessions on one machine."""

    def __init__(self, machine: Machine, rng: random.Random, found: Found | None = None) -> None:
        self.machine = machine
        self.rng = rng
        # What a failed sync has dropped, a later process cannot know.
        self.faults = rng.random() < 0.5
        self.before: dict[Key, Journal | None] = {}
        self.now: dict[Key, Journal | None] = {}
        self.calls: dict[Key, list[Call]] = {}
        self._waiting: list[tuple[Call, Event, Future[list[Outcome]]]] = []
        #: What the store wants to be called on this thread.
        self._hurries: list[Callable[[], object]] = []
        for name, durability in SESSIONS.items():
            key = Key("t", name)
            journal = found.journals.get(key) if found else None
            self.before[key] = self.now[key] = journal.as_journal() if journal else None
            self.calls[key] = []
            if found and key in found.suspect:
                self._settle_suspect(key, found.journals[key], durability)

    def run(self, length: int) -> None:
        for _ in range(length):
            key = self.rng.choice(list(self.now))
            journal = self.now[key]
            if journal is None:
                self._event(key, "create", 1)
                continue
            doing = self.rng.choices(list(ACTIONS), list(ACTIONS.values()))[0]
            getattr(self, f"_{doing}")(key, journal)
        self.wait()

    def wait(self) -> None:
        """Wait for the calls that run, and correct what became of them."""
        self._hurry()
        waiting, self._waiting = self._waiting, []
        for call, event, future in waiting:
            [outcome] = future.result(60)
            if outcome.error is None or self._committed(outcome, event):
                continue
            chain = self.calls[call.key]
            at = chain.index(call)
            call.after = chain[at - 1].after if at else self.before[call.key]
            call.firm = False
            if event.payload is not None:
                event.payload.discard()
        for key, chain in self.calls.items():
            self.now[key] = chain[-1].after if chain else self.before[key]

    def _hurry(self) -> None:
        while self._hurries:
            self._hurries.pop()()

    def _committed(self, outcome: Outcome, event: Event) -> bool:
        """Ask the store, where the outcome is open."""
        if not isinstance(outcome.error, Unavailable):
            return False
        kept = self.machine.store.events(event.key, event.lsn - 1, event.lsn, payloads=False)
        return any(found.record == event.record for found in kept)

    def _payload(self, key: Key) -> tuple[bytes | None, Payload | None]:
        kind = self.rng.random()
        if kind < 0.15:
            return None, None
        small = kind < 0.3
        data = self.rng.randbytes(self.rng.randint(*((1, 500) if small else LARGE)))
        return data, self._written(data, SESSIONS[key.session])

    def _written(self, data: bytes, durability: Durability) -> Payload:
        writer = self.machine.store.writer(self.rng.choice([None, len(data)]), durability)
        cut = self.rng.randint(0, len(data))
        try:
            writer.write(memoryview(data)[:cut])
            writer.write(memoryview(data)[cut:])
            return writer.seal()
        finally:
            writer.discard()

    def _event(self, key: Key, kind: str, lsn: int, durability: Durability | None = None) -> None:
        self._arm(0.06, [("datasync", errno.EIO), ("sync_directory", errno.EIO)])
        self._arm(0.03, [("write", errno.ENOSPC), ("create", errno.EIO)])
        journal = self.now[key]
        durability = durability or SESSIONS[key.session]
        try:
            data, payload = self._payload(key)
        except (OutOfSpace, Unavailable):
            return  # nothing was asked of the store yet
        if journal is None:
            after = Journal({1: data})
        elif kind == "rewind":
            after = journal.rewind(lsn, data)
        else:
            after = journal.step(lsn, data)
        event = Event(
            key=key, lsn=lsn, kind=kind, version=lsn, updates=lsn, time=time.time(),
            payload=payload, durability=durability, record={"call": next(_calls)},
        )  # fmt: skip
        call = self._begin(key, after, firm=durability == "always")
        here = self.rng.random() < 0.5  # as an event loop does, at once or a little later
        future = self.machine.store.submit([event], self._hurries.append if here else None)
        if self.rng.random() < 0.5:
            self._hurry()
        future.add_done_callback(lambda _: self._end(call))
        self._waiting.append((call, event, future))
        if self.rng.random() < 0.5:
            self.wait()

    def _begin(self, key: Key, after: Journal | None, firm: bool) -> Call:
        call = Call(key, after, firm)
        self.calls[key].append(call)
        self.now[key] = after
        call.began = self.machine.log.note("call", key.session)
        return call

    def _end(self, call: Call) -> None:
        call.ended = self.machine.log.note("answer", call.key.session)

    def _arm(self, chance: float, faults: list[tuple[str, Fault]]) -> None:
        if self.faults and self.rng.random() < chance:
            self.machine.faults.armed.append(self.rng.choice(faults))

    # --- actions ---

    def _step(self, key: Key, journal: Journal) -> None:
        self._event(key, "step", journal.last + 1)

    def _firm_step(self, key: Key, journal: Journal) -> None:
        self._event(key, "step", journal.last + 1, "always")

    def _rewind(self, key: Key, journal: Journal) -> None:
        if journal.last >= 2:
            self.wait()
            lsn = self.rng.randint(max(2, journal.last - 3), journal.last + 1)
            self._event(key, "rewind", lsn)

    def _snapshot(self, key: Key, journal: Journal) -> None:
        if self.rng.random() < 0.7:
            self.wait()  # else the snapshot is of an event that may just be in flight
            if (kept := self.now[key]) is None:
                return
            journal = kept
        lsn = max(1, journal.last - self.rng.choice([0, 0, 0, 1, 2]))
        pin = self.rng.choice([None, None, None, "kept"])
        data = self.rng.randbytes(self.rng.randint(*LARGE))
        self._arm(0.2, [("write", "rot")])
        self._arm(0.05, [("datasync", errno.EIO), ("sync_directory", errno.EIO)])
        try:
            frame = self._written(data, "always")
        except (OutOfSpace, Unavailable):
            return
        finally:
            self.machine.faults.armed = [f for f in self.machine.faults.armed if f[1] != "rot"]
        self.wait()
        if (kept := self.now[key]) is None or kept.last < lsn:
            frame.discard()
            return
        # Only with the last event behind it everything before is out of danger.
        call = self._begin(key, kept.snapshot(lsn, data, pin), firm=False)
        call.firm = SESSIONS[key.session] == "always"
        try:
            self.machine.store.snapshot(key, lsn, frame, pin)
        except OptserveError:
            call.after = self.now[key] = kept
            call.firm = False
        self._end(call)

    def _unpin(self, key: Key, journal: Journal) -> None:
        self.wait()
        kept = self.now[key]
        pinned = [at for at, (_, pin) in kept.frames.items() if pin] if kept else []
        if kept and pinned:
            lsn = self.rng.choice(pinned)
            call = self._begin(key, kept.unpin(lsn), firm=SESSIONS[key.session] == "always")
            assert self.machine.store.unpin(key, lsn)
            self._end(call)

    def _delete(self, key: Key, journal: Journal) -> None:
        self.wait()
        if self.now[key] is not None:
            call = self._begin(key, None, firm=True)
            assert self.machine.store.delete(key)
            self._end(call)

    def _sweep(self, key: Key, journal: Journal) -> None:
        """What is in flight must stay, though its row is not there yet when the sweep begins."""
        self.machine.files.sweep(self.machine.rows().__contains__)

    def _kill(self, key: Key, journal: Journal) -> None:
        """Start again with nothing lost, whatever the durability."""
        self.wait()
        if self.faults:
            return
        self.machine.kill()
        found = Found(self.machine)
        found.check_files()
        for known, expected in self.now.items():
            _check_session(known, found, [expected])

    def _settle_suspect(self, key: Key, found: FoundJournal, durability: Durability) -> None:
        """Drop what was lost and go on behind it, as the owner of the session would."""
        lost = [at for at, data in found.events.items() if isinstance(data, Damaged)]
        lsn = min([*lost, found.last + 1])
        if lsn < 2:
            self._delete(key, Journal({1: None}))
        else:
            self.now[key] = self.before[key]
            self._event(key, "rewind", lsn)
        self.wait()


SESSIONS: dict[str, Durability] = {"a": "always", "b": "always", "c": "always", "o": "os"}
#: How often what is done.
ACTIONS = {
    "step": 50,
    "firm_step": 6,
    "snapshot": 16,
    "rewind": 4,
    "unpin": 3,
    "delete": 2,
    "sweep": 3,
    "kill": 2,
}
LARGE = (INLINE_BYTES + 1, INLINE_BYTES + 30_000)


# --- a power loss ---


def wrecks(
    play: Play, rng: random.Random, share: float = 1, first: int = 0
) -> Iterator[tuple[int, Wreck]]:
    """Yield what power losses leave, at a ``share`` of the places in the log from ``first`` on."""
    log, machine = list(play.machine.log.operations), play.machine
    medium = Medium(machine.wreck.files)
    #: What the database may be: the last synced commit, and those after it.
    databases = [machine.wreck.database]
    running = False
    for place, operation in enumerate(log):
        medium.apply(operation)
        if operation[:2] == ("note", "commit"):
            _, _, copy, synced = operation
            databases, running = [copy] if synced else [*databases, copy], False
        elif operation[:2] == ("note", "committing"):
            running = True
        if place >= first and rng.random() < share:
            candidates = [*databases, _next_copy(log, place)] if running else databases
            yield place, Wreck(rng.choice(candidates), medium.sample(rng))


def _next_copy(log: list[Any], place: int) -> bytes | None:
    return next(op[2] for op in log[place:] if op[:2] == ("note", "commit"))


def check(play: Play, place: int, found: Found, rot: bool = False) -> None:
    """Raise Violation unless ``found`` may be what a power loss at ``place`` left; with ``rot``,
    something may be unreadable on top of it."""
    found.check_files()
    for key, chain in play.calls.items():
        begun = [call for call in chain if call.began <= place]
        ended = [n for n, c in enumerate(begun, 1) if c.ended is not None and c.ended <= place]
        firm = max((n for n in ended if begun[n - 1].firm), default=0)
        suspect = key in found.suspect
        low = firm if suspect else max(ended, default=0)
        states = [play.before[key], *(call.after for call in begun)]
        _check_session(key, found, states[low:], states[firm] if suspect else None, rot)


def _check_session(
    key: Key,
    found: Found,
    allowed: list[Journal | None],
    firm: Journal | None = None,
    rot: bool = False,
) -> None:
    journal = found.journals.get(key)
    said = []
    for expected in allowed:
        if expected is None or journal is None:
            if expected is None and journal is None:
                return
            said.append(f"{'there' if journal else 'not there'}")
            continue
        soft: set[int] = set()
        if key in found.suspect:
            hard = firm.events if firm else {}
            soft = {at for at, data in expected.events.items() if hard.get(at) != data}
        if (difference := journal.difference(expected, soft, rot)) is None:
            return
        said.append(difference)
    raise Violation(f"session {key.session!r}: " + "; or ".join(dict.fromkeys(said)))
