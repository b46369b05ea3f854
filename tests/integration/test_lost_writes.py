"""Power loss at any moment, on a disk that keeps as little as it may; and the proof that the check
can fail: without any one of the rules it does."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import count
from typing import Any

import pytest
import sqlalchemy as sa
import structlog
from sqlalchemy.dialects import sqlite

from optserve.store import behind as behind_module
from optserve.store import files as files_module
from optserve.store import writing as writing_module
from optserve.store.disk import DirectorySync
from optserve.store.files import FilePayload, FileWriter, PayloadFiles
from optserve.store.held import HeldFile
from optserve.store.schema import STATEMENTS, Sql
from optserve.store.writing import Writing
from optserve_client.errors import Damaged
from tests.conftest import LONG
from tests.power_loss import Found, Machine, Play, Violation, Wreck, check, wrecks
from tests.record import Figure

CALLS = 40
STATES_OF_A_PART = 250
#: 5,000 states in the long form, 1,000 in the short one.
PARTS = 20 if LONG else 4
#: States in which a missing rule must have shown.
ENOUGH = 1500


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Keep the warnings about hundreds of injected faults to ourselves."""
    with structlog.testing.capture_logs():
        yield


@pytest.fixture(autouse=True)
def followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Follow writers also here, where a large payload is a small one."""
    monkeypatch.setattr(behind_module, "PIECE_BYTES", 20_000)
    monkeypatch.setattr(behind_module, "LAG_BYTES", 30_000)


@pytest.fixture(autouse=True)
def compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile the statements once for all stores: it is half of opening one."""
    compile_, sql = Sql._compile, Sql(sqlite.dialect(paramstyle="named"))
    texts = {id(clause): sql[name] for name, clause in STATEMENTS.items()}

    def compiled(self: Sql, clause: sa.ClauseElement) -> str:
        return texts.get(id(clause)) or compile_(self, clause)

    monkeypatch.setattr(Sql, "_compile", compiled)


def states(seed: int, share: float, slow: float = 0.05) -> Iterator[int]:
    """Check one state after the other, without end, and count them; a ``share`` of the places in
    one history, then the next history. ``slow``: how many syncs leave time to overtake them."""
    rng, lags, numbers = random.Random(seed), random.Random(seed), count(1)
    while True:
        with Machine(Wreck(None, {}), lag=lambda: 0.005 * (lags.random() < slow)) as machine:
            born = len(machine.log.operations)
            play = Play(machine, rng)
            play.run(CALLS)
            machine.store.close()
            for place, wreck in wrecks(play, rng, share, born):
                for _ in reopen(play, place, wreck, rng, depth=2):
                    yield next(numbers)


def reopen(play: Play, place: int, wreck: Wreck, rng: random.Random, depth: int) -> Iterator[None]:
    """Check one state; of some, go on from there and cut the power again, also while it opens."""
    with Machine(wreck) as machine:
        found = Found(machine)
        check(play, place, found)
        if rng.random() < 0.05:
            check_rot(play, place, wreck, found, rng)
        yield
        if depth == 0 or rng.random() > 0.05:
            return
        later = Play(machine, rng, found)
        later.run(5)
        machine.store.close()
        again = list(wrecks(later, rng))
    for place, wreck in rng.sample(again, min(len(again), 5)):
        yield from reopen(later, place, wreck, rng, depth - 1)


def check_rot(play: Play, place: int, wreck: Wreck, found: Found, rng: random.Random) -> None:
    """Let one file rot: it must read as damaged, and a rotten snapshot must cost nothing."""
    rows = {name: session for name, session in found.rows.items() if wreck.files.get(name)}
    if not rows:
        return
    name = rng.choice(sorted(rows))
    data = bytearray(wreck.files[name])
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    with Machine(Wreck(wreck.database, {**wreck.files, name: bytes(data)})) as machine:
        rotten = Found(machine)
    check(play, place, rotten, rot=True)
    for key, journal in rotten.journals.items():
        if key in rotten.suspect:
            continue
        frames = [frame for frame, _ in journal.frames.values() if isinstance(frame, Damaged)]
        if (key.session != rows[name] or frames) and not journal.recoverable:
            raise Violation(f"session {key.session!r} cannot be read back: {name} is rotten")


@pytest.mark.parametrize("part", range(PARTS))
def test_no_power_loss_breaks_a_promise(part: int, figure: Figure) -> None:
    with closing(states(part, share=0.3)) as checked:
        for number in checked:
            if number == STATES_OF_A_PART:
                break
    figure(f"power loss, part {part}: violations in {STATES_OF_A_PART} states", 0, "states")


# --- without one rule ---

Mutant = Callable[[pytest.MonkeyPatch], None]
MUTANTS: dict[str, Mutant] = {}


def mutant(name: str) -> Callable[[Mutant], Mutant]:
    def register(make: Mutant) -> Mutant:
        MUTANTS[name] = make
        return make

    return register


