"""What else happens to a session while a round is open: it waits, is refused, or holds at once."""

from __future__ import annotations

import gc
import itertools
import json
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from optserve.sessions import housekeeping, snapshots
from optserve.sessions.membership import Register, Remove
from optserve.sessions.operations import Import, Pin, Rollback
from optserve.sessions.registry import Registry
from optserve.sessions.session import Session
from optserve.store import MemoryStore
from optserve.store.opening import open_store
from optserve_client import wire
from optserve_client.errors import (
    Conflict,
    Fenced,
    OptserveError,
    RoundFailed,
    SessionNotFound,
    SessionRewound,
    StaleGradient,
    WorkerNotFound,
)
from tests import local, rounds
from tests.local import NOBODY, Identity, arrays, create, exported
from tests.rounds import (
    Clock,
    Local,
    adamw,
    ended,
    mean,
    params,
    push,
    round_of,
    rows_of,
    sync,
    waits,
    who,
)
from tests.waiting import wait_until

OPEN = "round 1 is open, 1 workers have pushed; try again when it has ended"


@pytest.fixture
def both() -> Iterator[tuple[Registry, Clock]]:
    with rounds.registry() as made:
        yield made


@pytest.fixture
def made(both: tuple[Registry, Clock]) -> Registry:
    return both[0]


@pytest.fixture
def clock(both: tuple[Registry, Clock]) -> Clock:
    return both[1]


def workers(session: Session, **fields: Any) -> dict[str, Any]:
    """Return the session's ``workers`` with other fields."""
    return {**session.status().result(10)["config"]["workers"], **fields}


def patch_workers(session: Session, **fields: Any) -> None:
    local.patch(session, {"workers": workers(session, **fields)}).result(10)


# --- PATCH ---------------------------------------------------------------------------------------


def test_a_lower_count_closes_the_open_round(made: Registry) -> None:
    session, oracle = create(made, sync(4), arrays(0)), Local(arrays(0))
    replies = [push(session, name, 1, 0, i) for i, name in enumerate("ab", start=1)]
    patch_workers(session, count=3, quorum=3)
    assert all(map(waits, replies))
    patch_workers(session, count=2, quorum=2)
    oracle.step(mean([arrays(1), arrays(2)]))
    for reply in replies:
        told = ended(reply).scalars["round"]
        assert (told["closed_by"], told["missing"]) == ("count", 0)
        oracle.check(local.params_of(ended(reply)))
    assert round_of(session) is None
    rounds.read_back(session)


def test_a_count_below_those_that_have_pushed_closes_it_with_all_of_them(made: Registry) -> None:
    session = create(made, sync(4), arrays(0))
    replies = [push(session, name, 1, 0) for name in "abc"]
    patch_workers(session, count=1, quorum=1)
    told = ended(replies[0]).scalars["round"]
    assert (told["workers"], told["missing"]) == (["a", "b", "c"], 0)
    rounds.read_back(session)


def test_a_higher_count_waits_for_more(made: Registry) -> None:
    session = create(made, sync(2), arrays(0))
    first = push(session, "a", 1, 0)
    patch_workers(session, count=3, quorum=3)
    second = push(session, "b", 1, 0)
    assert waits(first)
    assert second.scalars["round"]["count"] == 3
    assert ended(push(session, "c", 1, 0)).scalars["round"]["workers"] == ["a", "b", "c"]
    rounds.read_back(session)


def test_another_deadline_holds_for_the_open_round(made: Registry, clock: Clock) -> None:
    session = create(made, sync(2, deadline_s=100), arrays(0))
    first = push(session, "a", 1, 0)
    patch_workers(session, deadline_s=10)
    clock.advance(9, session)
    assert waits(first)
    clock.advance(1, session)
    with pytest.raises(RoundFailed, match="after 10 s"):
        ended(first)
    second = push(session, "a", 1, 0)
    patch_workers(session, deadline_s=50)
    clock.advance(49, session)
    assert waits(second)
    clock.advance(1, session)
    with pytest.raises(RoundFailed, match="after 50 s"):
        ended(second)


