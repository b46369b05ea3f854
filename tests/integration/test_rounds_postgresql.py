"""Rounds whose pushes lie in PostgreSQL, in parts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from optserve.sessions.registry import Registry
from optserve.store.opening import open_store
from tests import local
from tests.local import Identity, arrays, as_json, exported, read_back
from tests.postgres import shared_cluster

#: 5 MB: more than one part.
SHAPES = {"w": (1300, 1000), "b": (7,)}
BODY = {"optimizer": {"name": "Adam", "lr": 0.1}, "workers": {"mode": "sync", "count": 2}}


@pytest.fixture
def url() -> Iterator[str]:
    cluster = shared_cluster()
    with cluster.database() as name:
        yield cluster.url(name)


def test_an_open_round_survives_a_restart_and_closes(url: str, tmp_path: Path) -> None:
    def opened() -> Registry:
        return Registry(open_store(url=url, data_dir=tmp_path, files=None), threads=1)

    def push(made: Registry, worker: str, seq: int) -> local.Reply:
        session = made.get("default", "a")
        session.load().result(60)
        body = {"grads": as_json(arrays(hash_of(worker, seq), SHAPES)), "base_version": seq - 1}
        who = Identity(worker=worker, seq=seq, digest=f"{worker} {seq}".encode())
        return session.step(session.step_from_json(body, who.digest), who).result(60)

    made = opened()
    session = local.create(made, BODY, arrays(0, SHAPES))
    push(made, "b", 1)
    closed = push(made, "a", 1).pending
    assert closed is not None
    assert closed.future.result(60).scalars["applied_version"] == 1
    push(made, "b", 2)
    assert exported(session) == read_back(session)
    made.close()
    made = opened()
    try:
        closed = push(made, "a", 2).pending
        assert closed is not None
        assert closed.future.result(60).scalars["round"]["workers"] == ["a", "b"]
        session = made.get("default", "a")
        assert exported(session) == read_back(session)
    finally:
        made.close()


def hash_of(worker: str, seq: int) -> int:
    """Return a seed."""
    return 10 * seq + ord(worker[0])
