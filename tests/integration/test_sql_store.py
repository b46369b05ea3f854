"""What only a store on a disk promises: it comes back, alone, and says what it has lost."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optserve.store import Key, Store
from optserve.store.base import DURABILITIES, Durability
from optserve.store.database import Connection
from optserve.store.migrations import CannotOpen, found_format, prepare
from optserve.store.opening import open_store
from optserve.store.sql import SqlStore
from optserve.store.sqlite import Sqlite
from optserve_client.errors import Damaged, Internal, OptserveError, OutOfSpace, Unavailable
from tests.postgres import MISSING, Cluster, binaries
from tests.stores import (
    DURABLE,
    Backend,
    commit,
    event,
    filled,
    kept,
    lsns,
    make_backend,
    payload,
    snapshot,
)
from tests.waiting import wait_until

A, B, C = (Key("default", name) for name in "abc")
LIMIT_S = 60


@pytest.fixture(params=DURABLE)
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Backend]:
    with make_backend(request.param, tmp_path) as made:
        yield made


@pytest.fixture
def sqlite(tmp_path: Path) -> Iterator[Backend]:
    with make_backend("sqlite", tmp_path) as made:
        yield made


def noise(size: int) -> bytes:
    return np.random.default_rng(size).bytes(size)


def row_of(store: Store, key: Key) -> Any:
    row = store.session(key)
    assert row is not None
    return row


def payload_files(directory: Path) -> list[Path]:
    return sorted((directory / "payloads").iterdir())


def internals(store: Store) -> Any:
    assert isinstance(store, SqlStore)
    return store


def commits_of(store: Store) -> list[str]:
    """Return a list that grows by the mode of each commit: NORMAL, or FULL with a sync."""
    driver = internals(store)._database.writer.driver
    [number] = driver.execute("PRAGMA synchronous").fetchone()
    mode, modes = {1: "NORMAL", 2: "FULL"}[number], []

    def trace(text: str) -> None:
        nonlocal mode
        if text.startswith("PRAGMA synchronous="):
            mode = text.removeprefix("PRAGMA synchronous=")
        elif text == "COMMIT":
            modes.append(mode)

    driver.set_trace_callback(trace)
    return modes


# --- it comes back -------------------------------------------------------------------------------


def test_everything_comes_back(backend: Backend) -> None:
    with closing(backend.open()) as store:
        create = event(A, 1, payload=payload(store, noise(3_000_000)), about={"name": "n"})
        commit(store, create, event(B, 1, idempotency_key="k", digest=b"d", worker="w", seq=3))
        for lsn in range(2, 8):
            data = payload(store, noise(lsn * 30_000))
            commit(store, event(A, lsn, record={"lsn": lsn}, loss=0.5, payload=data))
        snapshot(store, A, 2, noise(200_000), pin="best")
        snapshot(store, A, 4, b"four")
        snapshot(store, A, 6, noise(5_000_000))
        rows, snapshots = store.sessions(), store.snapshots(A)
    with closing(backend.open()) as store:
        assert store.sessions() == rows
        assert store.snapshots(A) == snapshots
        assert [s.pin for s in snapshots] == ["best", None, None]
        frames = [store.read_snapshot(A, lsn) for lsn in (2, 4, 6)]
        want = [noise(200_000), b"four", noise(5_000_000)]
        assert [frame and frame.read() for frame in frames] == want
        events = list(store.events(A))
        assert [e.record.get("lsn") for e in events] == [None, 2, 3, 4, 5, 6, 7]
        read = [e.payload and e.payload.read() for e in events]
        assert read == [None] * 4 + [noise(lsn * 30_000) for lsn in (5, 6, 7)]
        [other] = store.events(B)
        assert (other.idempotency_key, other.worker, other.seq, other.digest) == ("k", "w", 3, b"d")
        commit(store, event(A, 8), event(B, 2))


def test_what_was_deleted_stays_deleted(backend: Backend) -> None:
    with closing(backend.open()) as store:
        filled(store, A, 3, size=100_000)
        filled(store, B, 1)
        snapshot(store, A, 2, noise(100_000))
        store.delete(A)
    with closing(backend.open()) as store:
        assert [row.key for row in store.sessions()] == [B]
        assert lsns(store, A) == []
        filled(store, A, 1)
        assert [row.key for row in store.sessions()] == [B, A]
    if backend.name != "postgresql-alone":
        assert payload_files(backend.data_dir) == []


def test_epochs_rise_over_restarts(backend: Backend) -> None:
    epochs = []
    for _ in range(3):
        with closing(backend.open()) as store:
            epochs += [store.claim(A), store.claim(A)]
    with closing(backend.open()) as store:
        commit(store, event(A, 1, owner_epoch=40))
    with closing(backend.open()) as store:
        epochs += [store.claim(B), store.claim(A)]
        [outcome] = store.append([event(A, 2, owner_epoch=40)])
        assert outcome.error is not None
        commit(store, event(A, 2, owner_epoch=epochs[-1]))
    assert epochs == sorted(set(epochs))
    assert epochs[-2] > 40


# --- what may be gone ----------------------------------------------------------------------------

WRITER = """
    import sys, time
    from pathlib import Path
    from optserve.store import Key
    from optserve.store.opening import open_store
    from tests.stores import filled, snapshot, event, commit, payload

    url, data_dir, files, durability, covered = sys.argv[1:]
    store = open_store(
        url=url or None, data_dir=Path(data_dir), files=Path(files) if files else None
    )
    A = Key("default", "a")
    filled(store, A, 5, size=100_000, durability=durability)
    if int(covered):
        snapshot(store, A, int(covered))
    print("done", flush=True)
    time.sleep(600)