def test_a_deadline_that_is_over_already_ends_the_round(made: Registry, clock: Clock) -> None:
    session = create(made, sync(2, quorum=1, deadline_s=100), arrays(0))
    first = push(session, "a", 1, 0)
    clock.advance(50, session)
    patch_workers(session, deadline_s=10)
    clock.advance(0, session)
    assert ended(first).scalars["round"]["closed_by"] == "deadline"


def test_a_lower_quorum_is_enough_at_the_deadline(made: Registry, clock: Clock) -> None:
    session = create(made, sync(3, deadline_s=10), arrays(0))
    first = push(session, "a", 1, 0)
    patch_workers(session, quorum=1)
    assert round_of(session)["quorum"] == 1  # type: ignore[index]
    clock.advance(10, session)
    assert ended(first).scalars["round"]["missing"] == 2


@pytest.mark.parametrize(
    "fields",
    [
        {"workers": None},
        {"workers": {"mode": "async"}},
        {"workers": {"mode": "sync", "count": 3, "reduce": "sum"}},
        {"workers": {"mode": "sync", "count": 3, "push": "deltas"}},
        {"workers": {"mode": "sync", "count": 3, "reduce": "trimmed_mean"}},
    ],
    ids=["none", "mode", "reduce", "push", "trim"],
)
def test_what_the_pushes_of_an_open_round_mean_does_not_change(
    made: Registry, fields: dict[str, Any]
) -> None:
    session = create(made, sync(3), arrays(0))
    push(session, "a", 1, 0)
    before = exported(session)
    with pytest.raises(Conflict) as caught:
        local.patch(session, fields).result(10)
    assert (caught.value.detail, caught.value.extra) == (OPEN, {"round": 1})
    assert exported(session) == before
    for name in "bc":
        reply = push(session, name, 1, 0)
    ended(reply)
    local.patch(session, fields).result(10)
    rounds.read_back(session)


def test_rounds_can_begin_and_end_with_a_patch(made: Registry) -> None:
    session = create(made, {"optimizer": {"name": "SGD", "lr": 0.5}}, arrays(0))
    oracle = Local(arrays(0))
    local.step(session, arrays(1), base_version=0)
    local.patch(session, {"workers": sync(2)["workers"]}).result(10)
    push(session, "a", 1, 1, 2)
    ended(push(session, "b", 1, 1, 3))
    local.patch(session, {"workers": {"mode": "async"}}).result(10)
    assert push(session, "a", 2, 1, 4).scalars["staleness"] == 1
    local.patch(session, {"workers": None}).result(10)
    last = local.step(session, arrays(5), base_version=3)
    for grads in (arrays(1), mean([arrays(2), arrays(3)]), arrays(4), arrays(5)):
        oracle.step(grads)
    oracle.check(local.params_of(last))
    rounds.read_back(session)


def test_a_push_that_was_on_its_way_when_the_mode_changed_is_refused_or_good(
    made: Registry,
) -> None:
    """What was read for one mode is taken in another one whole, or not at all."""
    big = {"w": np.ones((600, 600), "f4")}
    modes = [sync(1)["workers"], None, {"mode": "async"}, sync(1, push="deltas")["workers"]]
    for i, (before, after) in enumerate(itertools.permutations(modes, 2)):
        session = create(made, {"optimizer": "SGD", "workers": before}, big, f"s{i}")
        generation = session.generation
        deltas = before is not None and before.get("push") == "deltas"
        for binary in (True, False):
            kind = "delta" if deltas else "grad"
            fields = {"base_version": session.version}
            if binary:
                intake = session.intake(2**30)
                frame = wire.encode({f"{kind}/w": big["w"]}, {wire.META_KEY: json.dumps(fields)})
                for piece in frame:
                    intake.feed(piece)
                step = intake.finish()
            else:
                step = session.step_from_json({f"{kind}s": local.as_json(big), **fields}, b"x")
            local.patch(session, {"workers": after}).result(10)
            version = session.version
            try:
                reply = session.step(step, who("a", version + 1)).result(10)
                if reply.pending is not None:
                    reply = ended(reply)
            except Conflict:
                assert session.version == version
            else:
                assert reply.scalars["applied_version"] == version + 1
            local.patch(session, {"workers": before}).result(10)
        assert session.status().result(10)["generation"] == generation


