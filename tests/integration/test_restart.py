"""A registry over a data directory that another one left behind, in order or not."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from optserve.optim import devices
from optserve.sessions import snapshots
from optserve.sessions.operations import Pin
from optserve.sessions.registry import Registry
from optserve.store.opening import CannotOpen, open_store
from optserve_client.errors import (
    Fenced,
    Invalid,
    OutOfSequence,
    OutOfSpace,
    SchedulerFailed,
    SessionNotFound,
    SessionRewound,
    TooLarge,
    Unavailable,
)
from tests import local
from tests.local import Identity, arrays, create, exported, step

BODY: dict[str, Any] = {
    "optimizer": {"name": "AdamW", "lr": 0.1},
    "scheduler": {"name": "LambdaLR", "lr_lambda": "0.9 ** epoch", "advance": "step"},
    "accumulate": 2,
    "ema": {},
    "best": {},
    "tags": {"team": "red"},
}
LARGE = {"w": (200, 200), "b": (7,)}


@contextmanager
def served(path: Path, **limits: Any) -> Iterator[Registry]:
    made = Registry(
        open_store(url=None, data_dir=path, files=None),
        threads=torch.get_num_threads(),
        **limits,
    )
    try:
        yield made
    finally:
        made.close()


def killed(path: Path, to: Path) -> Path:
    """Copy a data directory that is in use: what a killed process leaves behind."""
    shutil.copytree(path, to)
    return to


def who(seq: int) -> Identity:
    return Identity(worker="w", epoch=1, seq=seq, digest=bytes([seq]))


@pytest.mark.parametrize("shapes", [local.SHAPES, LARGE], ids=["inline", "files"])
@pytest.mark.parametrize("every", [3, 10_000], ids=["snapshots", "journal only"])
@pytest.mark.parametrize("durability", ["always", "os"])
def test_a_session_comes_back_bit_for_bit_and_goes_on(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shapes: dict[str, tuple[int, ...]],
    every: int,
    durability: str,
) -> None:
    monkeypatch.setattr(snapshots, "REPLAY_EVENTS", every)
    with served(tmp_path / "a") as made:
        session = create(made, {**BODY, "durability": durability}, arrays(0, shapes))
        for i in range(1, 8):
            step(session, arrays(i, shapes), who(i), loss=1.0 / i)
            session._held.snapshots.wait()
        before, row, history = exported(session), session.row, session.history(0, 100)
        copy = killed(tmp_path / "a", tmp_path / "b")
        later = step(session, arrays(8, shapes), who(8), loss=0.1)
    for path in (copy, tmp_path / "a"):
        with served(path) as made:
            session = made.get("default", "a")
            if path == copy:
                assert session.row.about == row.about
                assert (
                    session.summary() == made.page("default", tags={"team": "red"})["sessions"][0]
                )
                assert session.history(0, 100) == history
                session.load().result(30)
                assert exported(session) == before
            again = step(session, arrays(8, shapes), who(8), loss=0.1)
            assert again.scalars["duplicate"] is (path != copy)
            for name, tensor in local.params_of(again).items():
                assert bytes(tensor) == bytes(local.params_of(later)[name])
            assert again.scalars["generation"] == later.scalars["generation"]
            assert session.status().result(30)["recovery"] == {"bit_exact": True, "reason": None}
            with pytest.raises(OutOfSequence):
                step(session, arrays(9, shapes), who(99))


def test_a_created_session_is_found_again_by_its_key(tmp_path: Path) -> None:
    key = Identity(key="the-key", digest=b"d")

    def ask(made: Registry) -> dict[str, Any]:
        future = made.create("default", None, BODY, arrays(0), None, key, exist_ok=False)
        scalars: dict[str, Any] = future.result(30).scalars
        return scalars

    with served(tmp_path) as made:
        first = ask(made)
    with served(tmp_path) as made:
        again = ask(made)
        assert again["id"] == first["id"]
        assert (first["duplicate"], again["duplicate"]) == (False, True)
        created = {"default": first["id"]}
        reply = made.create(
            "default", created["default"], BODY, arrays(1), None, local.NOBODY, exist_ok=True
        )
        assert reply.result(30).scalars["created"] is False


def test_a_late_repeat_does_not_bring_a_deleted_session_back(tmp_path: Path) -> None:
    key = Identity(key="the-key", digest=b"d")

    def ask(made: Registry) -> Any:
        return made.create("default", "a", BODY, arrays(0), None, key, exist_ok=True).result(30)

    with served(tmp_path) as made:
        ask(made)
        made.delete("default", "a", local.NOBODY).result(30)
        with pytest.raises(SessionNotFound, match="'a', which this Idempotency-Key created, was"):
            ask(made)
    with served(tmp_path) as made:
        with pytest.raises(SessionNotFound, match="'a', which this Idempotency-Key created, was"):
            ask(made)
        create(made, BODY, arrays(0))  # without the key it is a new one


def test_files_of_another_database_are_left_alone(tmp_path: Path) -> None:
    with served(tmp_path / "a") as made:
        session = create(made, BODY, arrays(0, LARGE))
        live = exported(session)
    with pytest.raises(CannotOpen, match="belong to another database"):
        open_store(url=f"sqlite:///{tmp_path}/other.db", data_dir=tmp_path / "a", files=None)
    (tmp_path / "a" / "optserve.db").rename(tmp_path / "kept.db")
    with pytest.raises(CannotOpen, match="belong to another database"):
        open_store(url=None, data_dir=tmp_path / "a", files=None)
    (tmp_path / "kept.db").rename(tmp_path / "a" / "optserve.db")
    with served(tmp_path / "a") as made:
        assert exported(made.get("default", "a")) == live


def test_memory_durability_goes_back_to_the_last_snapshot_and_says_so(tmp_path: Path) -> None:
    with served(tmp_path / "a") as made:
        session = create(made, {**BODY, "durability": "memory"}, arrays(0))
        for i in range(1, 6):
            assert step(session, arrays(i), who(i)).scalars["durability"] == "memory"
        session.snapshot().result(30)
        kept = exported(session)
        for i in range(6, 9):
            step(session, arrays(i), who(i))
        old = session.generation
        copy = killed(tmp_path / "a", tmp_path / "b")
        live = exported(session)
    with served(tmp_path / "a") as made:  # an orderly stop loses nothing
        assert exported(made.get("default", "a")) == live
    with served(copy) as made:
        session = made.get("default", "a")
        with pytest.raises(SessionRewound) as caught:
            step(session, arrays(9), who(9))
        assert caught.value.extra["last_seq"] == 5
        assert caught.value.extra["generation"] == session.generation != old
        with pytest.raises(SessionRewound):
            step(session, arrays(6), who(6), generation=old)
        assert step(session, arrays(5), who(5)).scalars["duplicate"] is True
        params = local.params_of(step(session, arrays(5), who(5)))
        assert all(bytes(params[name]) in kept for name in ("w", "b"))
        reply = step(session, arrays(6), who(6), generation=session.generation)
        assert reply.scalars["version"] == 3
        new = session.generation
        again = killed(copy, tmp_path / "c")
    with served(copy) as made:
        assert made.get("default", "a").generation == new
    with served(again) as made:  # killed before its next snapshot: rewound again
        session = made.get("default", "a")
        session.load().result(30)
        assert session.generation not in (old, new)


def test_os_durability_after_a_power_loss_keeps_what_is_left_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(tmp_path / "a") as made:
        session = create(made, {**BODY, "durability": "os"}, arrays(0, LARGE))
        for i in range(1, 6):
            step(session, arrays(i, LARGE), who(i))
        old, copy = session.generation, killed(tmp_path / "a", tmp_path / "b")
    newest = max((copy / "payloads").iterdir(), key=lambda path: path.name)  # they count up
    newest.write_bytes(newest.read_bytes()[:1000])
    monkeypatch.setattr("optserve.store.sqlite.machine_boot", lambda: "another boot")
    with served(copy) as made:
        session = made.get("default", "a")
        session.load().result(30)
        assert session.generation != old
        assert session.version == 2
        assert step(session, arrays(5, LARGE), who(5)).scalars["accumulated"] == 1


def test_durability_can_be_changed_and_nothing_gets_lost(tmp_path: Path) -> None:
    with served(tmp_path / "a") as made:
        session = create(made, {**BODY, "durability": "memory"}, arrays(0))
        for i, durability in enumerate(["always", "os", "memory", "os", "memory", "always"]):
            step(session, arrays(i + 10))
            local.patch(session, {"durability": durability}).result(30)
            assert step(session, arrays(i)).scalars["durability"] == durability
        live, copy = exported(session), killed(tmp_path / "a", tmp_path / "b")
    with served(copy) as made:
        assert exported(made.get("default", "a")) == live


def test_another_build_is_told_in_the_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(tmp_path / "a") as made:
        session = create(made, BODY, arrays(0))
        for i in range(1, 5):
            step(session, arrays(i))
        copy = killed(tmp_path / "a", tmp_path / "b")
    monkeypatch.setattr(devices, "version", lambda: "9.9.9")
    with served(tmp_path / "a") as made:  # from its snapshot: nothing was computed again
        status = made.get("default", "a").status().result(30)
        assert status["recovery"] == {"bit_exact": True, "reason": None}
    with served(copy) as made:
        session = made.get("default", "a")
        said = session.status().result(30)["recovery"]
        assert said["bit_exact"] is False
        assert "version 0 was computed with torch" in said["reason"]
        assert "replayed with torch '9.9.9'" in said["reason"]
        step(session, arrays(6))
    with served(copy) as made:
        assert made.get("default", "a").status().result(30)["recovery"]["bit_exact"] is False


def test_a_damaged_snapshot_is_passed_over_and_a_damaged_session_is_named(tmp_path: Path) -> None:
    with served(tmp_path) as made:
        for name in ("a", "b"):
            session = create(made, BODY, arrays(0, LARGE), name)
            for i in range(1, 8):
                step(session, arrays(i, LARGE), who(i))
                if i in (3, 6):
                    session.snapshot().result(30)
        a, b = (made.get("default", name) for name in "ab")
        live = exported(a), exported(b)
        frames = {n: made.store.snapshots(s.key)[-1] for n, s in (("a", a), ("b", b))}
        newest = made.store.read_snapshot(a.key, frames["a"].lsn)
        file = tmp_path / "payloads" / newest.name  # type: ignore[union-attr]
        copy = killed(tmp_path, tmp_path.parent / "copy")
    broken = copy / "payloads" / file.name
    broken.write_bytes(broken.read_bytes()[:-1] + b"!")
    with served(copy) as made:
        assert (exported(made.get("default", "a")), exported(made.get("default", "b"))) == live


def test_an_owner_that_was_replaced_commits_nothing(tmp_path: Path) -> None:
    with served(tmp_path) as made:
        session = create(made, BODY, arrays(0))
        step(session, arrays(1), who(1))
        made.store.claim(session.key)
        with pytest.raises(Exception, match="owner_epoch") as caught:
            step(session, arrays(2), who(2))
        assert not isinstance(caught.value, Fenced)
        assert caught.value.status == 421  # type: ignore[attr-defined]


def test_pins_come_back(tmp_path: Path) -> None:
    with served(tmp_path) as made:
        session = create(made, BODY, arrays(0))
        for i in range(1, 9):
            step(session, arrays(i))
        session.change(Pin(version=2, name="two"), local.NOBODY).result(30)
    with served(tmp_path) as made:
        rows = made.get("default", "a").versions(-1, 100)
        assert [(row["version"], row["pin"]) for row in rows if row["pin"]] == [(2, "two")]


FAILING = {
    "optimizer": "SGD",
    "scheduler": {"name": "LambdaLR", "lr_lambda": "1 / (4 - epoch)", "advance": "step"},
}


def test_an_orderly_stop_loses_nothing_of_a_session_that_just_failed(tmp_path: Path) -> None:
    with served(tmp_path) as made:
        session = create(made, {**FAILING, "durability": "memory"}, arrays(0))
        for i in range(3):
            step(session, arrays(i))
        with pytest.raises(SchedulerFailed):
            step(session, arrays(3))
    with served(tmp_path) as made:
        assert made.get("default", "a").version == 3


def test_an_orderly_stop_tries_again_what_a_snapshot_failed_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(tmp_path) as made:
        session = create(made, {**BODY, "durability": "memory"}, arrays(0))
        with monkeypatch.context() as full:
            full.setattr(snapshots, "REPLAY_EVENTS", 2)
            full.setattr(made.store, "snapshot", lambda *_, **__: 1 / 0)
            for i in range(4):
                step(session, arrays(i))
            session._held.snapshots.wait()
    with served(tmp_path) as made:
        assert made.get("default", "a").version == 2


def test_a_deletion_that_fails_costs_the_session_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OutOfSpace("no space")

    with served(tmp_path) as made:
        session = create(made, {**BODY, "durability": "memory"}, arrays(0))
        with monkeypatch.context() as disk:
            disk.setattr(made.store, "delete", full)
            with pytest.raises(OutOfSpace):
                made.delete("default", "a", local.NOBODY).result(30)
        for i in range(4):
            step(session, arrays(i))
    with served(tmp_path) as made:
        assert made.get("default", "a").version == 2


def test_a_snapshot_of_a_deleted_session_is_not_kept_for_the_next_of_its_name(
    tmp_path: Path,
) -> None:
    with served(tmp_path) as made:
        late = Future[None]()
        made._background.submit(lambda: late.result(30))
        session = create(made, BODY, arrays(0))
        step(session, arrays(1))
        session.run(session._held.snapshots.begin).result(30)
        made.delete("default", "a", local.NOBODY).result(30)
        again = create(made, BODY, arrays(5))
        for i in range(4):
            step(again, arrays(i))
        late.set_result(None)
        session._held.snapshots.wait()
        assert made.store.snapshots(again.key) == []
        assert local.read_back(again) == exported(again)


def test_one_row_that_cannot_be_read_takes_nobody_else_down(tmp_path: Path) -> None:
    with served(tmp_path) as made:
        for name in ("a", "b"):
            step(create(made, BODY, arrays(0), name), arrays(1))
    with sqlite3.connect(tmp_path / "optserve.db") as database:
        database.execute("UPDATE sessions SET about = '{torn' WHERE session = 'a'")
    database.close()
    with served(tmp_path) as made:
        assert [row["optimizer"] for row in made.page("default")["sessions"]] == ["?", "AdamW"]
        for name in ("a", "b"):  # reading it back tells what the row did not
            assert step(made.get("default", name), arrays(2)).scalars["applied"] is True
        assert made.get("default", "a").summary()["optimizer"] == "AdamW"


def test_what_this_server_cannot_read_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(tmp_path) as made:
        step(create(made, BODY, arrays(0)), arrays(1))

    def elsewhere(device: str) -> str:
        raise Invalid(f"device {device!r}: this server has 0 CUDA devices")

    with served(tmp_path) as made:
        with monkeypatch.context() as other:
            other.setattr(devices, "resolve", elsewhere)
            with pytest.raises(Unavailable, match="cannot be read back by this server: device"):
                made.get("default", "a").status().result(30)
        assert made.get("default", "a").status().result(30)["version"] == 0


def test_a_session_that_does_not_fit_can_be_deleted(tmp_path: Path) -> None:
    with served(tmp_path) as made:
        create(made, BODY, arrays(0, LARGE))
    with served(tmp_path, memory_budget=1000) as made:
        with pytest.raises(TooLarge):
            made.get("default", "a").status().result(30)
        made.delete("default", "a", local.NOBODY).result(30)
        assert made.store.sessions() == []
