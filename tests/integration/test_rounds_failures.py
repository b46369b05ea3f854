"""The store fails at any commit of a round: nobody hangs, a repeat tells the truth, it ends."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
import torch

from optserve.sessions.gathering import AGAIN_S
from optserve.sessions.registry import Registry
from optserve.sessions.session import Session
from optserve.store.opening import open_store
from optserve_client.errors import (
    Misdirected,
    OptserveError,
    OutOfSpace,
    RoundFailed,
    Unavailable,
)
from tests import local, rounds
from tests.local import arrays, create, exported
from tests.rounds import (
    Clock,
    Local,
    ended,
    future_of,
    mean,
    params,
    push,
    round_of,
    rows_of,
    sync,
    waits,
    who,
)
from tests.stores import Faulty

#: What goes wrong, and what a request is told.
FAULTS: dict[str, type[OptserveError]] = {
    "lost": Unavailable,
    "refused": Unavailable,
    "full": OutOfSpace,
}
SHAPES = {"inline": local.SHAPES, "files": {"w": (200, 200)}}


class Place:
    """A session over a store that fails when it is told to."""

    def __init__(self, path: Path, size: str) -> None:
        self.shapes = SHAPES[size]
        self.store = Faulty(open_store(url=None, data_dir=path, files=None))
        self.clock = Clock()
        self.registry = Registry(
            self.store,  # type: ignore[arg-type]
            threads=torch.get_num_threads(),
            alarms=self.clock,
        )
        self.oracle = Local(self.grads(0))

    def session(self, count: int, **fields: Any) -> Session:
        return create(self.registry, sync(count, **fields), self.grads(0))

    def grads(self, seed: int) -> local.Arrays:
        return arrays(seed, self.shapes)

    def push(self, session: Session, name: str, seq: int, base: int, seed: int) -> Any:
        return push(session, name, seq, base, self.grads(seed))

    def fails(self, session: Session, error: type[OptserveError], *told: Any) -> None:
        with pytest.raises(error):
            self.push(session, *told)

    def check(self, session: Session, *seeds: int) -> None:
        """The session made one update of the pushes with these seeds, in this order."""
        self.oracle.step(mean([self.grads(seed) for seed in seeds]))
        self.oracle.check(params(session))
        assert not self.store.faults
        rounds.read_back(session)


@pytest.fixture(params=SHAPES)
def place(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Place]:
    with structlog.testing.capture_logs():
        made = Place(tmp_path, request.param)
        yield made
        made.registry.close()


# --- a contribution ------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", FAULTS)
def test_a_push_whose_commit_fails_is_counted_once(place: Place, fault: str) -> None:
    session = place.session(2)
    place.store.faults = [("contribution", fault)]
    place.fails(session, FAULTS[fault], "a", 1, 0, 1)
    assert (round_of(session) is not None) is (fault == "lost")
    repeat = place.push(session, "a", 1, 0, 1)
    assert repeat.scalars["duplicate"] is (fault == "lost")
    last = place.push(session, "b", 1, 0, 2)
    for reply in (repeat, last):
        assert ended(reply).scalars["applied_version"] == 1
    place.check(session, 1, 2)
    assert rows_of(session)["a"]["contributions"] == 1


@pytest.mark.parametrize("fault", FAULTS)
def test_a_push_whose_commit_fails_keeps_nobody_else_from_waiting(place: Place, fault: str) -> None:
    session = place.session(2)
    first = place.push(session, "b", 1, 0, 2)
    place.store.faults = [("contribution", fault)]
    place.fails(session, FAULTS[fault], "a", 1, 0, 1)
    assert waits(first)
    if fault == "lost":  # the round is full, though nobody was told
        place.clock.advance(0, session)
        assert session.workers().result(10)
        place.clock.advance(0, session)
        assert ended(first).scalars["applied_version"] == 1
        assert place.push(session, "a", 1, 0, 1).scalars["applied_version"] == 1
    else:
        ended(place.push(session, "a", 1, 0, 1))
        assert ended(first).scalars["applied_version"] == 1
    place.check(session, 1, 2)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_push_whose_commit_fails_does_not_hold_the_round_open(place: Place, fault: str) -> None:
    session = place.session(3, quorum=1, deadline_s=10)
    first = place.push(session, "b", 1, 0, 2)
    place.store.faults = [("contribution", fault)]
    place.fails(session, FAULTS[fault], "a", 1, 0, 1)
    place.clock.advance(10, session)
    told = ended(first).scalars["round"]
    assert told["workers"] == (["a", "b"] if fault == "lost" else ["b"])
    place.check(session, *((1, 2) if fault == "lost" else (2,)))


# --- a close -------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", FAULTS)
def test_a_close_that_fails_is_told_to_all_and_done_by_the_next_repeat(
    place: Place, fault: str
) -> None:
    session = place.session(2)
    first = place.push(session, "a", 1, 0, 1)
    place.store.faults = [("close", fault)]
    place.fails(session, FAULTS[fault], "b", 1, 0, 2)
    with pytest.raises(FAULTS[fault]):
        ended(first)
    repeats = [place.push(session, name, 1, 0, seed) for name, seed in (("a", 1), ("b", 2))]
    for repeat in repeats:
        told = ended(repeat) if repeat.pending else repeat
        assert told.scalars["duplicate"] is True
        assert told.scalars["applied_version"] == 1
        assert told.scalars["round"]["workers"] == ["a", "b"]
    assert session.version == 1
    place.check(session, 1, 2)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_close_that_fails_is_done_later_if_nobody_repeats(place: Place, fault: str) -> None:
    session = place.session(2)
    place.push(session, "a", 1, 0, 1)
    place.store.faults = [("close", fault), ("close", fault), ("close", fault)]
    place.fails(session, FAULTS[fault], "b", 1, 0, 2)
    if fault == "lost":
        place.store.faults = []
    for _ in range(3):
        place.clock.advance(AGAIN_S, session)
    assert session.version == 1
    place.check(session, 1, 2)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_close_that_fails_at_the_deadline_is_done_later(place: Place, fault: str) -> None:
    session = place.session(3, quorum=2, deadline_s=10)
    waiting = [place.push(session, "a", 1, 0, 1), place.push(session, "b", 1, 0, 2)]
    place.store.faults = [("close", fault)]
    place.clock.advance(10, session)
    for reply in waiting:
        with pytest.raises(FAULTS[fault]):
            ended(reply)
    repeat = place.push(session, "a", 1, 0, 1)
    place.clock.advance(AGAIN_S, session)
    told = ended(repeat) if repeat.pending else repeat
    assert (told.scalars["duplicate"], told.scalars["applied_version"]) == (True, 1)
    assert told.scalars["round"]["closed_by"] == "deadline"
    assert session.version == 1
    place.check(session, 1, 2)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_patch_whose_close_fails_is_made_and_the_round_closes_later(
    place: Place, fault: str
) -> None:
    session = place.session(3)
    first = place.push(session, "a", 1, 0, 1)
    place.push(session, "b", 1, 0, 2)
    place.store.faults = [("close", fault)]
    fields = {"workers": sync(2)["workers"]}
    with pytest.raises(FAULTS[fault]):
        local.patch(session, fields, who("p", 1)).result(10)
    with pytest.raises(FAULTS[fault]):
        ended(first)
    assert local.patch(session, fields, who("p", 1)).result(10).scalars["duplicate"] is True
    place.clock.advance(AGAIN_S, session)
    assert session.version == 1
    place.check(session, 1, 2)


def test_a_push_that_waits_longer_than_the_store_fails_is_answered(place: Place) -> None:
    session = place.session(2, deadline_s=1000)
    place.push(session, "a", 1, 0, 1)
    place.store.faults = [("close", "refused")] * 5
    place.fails(session, Unavailable, "b", 1, 0, 2)
    for _ in range(4):  # each repeat tries to close it
        place.fails(session, Unavailable, "b", 1, 0, 2)
    assert ended(place.push(session, "b", 1, 0, 2)).scalars["applied_version"] == 1
    place.check(session, 1, 2)


# --- a failed round ------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", FAULTS)
def test_a_round_that_cannot_even_fail_does_so_later(place: Place, fault: str) -> None:
    session = place.session(2, deadline_s=10)
    waiting = place.push(session, "a", 1, 0, 1)
    place.store.faults = [("fail", fault), ("fail", fault)]
    place.clock.advance(10, session)
    if fault == "lost":
        place.store.faults = []
    place.clock.advance(AGAIN_S, session)
    place.clock.advance(AGAIN_S, session)
    # Where the failure is in the journal and nobody knew, its push is sent again.
    with pytest.raises(Unavailable if fault == "lost" else RoundFailed):
        ended(waiting)
    assert round_of(session) is None
    repeat = place.push(session, "a", 1, 0, 1)
    assert repeat.scalars["duplicate"] is False
    assert repeat.scalars["round"]["number"] == 2
    ended(place.push(session, "b", 1, 0, 2))
    place.check(session, 1, 2)


# --- the journal cannot be read, or is another's -------------------------------------------------


def test_a_round_ends_once_the_journal_can_be_read_again(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = place.session(2, quorum=1, deadline_s=10)
    waiting = place.push(session, "a", 1, 0, 1)
    session.in_turn(session._held.drop).result(10)

    def unreadable(*_: Any, **__: Any) -> Any:
        raise Unavailable("the medium failed")

    with monkeypatch.context() as patch:
        patch.setattr(place.store._store, "events", unreadable)
        place.clock.advance(10, session)
        place.clock.advance(AGAIN_S, session)
        assert waits(waiting)
    place.clock.advance(AGAIN_S, session)
    assert ended(waiting).scalars["applied_version"] == 1
    place.check(session, 1)


def test_a_push_that_rots_in_the_journal_fails_its_round(tmp_path: Path) -> None:
    place = Place(tmp_path, "files")
    try:
        session = place.session(2)
        before = set(tmp_path.rglob("*"))
        waiting = place.push(session, "a", 1, 0, 1)
        [file] = [p for p in set(tmp_path.rglob("*")) - before if p.stat().st_size > 100_000]
        data = bytearray(file.read_bytes())
        data[50_000] ^= 1
        file.write_bytes(data)
        last = place.push(session, "b", 1, 0, 2)
        for reply in (waiting, last):
            with pytest.raises(RoundFailed, match=r"round 1 failed: .*digest"):
                ended(reply)
        rounds.read_back(session)
        for name, seed in (("a", 1), ("b", 2)):
            again = place.push(session, name, 1, 0, seed)
        assert ended(again).scalars["round"]["number"] == 2
        place.check(session, 1, 2)
    finally:
        place.registry.close()


def test_who_waits_at_an_owner_that_was_replaced_is_told(place: Place) -> None:
    session = place.session(3, quorum=1, deadline_s=10)
    waiting = place.push(session, "a", 1, 0, 1)
    place.store.claim(session.key)
    place.fails(session, Misdirected, "b", 1, 0, 2)
    place.clock.advance(10, session)
    with pytest.raises(Misdirected):
        ended(waiting)


def test_a_failure_of_ours_in_a_close_fails_the_round(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = place.session(2)
    first = place.push(session, "a", 1, 0, 1)
    with monkeypatch.context() as patch:
        patch.setattr("optserve.optim.engine.combine", lambda *_: 1 / 0)
        last = place.push(session, "b", 1, 0, 2)
    for reply in (first, last):
        with pytest.raises(RoundFailed, match="ZeroDivisionError"):
            ended(reply)
    for name, seed in (("a", 1), ("b", 2)):
        again = place.push(session, name, 1, 0, seed)
    assert ended(again).scalars["applied_version"] == 1
    place.check(session, 1, 2)


# --- a stop --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SHAPES)
def test_a_stop_in_the_middle_of_a_round_loses_nothing(tmp_path: Path, size: str) -> None:
    place = Place(tmp_path, size)
    session = place.session(2)
    waiting = place.push(session, "a", 1, 0, 1)
    before = exported(session), round_of(session)
    place.registry.close()
    assert not future_of(waiting).done()  # the HTTP layer says that the server stops
    store = open_store(url=None, data_dir=tmp_path, files=None)
    with rounds.registry(store) as (made, _):
        session = made.get("default", "a")
        session.load().result(10)
        assert (exported(session), round_of(session)) == before
        assert place.push(session, "a", 1, 0, 1).scalars["duplicate"] is True
        ended(place.push(session, "b", 1, 0, 2))
        place.check(session, 1, 2)