# --- what is refused, and what is not ------------------------------------------------------------

REFUSED: dict[str, Callable[[Session], Any]] = {
    "params": lambda s: local.put_params(s, arrays(1)),
    "rollback": lambda s: s.change(Rollback(version=0), NOBODY),
    "import": lambda s: s.change(Import(data=exported(s)), NOBODY),
    "group": lambda s: local.add_group(s, {}, {"new": np.ones(2, "f4")}),
    "durability": lambda s: local.patch(s, {"durability": "os"}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_take_the_ground_from_under_the_pushes_is_refused(
    made: Registry, name: str
) -> None:
    body = {**sync(2), "durability": "memory"}
    session = create(made, body, arrays(0))
    push(session, "a", 1, 0)
    before = exported(session)
    with pytest.raises(Conflict) as caught:
        REFUSED[name](session).result(10)
    assert (caught.value.detail, caught.value.extra) == (OPEN, {"round": 1})
    assert exported(session) == before
    ended(push(session, "b", 1, 0))
    REFUSED[name](session).result(10)


def test_other_changes_hold_for_the_open_round(made: Registry) -> None:
    body = {
        **sync(2),
        "optimizer": {"name": "AdamW", "lr": 0.1},
        "scheduler": {"name": "StepLR", "step_size": 1},
    }
    session, oracle = create(made, body, arrays(0)), Local(arrays(0), adamw)
    first = push(session, "a", 1, 0, 1)
    local.patch(session, {"clip_grad_value": 0.25, "name": "n", "nonfinite": "skip"}).result(10)
    local.patch_group(session, 0, {"weight_decay": 0.5}).result(10)
    local.scheduler_step(session, None).result(10)
    local.put_metrics(session, 0, {"acc": 0.5}).result(10)
    local.put_scheduler(session, None).result(10)
    session.change(Pin(version=0, name="start"), NOBODY).result(10)
    assert waits(first)
    rounds.read_back(session)
    ended(push(session, "b", 1, 0, 2))
    group = oracle.optimizer.param_groups[0]
    group["weight_decay"], group["lr"] = 0.5, 0.1 * 0.1
    clipped = {n: np.clip(g, -0.25, 0.25) for n, g in mean([arrays(1), arrays(2)]).items()}
    group["lr"] = session.status().result(10)["groups"][0]["lr"]
    oracle.step(clipped)
    oracle.check(local.params_of(ended(first)))
    rounds.read_back(session)


# --- the past ------------------------------------------------------------------------------------


def closed(session: Session, version: int) -> None:
    """Make one more round of two."""
    push(session, "a", version + 1, version, 2 * version)
    ended(push(session, "b", version + 1, version, 2 * version + 1))


def test_a_fork_in_an_open_round_has_none_of_its_pushes(made: Registry) -> None:
    session = create(made, sync(2), arrays(0))
    closed(session, 0)
    push(session, "a", 2, 1, 2)
    for name, fields in (("now", {}), ("then", {"version": 1}), ("first", {"version": 0})):
        made.fork("default", "a", {"id": name, **fields}, NOBODY).result(10)
        fork = made.get("default", name)
        assert round_of(fork) is None
        assert rows_of(fork) == {}
        version = fields.get("version", 1)
        push(fork, "a", 1, version, 2)
        reply = ended(push(fork, "b", 1, version, 3))
        assert reply.scalars["round"]["number"] == 1
        rounds.read_back(fork)
    ended(push(session, "b", 2, 1, 3))
    for name in ("now", "then"):
        local.assert_equal(params(made.get("default", name)), tensors(session))


def tensors(session: Session) -> dict[str, torch.Tensor]:
    return {n: torch.tensor(p) for n, p in params(session).items()}


def test_a_round_is_one_version_that_can_be_gone_back_to(made: Registry) -> None:
    session = create(made, sync(2), arrays(0))
    seen = [tensors(session)]
    for version in range(3):
        closed(session, version)
        seen.append(tensors(session))
    assert [(row["version"], row["kind"]) for row in session.versions(-1, 100)] == [
        (0, "create"),
        (1, "close"),
        (2, "close"),
        (3, "close"),
    ]
    session.change(Rollback(version=1), NOBODY).result(10)
    local.assert_equal(params(session), seen[1])
    assert session.version == 4
    with pytest.raises(StaleGradient):
        push(session, "a", 4, 3)
    push(session, "a", 4, 4, 2)
    ended(push(session, "b", 4, 4, 3))
    local.assert_equal(params(session), seen[2])
    rounds.read_back(session)


def test_a_pin_in_an_open_round_is_of_the_version_without_its_pushes(made: Registry) -> None:
    session = create(made, sync(2), arrays(0))
    closed(session, 0)
    before = tensors(session)
    push(session, "a", 2, 1, 2)
    session.change(Pin(version=1, name="p"), NOBODY).result(10)
    rounds.read_back(session)
    ended(push(session, "b", 2, 1, 3))
    made.fork("default", "a", {"id": "f", "version": 1}, NOBODY).result(10)
    local.assert_equal(params(made.get("default", "f")), before)
    assert round_of(made.get("default", "f")) is None
    rounds.read_back(session)


def test_an_export_in_an_open_round_takes_its_pushes_for_failed(made: Registry) -> None:
    session = create(made, sync(2), arrays(0))
    closed(session, 0)
    push(session, "a", 2, 1, 2)
    data = exported(session)
    made.import_session("default", "copy", data, NOBODY).result(10)
    copy = made.get("default", "copy")
    assert round_of(copy) is None
    assert push(copy, "b", 1, 0, 1).scalars["duplicate"] is True
    again = push(copy, "a", 2, 1, 2)
    assert again.scalars["duplicate"] is False
    ended(push(session, "b", 2, 1, 3))
    ended(push(copy, "b", 2, 1, 3))
    local.assert_equal(params(copy), tensors(session))
    assert push(session, "a", 2, 1, 2).scalars["duplicate"] is True


def test_no_snapshot_is_taken_inside_of_a_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshots, "REPLAY_EVENTS", 1)
    made, _ = opened(tmp_path)
    session = create(made, sync(3), arrays(0))
    for version in range(4):
        for name in "abc":
            reply = push(session, name, version + 1, version, version)
            session.snapshot().result(10)
            session._held.snapshots.wait()
            rounds.read_back(session)
        ended(reply)
        kinds = {e.lsn: e.kind for e in made.store.events(session.key, payloads=False)}
        assert {kinds[row.lsn] for row in made.store.snapshots(session.key)} == {"close"}
    made.close()


# --- memory, time to live, deletion --------------------------------------------------------------


def test_a_session_with_an_open_round_is_not_put_away(made: Registry) -> None:
    session = create(made, sync(2), arrays(0))
    push(session, "a", 1, 0)
    assert session.put_away() is False
    ended(push(session, "b", 1, 0))
    assert session.put_away() is True
    push(session, "a", 2, 1)
    assert round_of(session)["number"] == 2  # type: ignore[index]
    rounds.read_back(session)


def test_deleting_the_session_tells_who_waits(made: Registry) -> None:
    session = create(made, sync(2), arrays(0))
    waiting = push(session, "a", 1, 0)
    made.delete("default", "a", NOBODY).result(10)
    with pytest.raises(SessionNotFound, match="session 'a' was deleted"):
        ended(waiting)


def test_who_waits_is_told_when_the_time_to_live_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(housekeeping, "LOOK_S", 0.05)
    made = Registry(MemoryStore(), threads=torch.get_num_threads())
    try:
        session = create(made, {**sync(2), "ttl_s": 0.05}, arrays(0))
        waiting = push(session, "a", 1, 0)
        with pytest.raises(SessionNotFound):
            ended(waiting)
        with pytest.raises(SessionNotFound):
            made.get("default", "a")
    finally:
        made.close()


def test_an_alarm_does_not_keep_a_deleted_session(made: Registry, clock: Clock) -> None:
    session = create(made, sync(2), arrays(0))
    push(session, "a", 1, 0)
    kept = weakref.ref(session)
    made.delete("default", "a", NOBODY).result(10)
    del session
    gc.collect()
    assert kept() is None
    clock.advance(rounds.LATE_S)


def test_alarms_do_not_pile_up(made: Registry, clock: Clock) -> None:
    session = create(made, sync(2, deadline_s=10), arrays(0))
    for version in range(50):
        closed(session, version)
        clock.advance(1, session)
        assert clock.pending <= 1
    push(session, "a", 51, 50)
    clock.advance(9.5, session)
    assert round_of(session) is not None
    clock.advance(0.5, session)
    assert round_of(session) is None
    assert clock.pending == 0


def test_a_real_alarm_ends_a_round() -> None:
    made = Registry(MemoryStore(), threads=torch.get_num_threads())
    try:
        session = create(made, sync(2, quorum=1, deadline_s=0.05), arrays(0))
        first = push(session, "a", 1, 0)
        assert ended(first).scalars["round"]["closed_by"] == "deadline"
        # Nobody is there when the next one ends.
        push(session, "a", 2, 1, wait_s=0)
        wait_until(lambda: session.version == 2, "the end of the round")
    finally:
        made.close()


# --- a stop, and a start -------------------------------------------------------------------------


def opened(path: Path) -> tuple[Registry, Clock]:
    clock = Clock()
    store = open_store(url=None, data_dir=path, files=None)
    return Registry(store, threads=torch.get_num_threads(), alarms=clock), clock


@pytest.mark.parametrize("durability", ["always", "os"])
@pytest.mark.parametrize("shapes", [local.SHAPES, {"w": (200, 200)}], ids=["inline", "files"])
def test_an_open_round_goes_on_after_a_restart(
    tmp_path: Path, durability: str, shapes: dict[str, tuple[int, ...]]
) -> None:
    body = {**sync(3, deadline_s=30), "durability": durability}
    grads = [arrays(i, shapes) for i in range(4)]
    made, clock = opened(tmp_path)
    session, oracle = create(made, body, grads[0]), Local(grads[0])
    push(session, "b", 1, 0, grads[1])
    clock.advance(1)
    push(session, "a", 1, 0, grads[2])
    before = round_of(session)
    made.close()
    made, clock = opened(tmp_path)
    clock.time += 5
    try:
        session = made.get("default", "a")
        assert round_of(session) == before
        repeat = push(session, "b", 1, 0, grads[1])
        assert repeat.scalars["duplicate"] is True
        reply = push(session, "c", 1, 0, grads[3])
        oracle.step(mean([grads[2], grads[1], grads[3]]))
        oracle.check(local.params_of(ended(reply)))
        oracle.check(local.params_of(ended(repeat)))
        rounds.read_back(session)
        clock.advance(1000, session)
        push(session, "a", 2, 1, grads[1])
    finally:
        made.close()
    made, clock = opened(tmp_path)
    try:  # the deadline passed while nobody was there: the first look ends it
        session = made.get("default", "a")
        clock.time += 1 + 5 + 1000 + 31
        assert round_of(session) is not None
        clock.advance(0, session)
        assert round_of(session) is None
        assert push(session, "a", 2, 1, grads[3]).scalars["duplicate"] is False
    finally:
        made.close()


def test_a_stop_fails_the_open_round_of_a_session_that_is_in_memory_alone(tmp_path: Path) -> None:
    made, _ = opened(tmp_path)
    session = create(made, {**sync(2), "durability": "memory"}, arrays(0))
    closed(session, 0)
    start = tensors(session)
    waiting = push(session, "a", 2, 1)
    made.close()
    with pytest.raises(RoundFailed, match="round 2 failed: the server stops"):
        ended(waiting)
    made, _ = opened(tmp_path)
    try:
        session = made.get("default", "a")
        local.assert_equal(params(session), start)
        assert round_of(session) is None
        assert session.status().result(10)["generation"] == session.generation
        again = push(session, "a", 2, 1)
        assert again.scalars["round"]["number"] == 3
        ended(push(session, "b", 2, 1))
    finally:
        made.close()


def test_after_a_kill_a_session_in_memory_alone_has_lost_its_open_round(tmp_path: Path) -> None:
    made, _ = opened(tmp_path)
    session = create(made, {**sync(2), "durability": "memory"}, arrays(0))
    push(session, "a", 1, 0)
    generation = session.generation
    made.store.close()
    again, _ = opened(tmp_path)
    try:
        session = again.get("default", "a")
        assert round_of(session) is None
        assert session.generation != generation
        with pytest.raises(SessionRewound):
            push(session, "a", 2, 0)
        assert push(session, "a", 1, 0).scalars["duplicate"] is False
    finally:
        again.close()
        with pytest.raises(OptserveError):
            made.store.session(session.key)


# --- all at once ---------------------------------------------------------------------------------


def test_workers_on_threads_of_their_own_make_the_same_params(tmp_path: Path) -> None:
    """Each pushes, some twice at the same time, while the state is dropped under them."""
    made = Registry(
        open_store(url=None, data_dir=tmp_path, files=None), threads=torch.get_num_threads()
    )
    names, last = ["w0", "w1", "w10", "w2"], 30
    session, oracle = create(made, {**sync(4), "durability": "os"}, arrays(0)), Local(arrays(0))

    def work(index: int) -> list[int]:
        versions = []
        for version in range(last):
            seed = 10 * version + index
            replies = [push(session, names[index], version + 1, version, seed)]
            if (version + index) % 3 == 0:
                replies.append(push(session, names[index], version + 1, version, seed))
            if (version + index) % 7 == 0:
                session.in_turn(session._held.drop).result(10)
            for reply in replies:
                told = ended(reply) if reply.pending is not None else reply
                versions.append(told.scalars["applied_version"])
        return versions

    try:
        with ThreadPoolExecutor(4) as threads:
            told = list(threads.map(work, range(4)))
        for version in range(last):
            oracle.step(mean([arrays(10 * version + i) for i in range(4)]))
        oracle.check(params(session))
        assert {row["contributions"] for row in rows_of(session).values()} == {last}
        assert [sorted(set(versions)) for versions in told] == [list(range(1, last + 1))] * 4
        rounds.read_back(session)
    finally:
        made.close()


# --- workers come and go -------------------------------------------------------------------------


def register(session: Session, name: str, key: str | None = None) -> dict[str, Any]:
    told = NOBODY if key is None else Identity(key=key, digest=name.encode())
    scalars: dict[str, Any] = session.change(Register(worker=name), told).result(10).scalars
    return scalars


def remove(session: Session, name: str) -> dict[str, Any]:
    scalars: dict[str, Any] = session.change(Remove(worker=name), NOBODY).result(10).scalars
    return scalars


def test_a_registration_gives_the_next_epoch_once(made: Registry) -> None:
    session = create(made, sync(2), arrays(0))
    told = register(session, "w", "k1")
    assert (told["epoch"], told["last_seq"], told["worker"]) == (1, 0, "w")
    assert (told["version"], told["applied_version"], told["duplicate"]) == (0, None, False)
    assert register(session, "w", "k1") == {**told, "duplicate": True}
    assert register(session, "w", "k2")["epoch"] == 2
    rounds.read_back(session)
    assert register(session, "w", "k2")["epoch"] == 2
    assert register(session, "w")["epoch"] == 3


def test_who_was_known_by_a_push_is_in_epoch_1(made: Registry) -> None:
    session = create(made, sync(2), arrays(0))
    push(session, "w", 1, 0)
    assert register(session, "w")["epoch"] == 2


def test_an_older_namesake_is_fenced_and_its_push_stays_in(made: Registry) -> None:
    session, oracle = create(made, sync(2), arrays(0)), Local(arrays(0))
    old = push(session, "w", 1, 0, 1, epoch=1)
    register(session, "w")
    with pytest.raises(Fenced) as fenced:
        push(session, "w", 1, 0, 1, epoch=1)
    assert fenced.value.extra == {"epoch": 2, "last_seq": 0}
    # The new one has a push in this round, though it did not send it.
    with pytest.raises(Conflict, match="has pushed into round 1 already"):
        push(session, "w", 1, 0, 7, epoch=2)
    reply = push(session, "x", 1, 0, 2)
    oracle.step(mean([arrays(1), arrays(2)]))
    oracle.check(local.params_of(ended(reply)))
    assert ended(old).scalars["applied_version"] == 1
    rounds.read_back(session)
    assert push(session, "w", 1, 1, 7, epoch=2).scalars["duplicate"] is False
    rounds.read_back(session)


def test_a_failed_round_releases_nothing_of_a_later_epoch(made: Registry, clock: Clock) -> None:
    session = create(made, sync(2, deadline_s=10), arrays(0))
    push(session, "w", 1, 0, 1)
    register(session, "w")
    local.patch(session, {"name": "n"}, who("w", 1, "patch")).result(10)
    clock.advance(10, session)
    assert round_of(session) is None
    repeat = local.patch(session, {"name": "n"}, who("w", 1, "patch")).result(10)
    assert repeat.scalars["duplicate"] is True
    rounds.read_back(session)


def test_a_removed_worker_is_fenced_and_its_push_stays_in(made: Registry) -> None:
    session = create(made, sync(2), arrays(0))
    first = push(session, "w", 1, 0, 1)
    told = remove(session, "w")
    assert (told["worker"], told["epoch"], told["removed"]) == ("w", 1, True)
    assert rows_of(session) == {}
    for seq in (1, 2):
        with pytest.raises(Fenced, match="was removed; it has to register again"):
            push(session, "w", seq, 0, 1)
    with pytest.raises(WorkerNotFound):
        remove(session, "w")
    ended(push(session, "x", 1, 0))
    assert ended(first).scalars["round"]["workers"] == ["w", "x"]
    rounds.read_back(session)
    register(session, "w")
    assert push(session, "w", 1, 1, epoch=2).scalars["duplicate"] is False
    assert rows_of(session)["w"]["contributions"] == 2


def test_the_list_says_who_is_how_far(made: Registry, clock: Clock) -> None:
    session = create(made, sync(2), arrays(0))
    began = clock.time
    closed(session, 0)
    closed(session, 1)
    register(session, "new")
    push(session, "a", 3, 2)
    rows = rows_of(session)
    assert list(rows) == ["a", "b", "new"]
    assert rows["a"]["last_seen"] >= began
    want = {
        "a": (1, 3, 2, 0, 3),
        "b": (1, 2, 1, 1, 2),
        "new": (1, 0, None, None, 0),
    }
    fields = ("epoch", "last_seq", "version", "staleness", "contributions")
    assert {n: tuple(row[f] for f in fields) for n, row in rows.items()} == want


def test_a_worker_that_leaves_and_one_that_joins_between_two_rounds(made: Registry) -> None:
    session, oracle = create(made, sync(2), arrays(0)), Local(arrays(0))
    closed(session, 0)
    oracle.step(mean([arrays(0), arrays(1)]))
    remove(session, "b")
    register(session, "c")
    push(session, "c", 1, 1, 5)
    reply = push(session, "a", 2, 1, 4)
    oracle.step(mean([arrays(4), arrays(5)]))
    oracle.check(local.params_of(ended(reply)))
    rounds.read_back(session)