"""


def write_and_kill(backend: Backend, durability: Durability, covered: int = 0) -> None:
    """Let a process of its own write five events and a snapshot, then kill it with SIGKILL."""
    arguments = [backend.url or "", str(backend.data_dir), str(backend.files or "")]
    script = textwrap.dedent(WRITER)
    with subprocess.Popen(
        [sys.executable, "-c", script, *arguments, durability, str(covered)],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).resolve().parents[2],
    ) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == b"done\n"
        finally:
            process.kill()
    assert process.returncode == -signal.SIGKILL


@contextmanager
def reopened(backend: Backend) -> Iterator[Store]:
    """Open what a killed process left; PostgreSQL may take a moment to see that it is dead."""
    end = time.monotonic() + LIMIT_S
    while True:
        try:
            store = backend.open()
            break
        except CannotOpen as exc:
            if "used by" not in str(exc) or time.monotonic() > end:
                raise
            time.sleep(0.05)
    with closing(store):
        yield store


@pytest.mark.parametrize("durability", ["always", "os"])
def test_what_was_acknowledged_survives_the_death_of_the_process(
    backend: Backend, durability: Durability
) -> None:
    write_and_kill(backend, durability)
    with reopened(backend) as store:
        assert row_of(store, A).suspect is False
        assert [e.payload and e.payload.read()[0] for e in store.events(A)] == [1, 2, 3, 4, 5]
        commit(store, event(A, 6, durability=durability))


def test_what_only_the_process_had_is_gone_and_the_session_says_so(backend: Backend) -> None:
    write_and_kill(backend, "memory", covered=3)
    with reopened(backend) as store:
        row = row_of(store, A)
        assert (row.suspect, row.last_lsn, row.durability) == (True, 3, "memory")
        assert lsns(store, A) == [1, 2, 3]
        [outcome] = store.append([event(A, 4)])
        assert isinstance(outcome.error, Internal)
        assert outcome.error.detail == (
            "event 4 of session 'a' must be a rewind: acknowledged events before it may be gone"
        )
        [outcome] = store.append([event(A, 4, durability="memory")])
        assert isinstance(outcome.error, Internal)
    # It stays so until somebody has rewound it.
    with closing(backend.open()) as store:
        assert row_of(store, A).suspect is True
        commit(store, event(A, 4, "rewind", durability="memory"))
        assert row_of(store, A).suspect is False
        commit(store, event(A, 5), event(A, 6))
    with closing(backend.open()) as store:
        assert row_of(store, A).suspect is False
        assert lsns(store, A) == list(range(1, 7))


def test_a_snapshot_of_the_last_event_leaves_nothing_to_lose(backend: Backend) -> None:
    write_and_kill(backend, "memory", covered=5)
    with reopened(backend) as store:
        row = row_of(store, A)
        assert (row.suspect, row.last_lsn) == (False, 5)
        commit(store, event(A, 6, durability="memory"))


def test_after_a_power_loss_os_sessions_are_suspect_and_others_are_not(
    sqlite: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Backend("sqlite", None, sqlite.data_dir / "copy", None)
    with closing(sqlite.open()) as store:
        for durability in DURABILITIES:
            filled(store, Key("default", durability), 3, durability=durability)
        filled(store, Key("default", "covered"), 3, durability="os")
        snapshot(store, Key("default", "covered"), 3)
        filled(store, Key("default", "synced"), 3, durability="os")
        commit(store, event(Key("default", "synced"), 4, durability="always"))
        shutil.copytree(sqlite.data_dir, copy.data_dir)
    suspects = {"always": False, "os": True, "memory": True, "covered": False, "synced": False}
    monkeypatch.setattr("optserve.store.sqlite.machine_boot", lambda: "another")
    with closing(copy.open()) as store:
        assert {row.key.session: row.suspect for row in store.sessions()} == suspects
    # That one was closed: what was not synced is.
    with closing(sqlite.open()) as store:
        found = {row.key.session: row.suspect for row in store.sessions()}
        assert found == suspects | {"os": False}


def test_the_mark_of_unsynced_events_is_there_before_the_first_is_acknowledged(
    sqlite: Backend,
) -> None:
    with closing(sqlite.open()) as store:
        filled(store, A, 1, durability="os")
        modes = commits_of(store)
        commit(store, event(A, 2, durability="os"), event(A, 3, durability="os"))
        commit(store, event(A, 4, durability="os"))
        snapshot(store, A, 4)
        commit(store, event(A, 5, durability="os"))
        commit(store, event(A, 6, durability="os"))
    assert modes[:6] == ["FULL", "NORMAL", "NORMAL", "FULL", "FULL", "NORMAL"]


def test_a_start_after_a_kill_brings_the_whole_log_into_the_database(sqlite: Backend) -> None:
    copy = Backend("sqlite", None, sqlite.data_dir / "copy", None)
    with closing(sqlite.open()) as store:
        filled(store, A, 10, size=40_000, durability="os")
        shutil.copytree(sqlite.data_dir, copy.data_dir)
    log = copy.data_dir / "optserve.db-wal"
    before = log.stat().st_size
    with closing(copy.open()) as store:
        # What follows is the mark of this start alone.
        assert log.stat().st_size < before / 10
        assert lsns(store, A) == list(range(1, 11))


@pytest.mark.skipif(binaries() is None, reason=MISSING)
def test_after_a_crash_of_postgresql_os_sessions_are_suspect(tmp_path: Path) -> None:
    bin_dir = binaries()
    assert bin_dir is not None
    cluster = Cluster(bin_dir)
    try:
        with cluster.database() as database:
            backend = Backend("postgresql-alone", cluster.url(database), tmp_path, None)
            store = backend.open()
            filled(store, A, 3, durability="always")
            filled(store, B, 3, durability="os")
            filled(store, C, 3, durability="memory")
            cluster.crash()
            cluster.start()
            # The server lives on: it says so as well, and keeps what only it has.
            [outcome] = store.append([event(A, 4)])
            assert isinstance(outcome.error, Unavailable)
            commit(store, event(A, 4), event(C, 4, durability="memory"))
            suspect = {row.key: row.suspect for row in store.sessions()}
            assert suspect == {A: False, B: True, C: False}
            assert (lsns(store, A), lsns(store, C)) == ([1, 2, 3, 4], [1, 2, 3, 4])
            store.close()
            with reopened(backend) as store:
                suspect = {row.key: row.suspect for row in store.sessions()}
                assert suspect == {A: False, B: True, C: True}
    finally:
        cluster.stop()


# --- group commit --------------------------------------------------------------------------------


def test_calls_of_many_threads_share_a_commit(sqlite: Backend) -> None:
    with closing(sqlite.open()) as store:
        keys = [Key("default", f"s{i}") for i in range(16)]
        commit(store, *(event(key, 1) for key in keys))
        modes = commits_of(store)
        outcomes: list[Any] = []

        def work(key: Key) -> None:
            outcomes.extend(store.append([event(key, 2), event(key, 7), event(key, 3)]))

        threads = [threading.Thread(target=work, args=(key,)) for key in keys]
        with internals(store)._commits.alone():  # as if a commit were running
            for thread in threads:
                thread.start()
            wait_until(lambda: len(internals(store)._commits._queue) == len(keys))
        for thread in threads:
            thread.join()
        assert len(modes) == 1
        assert [o.error is None for o in outcomes] == [True, False, True] * 16
        assert all(lsns(store, key) == [1, 2, 3] for key in keys)


def test_an_event_that_needs_no_sync_does_not_wait_for_one(sqlite: Backend) -> None:
    with closing(sqlite.open()) as store:
        filled(store, A, 2, durability="always")
        filled(store, B, 2, durability="os")
        modes = commits_of(store)
        with internals(store)._commits.alone():
            synced = store.submit([event(A, 3)])
            quick = store.submit([event(B, 3, durability="os")])
            order: list[str] = []
            synced.add_done_callback(lambda _: order.append("synced"))
            quick.add_done_callback(lambda _: order.append("quick"))
        assert [f.result(LIMIT_S)[0].error for f in (synced, quick)] == [None, None]
        wait_until(lambda: len(order) == 2)
        assert order == ["quick", "synced"]
        assert modes == ["NORMAL", "FULL"]


def test_what_needs_no_sync_is_committed_where_the_caller_says(sqlite: Backend) -> None:
    with closing(sqlite.open()) as store:
        filled(store, A, 2, durability="os")
        filled(store, B, 2, durability="os")
        modes, calls = commits_of(store), list[Callable[[], object]]()
        futures = [store.submit([event(key, 3, durability="os")], calls.append) for key in (A, B)]
        assert not any(future.done() for future in futures)
        [hurry] = calls  # one for both
        hurry()
        assert [future.result(0)[0].error for future in futures] == [None, None]
        assert modes == ["NORMAL"]
        assert lsns(store, A) == lsns(store, B) == [1, 2, 3]


def test_what_needs_a_sync_is_not(sqlite: Backend) -> None:
    with closing(sqlite.open()) as store:
        filled(store, A, 2, durability="always")
        filled(store, B, 2, durability="os")
        modes, calls = commits_of(store), list[Callable[[], object]]()
        assert store.submit([event(A, 3)], calls.append).result(LIMIT_S)[0].error is None
        assert calls == []
        with internals(store)._commits.alone():
            # The first os event of a session says so with a sync.
            futures = [
                store.submit([event(A, 4, durability="os")], calls.append),
                store.submit([event(B, 3, durability="os")], calls.append),
            ]
            [hurry] = calls
            hurry()  # somebody writes: it must not wait
            assert not any(future.done() for future in futures)
        assert [future.result(LIMIT_S)[0].error for future in futures] == [None, None]
        assert modes == ["FULL", "NORMAL", "FULL"]
        hurry()
        assert lsns(store, A) == [1, 2, 3, 4]


def test_the_log_is_brought_into_the_database_by_another_thread(
    sqlite: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optserve.store.sqlite.CHECKPOINT_FRAMES", 10)
    with closing(sqlite.open()) as store:
        filled(store, A, 2, durability="os")
        database, threads = internals(store)._database, list[str]()
        catch_up = database.catch_up

        def watched() -> None:
            threads.append(threading.current_thread().name)
            catch_up()

        monkeypatch.setattr(database, "catch_up", watched)
        for lsn in range(3, 30):
            future = store.submit([event(A, lsn, durability="os")], lambda hurry: hurry())
            assert future.result(LIMIT_S)[0].error is None
        wait_until(lambda: len(threads) > 0 and not database.behind)
        assert set(threads) == {"store-commit"}


def test_a_thread_that_waited_for_the_disk_leaves_that_to_others(
    sqlite: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optserve.store.commits.HURRIED_S", -1.0)
    with closing(sqlite.open()) as store:
        filled(store, A, 2, durability="os")
        calls: list[Callable[[], object]] = []
        for lsn in range(3, 6):
            future = store.submit([event(A, lsn, durability="os")], calls.append)
            for call in calls[lsn - 3 :]:
                call()
            assert future.result(LIMIT_S)[0].error is None
        assert len(calls) == 1


def test_a_thread_that_has_ended_is_not_waited_for(sqlite: Backend) -> None:
    def closed(_: Callable[[], object]) -> None:
        raise RuntimeError("Event loop is closed")

    with closing(sqlite.open()) as store:
        filled(store, A, 2, durability="os")
        for lsn in (3, 4):
            future = store.submit([event(A, lsn, durability="os")], closed)
            assert future.result(LIMIT_S)[0].error is None


def test_a_synced_event_covers_an_unsynced_one_that_queued_with_it(sqlite: Backend) -> None:
    with closing(sqlite.open()) as store:
        filled(store, A, 1)
        large = payload(store, noise(200_000), None, "os")
        with internals(store)._commits.alone():
            # The first os event of a clean session, and one that promises everything before it.
            futures = [
                store.submit([event(A, 2, payload=large, durability="os")]),
                store.submit([event(A, 3, durability="always")]),
            ]
        assert [future.result(LIMIT_S)[0].error for future in futures] == [None, None]
        files = internals(store)._placing.files
        assert not files._unsynced
        with internals(store)._database.reading() as now:
            assert now.column("SELECT dirty FROM sessions") == [None]


@pytest.mark.parametrize("kind", ["step", "rewind"])
def test_what_queued_behind_a_mark_knows_of_it(sqlite: Backend, kind: str) -> None:
    with closing(sqlite.open()) as store:
        filled(store, A, 2)
        with internals(store)._commits.alone():
            # The first event that only this process has, and another one of its lsn.
            futures = [
                store.submit([event(A, 3, durability="memory")]),
                store.submit([event(A, 3, kind)]),
            ]
        errors = [future.result(LIMIT_S)[0].error for future in futures]
        assert errors[0] is None
        assert (errors[1] is None) == (kind == "rewind")
        commit(store, event(A, 4, durability="memory" if kind == "step" else "always"))
        assert lsns(store, A) == [1, 2, 3, 4]


def test_a_synced_event_covers_unsynced_ones_before_an_open_outcome(
    sqlite: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(sqlite.open()) as store:
        filled(store, A, 2, durability="os")
        large = payload(store, noise(200_000), None, "os")
        commit(store, event(A, 3, payload=large, durability="os"))
        writing, files = internals(store)._writing, internals(store)._placing.files

        def broken(*_: object) -> None:
            raise Unavailable("nobody knows whether this was committed")

        with monkeypatch.context() as patch:
            patch.setattr(writing, "append", broken)
            [outcome] = store.append([event(A, 4, durability="os")])
            assert isinstance(outcome.error, Unavailable)
        assert files._unsynced
        modes = commits_of(store)
        commit(store, event(A, 4))
        assert not files._unsynced
        # The next one without a sync is the first of its kind again, and says so with one.
        commit(store, event(A, 5, durability="os"))
        commit(store, event(A, 6, durability="os"))
        assert modes == ["FULL", "FULL", "NORMAL"]


def test_a_commit_counts_although_no_more_files_can_be_opened(
    sqlite: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(sqlite.open()) as store:
        filled(store, A, 2)
        database = internals(store)._database

        def refused() -> int:
            raise OSError(24, "Too many open files")

        monkeypatch.setattr(database, "_log_frames", refused)
        commit(store, event(A, 3), event(A, 4, durability="os"))
        future = store.submit([event(A, 5, durability="os")], lambda hurry: hurry())
        assert future.result(LIMIT_S)[0].error is None
        commit(store, event(A, 6))
        assert lsns(store, A) == [1, 2, 3, 4, 5, 6]


def test_a_thread_that_must_not_wait_does_not_open_the_database(
    sqlite: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(sqlite.open()) as store:
        filled(store, A, 2, durability="os")
        database, threads, calls = internals(store)._database, list[str](), list[Any]()
        recover = database._recover

        def watched(driver: Any) -> None:
            threads.append(threading.current_thread().name)
            recover(driver)

        monkeypatch.setattr(database, "_recover", watched)
        with internals(store)._commits.alone():
            database.drop_writer()
        before = store.submit([event(A, 3, durability="os")], calls.append)
        assert calls == []
        assert before.result(LIMIT_S)[0].error is None
        after = store.submit([event(A, 4, durability="os")], calls.append)
        with internals(store)._commits.alone():
            database.drop_writer()
        calls.pop()()
        assert after.result(LIMIT_S)[0].error is None
        assert threads == ["store-commit"] * 2


def test_who_never_writes_after_all_is_asked_again_soon(sqlite: Backend) -> None:
    with closing(sqlite.open()) as store:
        for key in (A, B):
            filled(store, key, 2, durability="os")
        forgotten = store.submit([event(A, 3, durability="os")], lambda hurry: None)
        futures, calls = [forgotten], list[Callable[[], object]]()

        def asked() -> bool:
            lsn = len(futures) + 2
            futures.append(store.submit([event(B, lsn, durability="os")], calls.append))
            return bool(calls)

        wait_until(asked)
        calls[0]()
        assert {future.result(LIMIT_S)[0].error for future in futures} == {None}


def test_a_call_waits_for_the_one_before_it_of_its_session(backend: Backend) -> None:
    with closing(backend.open()) as store:
        filled(store, A, 1)
        data = [payload(store, noise(2_000_000 + lsn), None, "os") for lsn in range(2, 6)]
        large = [store.submit([event(A, lsn, payload=data[lsn - 2])]) for lsn in range(2, 6)]
        last = store.submit([event(A, 6)])
        assert [f.result(LIMIT_S)[0].error for f in (*large, last)] == [None] * 5


@pytest.mark.parametrize(
    "fields",
    [{"seq": 2**63}, {"updates": -(2**63) - 1}, {"worker": "\ud800"}, {"digest": object()}],
    ids=str,
)
def test_what_a_database_cannot_keep_takes_no_other_down(
    backend: Backend, fields: dict[str, Any]
) -> None:
    with closing(backend.open()) as store:
        outcomes = store.append([event(B, 1), event(A, 1, **fields), event(B, 2)])
        assert [o.error is None for o in outcomes] == [True, False, True]
        assert isinstance(outcomes[1].error, Internal)
        [outcome] = store.append([event(A, 1, **fields)])
        assert isinstance(outcome.error, Internal)
        assert [row.key for row in store.sessions()] == [B]
        commit(store, event(A, 1), event(B, 3))


# --- one at a time -------------------------------------------------------------------------------


def test_a_second_server_is_refused_and_told_by_whom(backend: Backend) -> None:
    with closing(backend.open()) as store:
        filled(store, A, 1)
        with pytest.raises(CannotOpen, match=f"used by the server with pid {os.getpid()}: stop it"):
            backend.open()
        filled(store, B, 1)
    backend.open().close()


def test_a_second_server_on_the_same_database_by_another_folder_is_refused(
    sqlite: Backend, tmp_path: Path
) -> None:
    url = f"sqlite:///{sqlite.data_dir}/optserve.db"
    with closing(sqlite.open()), pytest.raises(CannotOpen, match="is used by the server with pid"):
        open_store(url=url, data_dir=tmp_path / "other", files=None)
    with closing(open_store(url=url, data_dir=tmp_path / "other", files=None)):
        pass


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("nonsense", "store must be a URL, got 'nonsense'"),
        ("mysql://x/y", "store 'mysql' is not known"),
        ("sqlite://", "names no file"),
        ("postgresql+psycopg://nobody@127.0.0.1:1/x", "cannot be opened: connection failed"),
    ],
)
def test_a_url_that_cannot_be_used_is_one_sentence(tmp_path: Path, url: str, sentence: str) -> None:
    with pytest.raises(CannotOpen) as caught:
        open_store(url=url, data_dir=tmp_path, files=None)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotOpen, match=r"directory .*file.* cannot be written: .*--data-dir"):
        open_store(url=None, data_dir=tmp_path / "file" / "data", files=None)


# --- formats -------------------------------------------------------------------------------------


def test_a_newer_format_is_refused_with_both_numbers(sqlite: Backend) -> None:
    sqlite.open().close()
    with closing(sqlite3.connect(sqlite.data_dir / "optserve.db")) as connection:
        connection.execute("UPDATE meta SET format = 7")
        connection.commit()
    with pytest.raises(CannotOpen, match=r"has format 7, and optserve .* reads formats up to 1"):
        sqlite.open()


def test_tables_of_somebody_else_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "optserve.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE events (x)")
        connection.commit()
    with pytest.raises(CannotOpen, match="has tables events that are not optserve's"):
        open_store(url=None, data_dir=tmp_path, files=None)


def test_an_older_format_is_brought_up_to_date_in_one_go(sqlite: Backend) -> None:
    with closing(sqlite.open()) as store:
        filled(store, A, 2)

    def add(tx: Connection) -> None:
        tx.run("ALTER TABLE sessions ADD COLUMN colour TEXT")

    def paint(tx: Connection) -> None:
        tx.run("UPDATE sessions SET colour = 'red'")

    def fail(tx: Connection) -> None:
        tx.run("UPDATE sessions SET nothing = 1")

    database = Sqlite(sqlite.data_dir / "optserve.db")
    with closing(database):
        with pytest.raises(OptserveError):
            prepare(database, [add, fail])
        with database.transaction() as tx:
            assert found_format(database, tx) == 1
        prepare(database, [add, paint])
        with database.transaction() as tx:
            assert found_format(database, tx) == 3
            assert tx.column("SELECT colour FROM sessions") == ["red"]
        prepare(database, [add, paint])


# --- damage --------------------------------------------------------------------------------------


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "optserve.db").write_bytes(noise(10_000))
    with pytest.raises(CannotOpen, match="is damaged: file is not a database; run optserve fsck"):
        open_store(url=None, data_dir=tmp_path, files=None)


@pytest.mark.parametrize("how", ["missing", "short", "changed"])
def test_a_damaged_payload_file_is_told_by_its_reads_alone(sqlite: Backend, how: str) -> None:
    with closing(sqlite.open()) as store:
        filled(store, A, 1)
        commit(store, event(A, 2, payload=payload(store, noise(300_000))), event(A, 3))
        filled(store, B, 2)
    [path] = payload_files(sqlite.data_dir)
    whole = bytearray(path.read_bytes())
    whole[200_000] ^= 1
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(whole[:-1] if how == "short" else whole)
    with closing(sqlite.open()) as store:
        events = list(store.events(A))
        assert [e.lsn for e in events] == [1, 2, 3]
        damaged = events[1].payload
        assert damaged is not None
        with pytest.raises(Damaged, match="payload file"):
            damaged.read()
        with pytest.raises(Damaged, match="payload file"):
            list(damaged.chunks())
        assert [e.payload is not None for e in store.events(B)] == [True, True]
        commit(store, event(A, 4), event(B, 3))


def test_a_damaged_frame_is_told_by_its_reads(sqlite: Backend) -> None:
    with closing(sqlite.open()) as store:
        filled(store, A, 3)
        snapshot(store, A, 2, noise(100_000))
        snapshot(store, A, 3, noise(200))
    payload_files(sqlite.data_dir)[0].unlink()
    with closing(sqlite.open()) as store:
        frame = store.read_snapshot(A, 2)
        assert frame is not None
        with pytest.raises(Damaged):
            frame.read()
        whole = store.read_snapshot(A, 3)
        assert whole is not None
        assert whole.read() == noise(200)


def test_a_payload_that_the_database_lost_is_told_by_its_reads(backend: Backend) -> None:
    with closing(backend.open()) as store:
        filled(store, A, 3)
        with internals(store)._database.transaction() as tx:
            tx.run("DELETE FROM parts WHERE lsn = 2")
        payloads = [e.payload for e in store.events(A)]
        assert payloads[0] is not None
        assert payloads[1] is not None
        assert payloads[0].read()
        with pytest.raises(Damaged, match="session 'a' at lsn 2"):
            payloads[1].read()


# --- files ---------------------------------------------------------------------------------------


def test_files_that_no_row_names_are_removed_at_the_next_start(sqlite: Backend) -> None:
    with closing(sqlite.open()) as store:
        filled(store, A, 2, size=100_000)
        snapshot(store, A, 1, noise(100_000))
    before = payload_files(sqlite.data_dir)
    assert len(before) == 3
    (sqlite.data_dir / "payloads" / ("0" * 32)).write_bytes(b"orphan")
    with closing(sqlite.open()):
        assert payload_files(sqlite.data_dir) == before


def test_files_go_with_what_named_them(sqlite: Backend) -> None:
    def count() -> int:
        return len(payload_files(sqlite.data_dir))

    with closing(sqlite.open()) as store:
        filled(store, A, 6, size=100_000)
        assert count() == 6
        snapshot(store, A, 2, noise(100_000))
        snapshot(store, A, 4, noise(100_000))
        assert count() == 4 + 2
        snapshot(store, A, 6, b"small")
        assert (kept(store, A), count()) == ([4, 6], 2 + 1)
        commit(store, event(A, 6, "rewind"))
        assert count() == 1 + 1
        refused = event(A, 9, payload=payload(store, noise(100_000), None, "memory"))
        [outcome] = store.append([refused])
        assert outcome.error is not None
        assert count() == 1 + 1
        store.delete(A)
        assert count() == 0


# --- faults --------------------------------------------------------------------------------------


def break_log(store: Store) -> None:
    """Let every write to SQLite's log fail, until it is opened anew: real errors of real calls."""
    log = f"{internals(store)._database.path}-wal"
    unwritable = os.open(log, os.O_RDONLY)
    for fd in os.listdir("/proc/self/fd"):
        if link(fd) == log and int(fd) != unwritable:
            os.dup2(unwritable, int(fd))
    os.close(unwritable)