@mutant("bytes are not synced")
def _(patch: pytest.MonkeyPatch) -> None:
    def sync(self: PayloadFiles, file: HeldFile) -> OSError | None:
        self._entries.sync(file.born)
        return None

    patch.setattr(PayloadFiles, "_sync", sync)


@mutant("names are not synced")
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(DirectorySync, "sync", lambda self, born: None)


@mutant("a commit does not wait for the sync")
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PayloadFiles, "settle", lambda self, payload: None)


@mutant("a running directory sync serves those who come later")
def _(patch: pytest.MonkeyPatch) -> None:
    original = DirectorySync.sync

    def sync(self: DirectorySync, born: int) -> None:
        with self._turn:
            if self._running:
                running = self._begun
                while self._ended < running:
                    self._turn.wait()
                return
        original(self, born)

    patch.setattr(DirectorySync, "sync", sync)


@mutant("a failed sync is repeated")
def _(patch: pytest.MonkeyPatch) -> None:
    original = PayloadFiles.settle

    def settle(self: PayloadFiles, payload: FilePayload) -> None:
        if isinstance(payload, FilePayload) and self._settling(payload.file).result() is not None:
            payload.file.settled = None
        original(self, payload)

    patch.setattr(PayloadFiles, "settle", settle)


@mutant("a failed directory sync is forgotten")
def _(patch: pytest.MonkeyPatch) -> None:
    original = DirectorySync.sync

    def sync(self: DirectorySync, born: int) -> None:
        try:
            original(self, born)
        except OSError:
            self._failed = 0
            original(self, born)

    patch.setattr(DirectorySync, "sync", sync)


@mutant("sealed before the last bytes are written")
def _(patch: pytest.MonkeyPatch) -> None:
    finish = FileWriter._finish
    put = FileWriter._put
    last: dict[FileWriter, bytes] = {}

    def late_put(self: FileWriter, piece: memoryview, at: int) -> None:
        put(self, memoryview(last.pop(self, b"")), at)
        last[self] = bytes(piece)

    def early_finish(self: FileWriter) -> FilePayload:
        payload = finish(self)
        self._files._settling(payload.file).result()
        self._files.disk.write(payload.file.hold(), memoryview(last.pop(self)))
        payload.file.release()
        return payload

    patch.setattr(FileWriter, "_put", late_put)
    patch.setattr(FileWriter, "_finish", early_finish)


@mutant("files go before the commit that drops their rows")
def _(patch: pytest.MonkeyPatch) -> None:
    def hasty(name: str) -> None:
        original = getattr(Writing, name)

        def write(self: Writing, *args: Any) -> Any:
            result = original(self, *args)
            assert self._placing.files is not None
            self._placing.files.remove(args[-1].files)
            return result

        patch.setattr(Writing, name, write)

    for name in ("append", "snapshot", "unpin", "delete"):
        hasty(name)


@mutant("a snapshot is not read back before an older one goes")
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PayloadFiles, "verify", lambda self, payload: None)


@mutant("only the newest snapshot is kept")
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(writing_module, "KEPT_SNAPSHOTS", 1)


@mutant("the sweep does not ask for the rows")
def _(patch: pytest.MonkeyPatch) -> None:
    original = PayloadFiles.sweep
    patch.setattr(PayloadFiles, "sweep", lambda self, _: original(self, lambda _: False))


@mutant("the sweep takes what is in flight")
def _(patch: pytest.MonkeyPatch) -> None:
    def sweep(self: PayloadFiles, referenced: Callable[[str], bool]) -> list[str]:
        orphans = [n for n in self.disk.names(self.directory) if not referenced(n)]
        self.remove(orphans)
        return orphans

    patch.setattr(PayloadFiles, "sweep", sweep)


@mutant("nothing is swept")
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PayloadFiles, "sweep", lambda self, referenced: [])


@mutant("os files stay unsynced when the session is called clean")
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PayloadFiles, "flush", lambda self, names=None: None)


@mutant("bytes are not compared with the digest")
def _(patch: pytest.MonkeyPatch) -> None:
    def pieces(pread: Any, nbytes: int, *_: Any) -> Iterator[memoryview]:
        yield memoryview(pread(nbytes, 0))

    patch.setattr(files_module, "checked", pieces)


@pytest.mark.parametrize("name", MUTANTS)
def test_without_one_rule_a_promise_breaks(
    name: str, monkeypatch: pytest.MonkeyPatch, figure: Figure
) -> None:
    MUTANTS[name](monkeypatch)
    number = 0
    with (
        closing(states(1000, share=0.1, slow=0.4)) as checked,
        pytest.raises(Violation) as violation,
    ):
        for number in checked:
            assert number < ENOUGH, "nobody noticed"
    print(violation.value)
    figure(f"power loss, {name}: states until it shows", number + 1, "states")
