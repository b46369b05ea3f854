"""What every Store promises, run against each backend."""

from __future__ import annotations

import errno
import gc
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from optserve.store import Event, Key, MemoryStore, Store
from optserve.store.payloads import INLINE_BYTES, SEGMENT_BYTES
from optserve_client.errors import (
    Internal,
    Misdirected,
    SessionExists,
    SessionNotFound,
    Unavailable,
)

KEPT_ROWS = 20
A, B = Key("default", "a"), Key("default", "b")
#: Empty, small, on both sides of the inline limit, in a file, in a file of its own.
SIZES = [0, 1, 1000, INLINE_BYTES, INLINE_BYTES + 1, 3 * 2**20 + 7, SEGMENT_BYTES + 1]

BACKENDS: dict[str, Callable[[Path], Store]] = {
    "memory": lambda path: MemoryStore(path, kept_rows=KEPT_ROWS),
}


@pytest.fixture(params=BACKENDS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    made = BACKENDS[request.param](tmp_path)
    yield made
    made.close()


def event(key: Key, lsn: int, kind: str | None = None, **fields: Any) -> Event:
    kind = kind or ("create" if lsn == 1 else "step")
    values: dict[str, Any] = {"version": lsn - 1, "updates": lsn - 1, "time": 1e9 + lsn}
    return Event(key=key, lsn=lsn, kind=kind, **(values | fields))


def payload(store: Store, data: bytes, hint: int | None = None) -> Any:
    writer = store.writer(hint)
    writer.write(data)
    return writer.seal()


def commit(store: Store, *events: Event) -> None:
    for outcome in store.append(events):
        assert outcome.error is None, outcome.error


def filled(store: Store, key: Key, upto: int, *, size: int = 10) -> None:
    for lsn in range(1, upto + 1):
        commit(store, event(key, lsn, payload=payload(store, bytes([lsn % 256]) * size)))


def lsns(store: Store, key: Key, **where: Any) -> list[int]:
    return [e.lsn for e in store.events(key, **where)]


def noise(size: int) -> bytes:
    return np.random.default_rng(size).bytes(size)


# --- events --------------------------------------------------------------------------------------


def test_an_event_comes_back_as_it_was_committed(store: Store) -> None:
    sent = event(
        A,
        1,
        worker="w1",
        epoch=2,
        seq=3,
        idempotency_key="k",
        digest=b"\x00\xff" * 8,
        record={"reply": {"version": 0, "lr": 0.1}, "text": "ü\n", "none": None},
        loss=0.25,
        grad_norm=1e-300,
        owner_epoch=7,
        payload=payload(store, b"abc"),
    )
    commit(store, sent)
    [got] = store.events(A)
    assert got.payload is not None
    assert got.payload.read() == b"abc"
    assert replace(got, payload=None) == replace(sent, payload=None)


def test_what_a_caller_does_to_a_record_later_does_not_reach_the_store(store: Store) -> None:
    record: dict[str, Any] = {"groups": [{"lr": 1.0}]}
    commit(store, event(A, 1, record=record))
    record["groups"][0]["lr"] = 2.0
    [first] = store.events(A)
    first.record["groups"].clear()
    [second] = store.events(A)
    assert second.record == {"groups": [{"lr": 1.0}]}


def test_a_record_comes_back_as_json_makes_it(store: Store) -> None:
    commit(store, event(A, 1, record={"milestones": {3: (1, 2)}}))
    [got] = store.events(A)
    assert got.record == {"milestones": {"3": [1, 2]}}


@pytest.mark.parametrize(
    "fields",
    [
        {"record": {"lr": float("nan")}},
        {"record": {"lr": float("inf")}},
        {"record": {"blob": b"x"}},
        {"loss": float("nan")},
        {"grad_norm": float("inf")},
    ],
    ids=str,
)
def test_what_is_not_strict_json_is_refused(store: Store, fields: dict[str, Any]) -> None:
    [outcome] = store.append([event(A, 1, **fields)])
    assert isinstance(outcome.error, Internal)
    assert store.keys("default") == []


def test_a_create_is_refused_where_the_key_exists(store: Store) -> None:
    commit(store, event(A, 1))
    [outcome] = store.append([event(A, 1)])
    assert isinstance(outcome.error, SessionExists)
    [outcome] = store.append([event(A, 2, "create")])
    assert isinstance(outcome.error, SessionExists)
    assert lsns(store, A) == [1]


def test_any_other_event_is_refused_where_the_key_does_not_exist(store: Store) -> None:
    [outcome] = store.append([event(A, 1, "step")])
    assert isinstance(outcome.error, SessionNotFound)
    assert store.keys("default") == []


def test_a_create_has_lsn_1(store: Store) -> None:
    [outcome] = store.append([event(A, 2, "create")])
    assert isinstance(outcome.error, Internal)
    assert store.keys("default") == []


@pytest.mark.parametrize("lsn", [0, 1, 3, 5])
def test_an_lsn_that_is_not_the_next_one_is_refused_with_both_numbers(
    store: Store, lsn: int
) -> None:
    filled(store, A, 3)
    [outcome] = store.append([event(A, lsn, "step")])
    assert isinstance(outcome.error, Internal)
    assert outcome.error.detail == (
        f"event of session 'a' has lsn {lsn}, expected 4 (last committed 3)"
    )
    assert lsns(store, A) == [1, 2, 3]


def test_one_refused_event_takes_no_other_down(store: Store) -> None:
    commit(store, event(A, 1))
    outcomes = store.append(
        [event(A, 2), event(B, 5, "step"), event(A, 2), event(B, 1), event(A, 3), event(B, 2)]
    )
    assert [(o.key, o.lsn, o.error is None) for o in outcomes] == [
        (A, 2, True),
        (B, 5, False),
        (A, 2, False),
        (B, 1, True),
        (A, 3, True),
        (B, 2, True),
    ]
    assert lsns(store, A) == [1, 2, 3]
    assert lsns(store, B) == [1, 2]


def test_the_gap_behind_a_refused_event_is_refused_too(store: Store) -> None:
    outcomes = store.append([event(A, 1), event(A, 2, record={"x": float("nan")}), event(A, 3)])
    assert [o.error is None for o in outcomes] == [True, False, False]


def test_events_are_selected_by_lsn_and_kind(store: Store) -> None:
    filled(store, A, 3)
    commit(store, event(A, 4, "scheduler"), event(A, 5))
    assert lsns(store, A, after_lsn=1, upto_lsn=4) == [2, 3, 4]
    assert lsns(store, A, kinds={"create", "scheduler"}) == [1, 4]
    assert lsns(store, A, after_lsn=5) == []
    assert lsns(store, A, upto_lsn=99) == [1, 2, 3, 4, 5]
    assert lsns(store, B) == []


def test_events_yields_what_was_committed_when_it_was_called(store: Store) -> None:
    filled(store, A, 3)
    events = store.events(A)
    commit(store, event(A, 4))
    assert [e.lsn for e in events] == [1, 2, 3]


def test_the_same_session_id_under_two_tenants_is_two_sessions(store: Store) -> None:
    commit(store, event(Key("t1", "s"), 1), event(Key("t2", "s"), 1), event(Key("t1", "s"), 2))
    assert lsns(store, Key("t1", "s")) == [1, 2]
    assert lsns(store, Key("t2", "s")) == [1]
    assert store.keys("t1") == [Key("t1", "s")]


def test_keys_come_in_the_order_of_creation(store: Store) -> None:
    names = ["m", "z", "a", "k"]
    for name in names:
        commit(store, event(Key("default", name), 1))
    commit(store, event(Key("default", "m"), 2))
    assert [key.session for key in store.keys("default")] == names
    assert store.keys("nobody") == []


# --- owners --------------------------------------------------------------------------------------


def test_a_fenced_owner_commits_nothing(store: Store) -> None:
    commit(store, event(A, 1))
    epoch = store.claim(A)
    [outcome] = store.append([event(A, 2)])
    assert isinstance(outcome.error, Misdirected)
    assert outcome.error.detail == (
        f"event of session 'a' has owner_epoch 0, the current one is {epoch}"
    )
    commit(store, event(A, 2, owner_epoch=epoch))


def test_each_claim_is_above_all_before_it_also_across_keys_and_deletes(store: Store) -> None:
    commit(store, event(A, 1, owner_epoch=41))
    epochs = [store.claim(A), store.claim(B), store.claim(A)]
    store.delete(A)
    epochs += [store.claim(A), store.claim(B)]
    assert epochs == sorted(set(epochs))
    assert epochs[0] > 41


def test_the_epoch_of_a_create_becomes_the_current_one(store: Store) -> None:
    epoch = store.claim(A)
    commit(store, event(A, 1, owner_epoch=epoch), event(A, 2, owner_epoch=epoch))
    [outcome] = store.append([event(A, 3, owner_epoch=0)])
    assert isinstance(outcome.error, Misdirected)


# --- payloads ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("hinted", [True, False])
def test_a_payload_comes_back_byte_for_byte(store: Store, size: int, hinted: bool) -> None:
    data = noise(size)
    writer = store.writer(size if hinted else None)
    for at in range(0, size, 300_000):
        writer.write(memoryview(data)[at : at + 300_000])
    assert writer.nbytes == size
    sealed = writer.seal()
    commit(store, event(A, 1, payload=sealed))
    [got] = store.events(A)
    assert got.payload is not None
    assert got.payload.nbytes == size
    assert got.payload.read() == data
    assert b"".join(got.payload.chunks(size=100_001)) == data
    assert all(0 < len(c) <= 100_001 for c in got.payload.chunks(size=100_001))
    assert got.payload.digest == writer.digest() == xxhash.xxh3_128(data).digest()


def test_chunks_stay_valid_and_can_be_read_twice(store: Store) -> None:
    data = noise(5 * 2**20)
    sealed = payload(store, data)
    pieces = list(sealed.chunks())
    assert b"".join(pieces) == b"".join(sealed.chunks()) == data


def test_any_contiguous_buffer_can_be_written(store: Store) -> None:
    array = np.arange(50_000, dtype=np.float32).reshape(100, 500)
    writer = store.writer()
    for piece in (memoryview(array), bytearray(b"xy"), b"", memoryview(np.empty((0, 3)))):
        writer.write(piece)
    assert writer.seal().read() == array.tobytes() + b"xy"


def test_a_caller_may_overwrite_a_chunk_after_write(store: Store) -> None:
    writer = store.writer()
    chunk = bytearray(b"1234")
    writer.write(chunk)
    chunk[:] = b"xxxx"
    assert writer.seal().read() == b"1234"


@pytest.mark.parametrize("size", SIZES)
def test_a_discarded_writer_leaves_the_others_whole(store: Store, size: int) -> None:
    before = payload(store, noise(100_000))
    writer = store.writer(size)
    writer.write(noise(size))
    writer.discard()
    writer.discard()
    after = payload(store, noise(200_000))
    assert before.read() == noise(100_000)
    assert after.read() == noise(200_000)


def test_a_closed_writer_takes_nothing(store: Store) -> None:
    writer = store.writer()
    sealed = writer.seal()
    writer.discard()
    with pytest.raises(ValueError, match="sealed or discarded"):
        writer.write(b"x")
    with pytest.raises(ValueError, match="sealed or discarded"):
        writer.seal()
    assert sealed.read() == b""


def test_writers_that_are_open_together_do_not_mix(store: Store) -> None:
    writers = [store.writer(200_000) for _ in range(10)]
    for _ in range(20):
        for i, writer in enumerate(writers):
            writer.write(bytes([i]) * 10_000)
    sealed = [writer.seal() for writer in writers]
    assert [p.read() for p in sealed] == [bytes([i]) * 200_000 for i in range(10)]


# --- snapshots -----------------------------------------------------------------------------------


def test_the_newest_snapshot_at_or_below_an_lsn_is_found(store: Store) -> None:
    filled(store, A, 6)
    assert store.latest_snapshot(A) is None
    store.snapshot(A, 2, [b"two"])
    store.snapshot(A, 5, [b"fi", memoryview(b"ve")])
    for upto, want in [(None, (5, b"five")), (5, (5, b"five")), (4, (2, b"two")), (1, None)]:
        found = store.latest_snapshot(A, upto)
        assert (found and (found[0], found[1].read())) == want
    assert store.latest_snapshot(B) is None


def test_only_the_newest_two_snapshots_stay(store: Store) -> None:
    filled(store, A, 9)
    for lsn in (2, 5, 9):
        store.snapshot(A, lsn, [bytes([lsn])])
    assert store.latest_snapshot(A, 4) is None
    found = store.latest_snapshot(A, 8)
    assert found is not None
    assert found[0] == 5


def test_a_snapshot_of_the_same_lsn_replaces_the_one_before(store: Store) -> None:
    filled(store, A, 3)
    store.snapshot(A, 3, [b"old"])
    store.snapshot(A, 3, [b"new"])
    found = store.latest_snapshot(A)
    assert found is not None
    assert found[1].read() == b"new"
    assert all(e.payload is not None for e in store.events(A))


def test_a_large_snapshot_comes_back_byte_for_byte(store: Store) -> None:
    filled(store, A, 1)
    data = noise(2**21)
    store.snapshot(A, 1, (data[at : at + 65_000] for at in range(0, len(data), 65_000)))
    found = store.latest_snapshot(A)
    assert found is not None
    assert found[1].read() == data


def test_payloads_at_or_below_the_older_snapshot_go_and_their_rows_stay(store: Store) -> None:
    filled(store, A, 8)
    store.snapshot(A, 3, [b"s"])
    assert all(e.payload is not None for e in store.events(A))
    store.snapshot(A, 6, [b"s"])
    assert [e.payload is not None for e in store.events(A)] == [False] * 3 + [True] * 5
    assert [e.payload.read()[0] for e in store.events(A, after_lsn=3) if e.payload] == [
        4,
        5,
        6,
        7,
        8,
    ]


def test_who_reads_a_payload_reads_it_to_its_end_although_it_is_dropped(store: Store) -> None:
    filled(store, A, 3, size=200_000)
    held = list(store.events(A))
    chunks = [e.payload.chunks(1000) for e in held if e.payload]
    firsts = [bytes(next(c)) for c in chunks]
    store.snapshot(A, 2, [b"s"])
    store.snapshot(A, 3, [b"s"])
    store.delete(A)
    filled(store, B, 3, size=200_000)
    for lsn, (first, rest) in enumerate(zip(firsts, chunks, strict=True), start=1):
        assert first + b"".join(rest) == bytes([lsn]) * 200_000


def test_rows_below_the_older_snapshot_are_kept_up_to_a_limit(store: Store) -> None:
    filled(store, A, KEPT_ROWS + 10)
    store.snapshot(A, 5, [b"s"])
    store.snapshot(A, 12, [b"s"])
    assert lsns(store, A)[0] == 6  # 5 is all that may go, although 10 are too many
    store.snapshot(A, KEPT_ROWS + 10, [b"s"])
    assert lsns(store, A) == list(range(11, KEPT_ROWS + 11))
    assert lsns(store, A, after_lsn=3, upto_lsn=12) == [11, 12]
    commit(store, event(A, KEPT_ROWS + 11))
    assert lsns(store, A, after_lsn=KEPT_ROWS + 9) == [KEPT_ROWS + 10, KEPT_ROWS + 11]
    assert [e.payload is not None for e in store.events(A, after_lsn=11)] == [False] + [True] * (
        KEPT_ROWS - 2
    ) + [False]


@pytest.mark.parametrize("lsn", [0, 4, -1])
def test_a_snapshot_of_an_uncommitted_lsn_is_refused(store: Store, lsn: int) -> None:
    filled(store, A, 3)
    with pytest.raises(ValueError, match=rf"snapshot lsn must be in \[1, 3\], got {lsn}"):
        store.snapshot(A, lsn, [b"s"])
    assert store.latest_snapshot(A) is None


def test_a_snapshot_of_an_unknown_session_is_refused(store: Store) -> None:
    with pytest.raises(SessionNotFound):
        store.snapshot(A, 1, [b"s"])


def test_a_snapshot_that_fails_half_way_changes_nothing(store: Store) -> None:
    def torn() -> Iterator[bytes]:
        yield noise(100_000)
        raise RuntimeError("torn")

    filled(store, A, 3)
    store.snapshot(A, 1, [b"one"])
    with pytest.raises(RuntimeError, match="torn"):
        store.snapshot(A, 2, torn())
    found = store.latest_snapshot(A)
    assert found is not None
    assert (found[0], found[1].read()) == (1, b"one")
    assert all(e.payload is not None for e in store.events(A))


# --- end -----------------------------------------------------------------------------------------


def test_delete_forgets_everything_and_the_key_can_be_created_again(store: Store) -> None:
    filled(store, A, 3)
    filled(store, B, 1)
    store.snapshot(A, 2, [b"s"])
    assert store.delete(A) is True
    assert store.delete(A) is False
    assert lsns(store, A) == []
    assert store.latest_snapshot(A) is None
    assert store.keys("default") == [B]
    [outcome] = store.append([event(A, 4)])
    assert isinstance(outcome.error, SessionNotFound)
    commit(store, event(A, 1))
    assert store.keys("default") == [B, A]
    [got] = store.events(A)
    assert got.payload is None


def test_a_closed_store_says_so(store: Store) -> None:
    filled(store, A, 1)
    store.close()
    store.close()
    calls: list[Callable[[], object]] = [
        lambda: store.append([event(A, 2)]),
        lambda: store.writer(),
        lambda: store.events(A),
        lambda: store.keys("default"),
        lambda: store.latest_snapshot(A),
        lambda: store.snapshot(A, 1, []),
        lambda: store.delete(A),
        lambda: store.claim(A),
    ]
    for call in calls:
        with pytest.raises(Unavailable, match="the store is closed"):
            call()


def test_a_store_states_its_promise(store: Store) -> None:
    assert store.promise in {"always", "os", "memory"}


# --- threads -------------------------------------------------------------------------------------


def run_in_threads(count: int, work: Callable[[int], None]) -> None:
    errors: list[BaseException] = []

    def guarded(i: int) -> None:
        try:
            work(i)
        except BaseException as exc:
            errors.append(exc)

    threads = [threading.Thread(target=guarded, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_of_racing_appends_of_one_lsn_exactly_one_is_accepted(store: Store) -> None:
    won: list[tuple[int, int]] = []

    def race(i: int) -> None:
        for lsn in range(1, 101):
            [outcome] = store.append([event(A, lsn, record={"by": i})])
            if outcome.error is None:
                won.append((lsn, i))

    run_in_threads(4, race)
    assert sorted(lsn for lsn, _ in won) == list(range(1, len(won) + 1))
    assert [(e.lsn, e.record["by"]) for e in store.events(A)] == sorted(won)


def test_sessions_are_written_read_and_trimmed_in_parallel(store: Store) -> None:
    def work(i: int) -> None:
        key = Key("default", f"s{i}")
        for lsn in range(1, 41):
            data = bytes([i, lsn]) * (50_000 if lsn % 3 else 10)
            commit(store, event(key, lsn, payload=payload(store, data)))
            if lsn % 10 == 0:
                store.snapshot(key, lsn, [data])
        for e in store.events(key, after_lsn=30):
            assert e.payload is not None
            assert e.payload.read() == bytes([i, e.lsn]) * (50_000 if e.lsn % 3 else 10)
        assert [e.lsn for e in store.events(key)] == list(range(21, 41))

    run_in_threads(4, work)
    assert len(store.keys("default")) == 4


# --- the memory twin alone -----------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts descriptors in /proc")
def test_the_memory_twin_gives_descriptors_and_disk_back(tmp_path: Path) -> None:
    def open_files() -> int:
        return len(os.listdir("/proc/self/fd"))

    gc.collect()
    before = open_files()
    store = MemoryStore(tmp_path)
    for lsn in range(1, 201):
        commit(store, event(A, lsn, payload=payload(store, bytes(200_000))))
    assert open_files() - before <= 200 * 200_000 // SEGMENT_BYTES + 2
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []  # unlinked: kill -9 leaves nothing
    store.delete(A)
    store.close()
    assert open_files() == before
    assert list(tmp_path.iterdir()) == []


def test_the_spool_survives_a_cleaner_of_empty_folders(tmp_path: Path) -> None:
    store = MemoryStore(tmp_path)
    [folder] = tmp_path.iterdir()
    folder.rmdir()
    assert payload(store, noise(100_000)).read() == noise(100_000)
    store.close()


def test_a_full_disk_is_unavailable_and_the_writer_can_be_discarded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    store = MemoryStore()
    writer = store.writer(100_000)
    writer.write(noise(70_000))
    with monkeypatch.context() as patched:
        patched.setattr("optserve.store.payloads.os.pwrite", full)
        with pytest.raises(Unavailable, match="spool takes no more bytes: No space left on device"):
            writer.write(noise(70_000))
    writer.discard()
    assert payload(store, noise(100_000)).read() == noise(100_000)
    store.close()
