"""Durability ``memory``, large gradients: nothing on disk, an honest answer after a failure."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optserve.optim.engine import Engine
from optserve.sessions import operations
from optserve.sessions.identity import Identity
from optserve.sessions.journaling import KEPT_BYTES
from optserve.sessions.registry import Registry
from optserve.sessions.session import Session
from optserve.store.opening import open_store
from optserve_client import wire
from optserve_client.errors import Internal, Invalid, SchedulerFailed, SessionRewound

LARGE = KEPT_BYTES // 4 + 1000
SMALL = 1000


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    registry = Registry(open_store(url=None, data_dir=tmp_path, files=None))
    yield registry
    registry.close()


def create(registry: Registry, size: int, **fields: Any) -> Session:
    body = {"optimizer": {"name": "SGD", "lr": 0.5}, "durability": "memory", **fields}
    params = {"w": np.zeros(size, "<f4")}
    registry.create("t", "s", body, params, ["w"], Identity(), exist_ok=False).result()
    return registry.get("t", "s")


def step(session: Session, seq: int, **fields: Any) -> dict[str, Any]:
    size = session.layout.numel
    frame = wire.encode({"grad/w": np.ones(size, "<f4")}, {wire.META_KEY: json.dumps(fields)})
    intake = session.intake(2**30)
    for piece in frame:
        intake.feed(piece)
    taken = intake.finish()
    identity = Identity(worker="w", epoch=1, seq=seq, digest=taken.digest)
    return session.step(taken, identity).result().scalars


def params(session: Session) -> Any:
    return session.published().result().arrays()["w"]


def break_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the next update fail after it has changed the params."""
    original = Engine._update

    def update(self: Engine, *args: Any) -> Any:
        monkeypatch.setattr(Engine, "_update", original)
        self.params.flat.add_(7.0)
        raise Internal("out of luck")

    monkeypatch.setattr(Engine, "_update", update)


def test_a_large_gradient_leaves_nothing_on_disk(registry: Registry, tmp_path: Path) -> None:
    session = create(registry, LARGE)
    before = {path: path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()}
    for seq in range(1, 6):
        step(session, seq)
    after = {path: path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()}
    assert sum(after.values()) - sum(before.values()) < LARGE
    assert [row["version"] for row in session.versions(-1, 100)] == [0]


def test_after_a_failed_update_a_large_session_says_that_it_went_back(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = create(registry, LARGE)
    step(session, 1)
    generation = session.generation
    session.snapshot().result()
    step(session, 2)
    break_once(monkeypatch)
    with pytest.raises(Internal):
        step(session, 3)
    assert (params(session) == -0.5).all()  # as of the snapshot
    assert session.version == 1
    assert session.generation != generation
    with pytest.raises(SessionRewound) as caught:
        step(session, 3)
    assert caught.value.extra["generation"] == session.generation
    assert step(session, 2)["version"] == 2


def test_after_a_failed_update_a_small_session_is_as_it_was(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = create(registry, SMALL)
    step(session, 1)
    step(session, 2)
    generation = session.generation
    break_once(monkeypatch)
    with pytest.raises(Internal):
        step(session, 3)
    assert (params(session) == -1.0).all()
    assert session.generation == generation
    assert step(session, 3)["version"] == 3


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_a_schedule_that_cannot_go_on_costs_nothing(registry: Registry, size: int) -> None:
    schedule = {"name": "LambdaLR", "lr_lambda": "1 / (4 - epoch)", "advance": "step"}
    session = create(registry, size, scheduler=schedule)
    for seq in (1, 2, 3):
        step(session, seq)
    generation, before = session.generation, params(session).copy()
    for _ in range(2):
        with pytest.raises(SchedulerFailed):
            step(session, 4)
    assert session.generation == generation
    assert session.version == 3
    np.testing.assert_array_equal(params(session), before)


def test_versions_between_snapshots_cannot_be_reached(registry: Registry) -> None:
    session = create(registry, LARGE)
    for seq in range(1, 4):
        step(session, seq)
    with pytest.raises(Invalid, match="version 2 of session 's' cannot be reached any more; 0"):
        session.run(lambda state: session.state_at(2, state)).result()


def test_hardening_a_session_keeps_what_it_has(registry: Registry) -> None:
    session = create(registry, LARGE)
    step(session, 1)
    patch = operations.Patch(config={"durability": "always"})
    session.change(patch, Identity(worker="w", epoch=1, seq=2, digest=b"x")).result()
    step(session, 3)
    assert session.put_away()
    assert (params(session) == -1.0).all()
