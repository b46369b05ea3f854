"""Going back: versions, rollback, fork at a version, pins, with retention in between."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from optserve.sessions import snapshots
from optserve.sessions.operations import Pin, Rollback, Unpin
from optserve.sessions.registry import Registry
from optserve.sessions.session import Session
from optserve_client.errors import Invalid, LineSearchOpen, OutOfSequence
from tests import local
from tests.local import NOBODY, Identity, arrays, create, exported, read_back, step

BODY: dict[str, Any] = {
    "optimizer": {"name": "Adam", "lr": 0.1},
    "scheduler": {"name": "ExponentialLR", "gamma": 0.9, "advance": "step"},
    "ema": {},
    "best": {},
}


@pytest.fixture
def made() -> Iterator[Registry]:
    with local.registry() as registry:
        yield registry


def frame_at(session: Session, seed: int) -> Any:
    """Step once more on a fork: what comes out depends on the whole state."""
    return [bytes(t) for t in local.params_of(step(session, arrays(seed), loss=1.0)).values()]


def versions(session: Session) -> list[int]:
    return [row["version"] for row in session.versions(-1, 1000)]


def do(session: Session, operation: Any, who: Identity = NOBODY) -> dict[str, Any]:
    scalars: dict[str, Any] = session.change(operation, who).result(30).scalars
    return scalars


def test_a_rollback_is_a_new_version_with_the_whole_state_of_the_old_one(made: Registry) -> None:
    session = create(made, BODY, arrays(0))
    for i in range(5):
        step(session, arrays(i), loss=1.0)
    made.fork("default", "a", {"id": "b", "version": 2}, NOBODY).result(30)
    reply = do(session, Rollback(version=2))
    assert (reply["version"], reply["applied_version"], reply["updates"]) == (6, 6, 2)
    assert reply["generation"] == session.generation
    assert read_back(session) == exported(session)
    assert frame_at(session, 9) == frame_at(made.get("default", "b"), 9)


def test_a_rollback_keeps_what_belongs_to_the_session(made: Registry) -> None:
    session = create(made, BODY, arrays(0))
    who = [Identity(worker="w", seq=i, digest=bytes([i])) for i in range(1, 5)]
    step(session, arrays(1), who[0])
    step(session, arrays(2), who[1])
    local.patch(session, {"name": "later", "ttl_s": 1000}, NOBODY).result(30)
    do(session, Rollback(version=0), who[2])
    assert do(session, Rollback(version=0), who[2])["duplicate"] is True
    assert step(session, arrays(1), who[0]).scalars["duplicate"] is True
    with pytest.raises(OutOfSequence):
        step(session, arrays(1), Identity(worker="w", seq=9))
    status = session.status().result(30)
    assert (status["name"], status["ttl_s"], status["version"]) == ("later", 1000, 3)


def test_a_rollback_ends_no_line_search_unasked(made: Registry) -> None:
    session = create(made, {"optimizer": "LBFGS"}, arrays(0))
    while not (reply := step(session, arrays(1), loss=1.0).scalars)["applied"]:
        assert reply["need"] == "evaluate"
    step(session, arrays(2), loss=0.5)
    with pytest.raises(LineSearchOpen):
        do(session, Rollback(version=0))
    session.change(Rollback(version=0), NOBODY, abandon=True).result(30)
    assert read_back(session) == exported(session)


@pytest.mark.parametrize("version", [-1, 6])
def test_a_version_out_of_bounds_is_refused_with_the_bounds(made: Registry, version: int) -> None:
    session = create(made, BODY, arrays(0))
    for i in range(5):
        step(session, arrays(i))
    before = exported(session)
    for operation in (
        Rollback(version=version),
        Pin(version=version, name="p"),
        Unpin(version=version),
    ):
        with pytest.raises(Invalid, match=rf"version must be in \[0, 5\], got {version}"):
            do(session, operation)
    assert exported(session) == before


def test_what_retention_dropped_is_refused_with_what_can_be_reached(
    made: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshots, "REPLAY_EVENTS", 4)
    session = create(made, BODY, arrays(0))
    for i in range(4):
        step(session, arrays(i))
    do(session, Pin(version=1, name="first"))
    for i in range(4, 14):
        step(session, arrays(i))
        session._held.snapshots.wait()
    reachable = versions(session)
    assert reachable[0] == 1
    assert reachable[1:] == list(range(reachable[1], 15))
    assert 3 < reachable[1] < 12
    gone = reachable[1] - 1
    with pytest.raises(Invalid) as caught:
        do(session, Rollback(version=gone))
    assert caught.value.detail == (
        f"version {gone} of session 'a' cannot be reached any more; 1, {reachable[1]}-14 can"
    )
    for version in reachable:  # each that is listed can be gone back to
        made.fork("default", "a", {"id": f"f{version}", "version": version}, NOBODY).result(30)
        fork = made.get("default", f"f{version}")
        assert fork.version == version
        assert fork.status().result(30)["updates"] == version


def test_a_pin_keeps_one_version_and_unpin_lets_it_go(
    made: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = create(made, BODY, arrays(0))
    for i in range(3):
        step(session, arrays(i))
    made.fork("default", "a", {"id": "b", "version": 2}, NOBODY).result(30)
    said = do(session, Pin(version=2, name="good"))
    assert said["pinned"] == {"version": 2, "pin": "good"}
    assert (said["version"], said["applied_version"]) == (3, None)
    monkeypatch.setattr(snapshots, "REPLAY_EVENTS", 3)
    for i in range(3, 15):
        step(session, arrays(i))
        session._held.snapshots.wait()
    row = session.versions(-1, 1)[0]
    assert (row["version"], row["pin"], row["snapshot"]) == (2, "good", True)
    do(session, Rollback(version=2))
    assert frame_at(session, 9) == frame_at(made.get("default", "b"), 9)
    do(session, Pin(version=2, name="better"))
    assert session.versions(-1, 1)[0]["pin"] == "better"
    do(session, Unpin(version=2))
    assert 2 not in versions(session)
    assert do(session, Unpin(version=2))["pinned"] == {"version": 2, "pin": None}
    assert read_back(session) == exported(session)


def test_pages_of_versions(made: Registry) -> None:
    session = create(made, BODY, arrays(0))
    for i in range(5):
        step(session, arrays(i))
    assert [row["version"] for row in session.versions(1, 2)] == [2, 3]
    assert session.versions(5, 10) == []
    assert [row["kind"] for row in session.versions(-1, 2)] == ["create", "step"]