def link(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""


def test_a_full_disk_refuses_and_goes_on_when_there_is_space(sqlite: Backend) -> None:
    with closing(sqlite.open()) as store:
        filled(store, A, 2)
        filled(store, B, 2, durability="memory")
        driver = internals(store)._database.writer.driver
        [pages] = driver.execute("PRAGMA page_count").fetchone()
        driver.execute(f"PRAGMA max_page_count={pages + 12}")  # what SQLite makes of ENOSPC
        data = [payload(store, noise(size)) for size in (40_000, 100, 40_000)]
        for _ in range(3):
            events = [event(A, 3 + i, payload=data[i]) for i in range(3)]
            outcomes = store.append(events)
            # What is too much together may do alone.
            assert [type(o.error) for o in outcomes] == [type(None), type(None), OutOfSpace]
            assert lsns(store, A) == [1, 2, 3, 4]
            commit(store, event(A, 3, "rewind"), event(A, 2, "rewind"))
        with pytest.raises(OutOfSpace):
            snapshot(store, A, 2, noise(60_000))
        commit(store, event(B, 3, durability="memory"))
        driver.execute("PRAGMA max_page_count=1000000")
        commit(store, event(A, 3, payload=data[0]))
        assert store.snapshots(A) == []


def test_after_an_error_of_the_disk_the_database_is_opened_anew(sqlite: Backend) -> None:
    with closing(sqlite.open()) as store:
        filled(store, A, 2)
        filled(store, B, 3, durability="memory")
        before = internals(store)._database.writer
        break_log(store)
        [outcome] = store.append([event(A, 3)])
        assert isinstance(outcome.error, Unavailable)
        snapshot(store, A, 1)
        break_log(store)
        with pytest.raises(Unavailable):
            snapshot(store, B, 2)
        assert lsns(store, B) == [1, 2, 3]
        last = row_of(store, A).last_lsn
        commit(store, event(A, last + 1), event(B, 4, durability="memory"))
        assert internals(store)._database.writer is not before
        snapshot(store, B, 4)
        commit(store, event(B, 5))
    with closing(sqlite.open()) as store:
        assert lsns(store, A) == list(range(1, last + 2))
        assert lsns(store, B) == [1, 2, 3, 4, 5]


def test_a_broken_connection_is_made_anew(tmp_path: Path) -> None:
    from tests.postgres import shared_cluster

    cluster = shared_cluster()
    with cluster.database() as name:
        backend = Backend("postgresql-alone", cluster.url(name), tmp_path, None)
        with closing(backend.open()) as store:
            filled(store, A, 3)
            filled(store, B, 3, durability="memory")
            cluster.kill_connections(name)
            [outcome] = store.append([event(A, 4)])
            assert isinstance(outcome.error, Unavailable)
            last = row_of(store, A).last_lsn
            commit(store, event(A, last + 1), event(B, 4, durability="memory"))
            assert lsns(store, A) == list(range(1, last + 2))
            assert lsns(store, B) == [1, 2, 3, 4]
            with pytest.raises(CannotOpen, match="used by the server"):
                backend.open()


# --- walks ---------------------------------------------------------------------------------------


def test_a_walk_that_is_given_up_gives_its_connection_back(backend: Backend) -> None:
    with closing(backend.open()) as store:
        filled(store, A, 1)
        commit(store, *(event(A, lsn) for lsn in range(2, 300)))
        pool = internals(store)._database.engine.pool
        walks = [store.events(A) for _ in range(6)]
        for walk in walks[:3]:
            next(walk)
        del walk, walks
        assert pool.checkedout() == 0
        assert [e.lsn for e in store.events(A)] == list(range(1, 300))
        assert pool.checkedout() == 0


def test_a_walk_does_not_hold_up_what_is_written(backend: Backend) -> None:
    with closing(backend.open()) as store:
        filled(store, A, 1)
        commit(store, *(event(A, lsn) for lsn in range(2, 300)))
        walk = store.events(A)
        assert next(walk).lsn == 1
        commit(store, event(A, 300), event(A, 250 + 51))
        store.delete(A)
        filled(store, A, 2)
        assert [e.lsn for e in walk] == list(range(2, 300))
        assert lsns(store, A) == [1, 2]
