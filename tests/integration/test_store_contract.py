"""What every Store promises, run against each backend."""

from __future__ import annotations

import errno
import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from optserve.store import Key, MemoryStore, Store
from optserve.store.base import DURABILITIES, Durability
from optserve.store.payloads import INLINE_BYTES, SEGMENT_BYTES
from optserve_client.errors import (
    Damaged,
    Internal,
    Misdirected,
    SessionExists,
    SessionNotFound,
    Unavailable,
)
from tests.stores import (
    BACKENDS,
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

KEPT_ROWS = 20
A, B = Key("default", "a"), Key("default", "b")
#: Empty, small, on both sides of the inline limit, in a file, in a file of its own.
SIZES = [0, 1, 1000, INLINE_BYTES, INLINE_BYTES + 1, 3 * 2**20 + 7, SEGMENT_BYTES + 1]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Backend]:
    with make_backend(request.param, tmp_path) as made:
        yield made


@pytest.fixture
def store(backend: Backend) -> Iterator[Store]:
    made = backend.open(kept_rows=KEPT_ROWS)
    yield made
    made.close()


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
    assert store.sessions() == []


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
    assert store.sessions() == []


def test_a_create_has_lsn_1(store: Store) -> None:
    [outcome] = store.append([event(A, 2, "create")])
    assert isinstance(outcome.error, Internal)
    assert store.sessions() == []


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
    assert [row.key for row in store.sessions()] == [Key("t1", "s"), Key("t2", "s")]


def test_sessions_come_in_the_order_of_creation(store: Store) -> None:
    names = ["m", "z", "a", "k"]
    for name in names:
        commit(store, event(Key("default", name), 1))
    commit(store, event(Key("default", "m"), 2))
    assert [row.key.session for row in store.sessions()] == names


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


def frame(store: Store, key: Key, lsn: int) -> bytes | None:
    found = store.read_snapshot(key, lsn)
    return None if found is None else found.read()


def test_a_snapshot_is_read_by_its_lsn(store: Store) -> None:
    filled(store, A, 6)
    assert store.snapshots(A) == []
    snapshot(store, A, 2, b"two")
    snapshot(store, A, 5, b"five")
    assert kept(store, A) == [2, 5]
    assert [frame(store, A, lsn) for lsn in (2, 5)] == [b"two", b"five"]
    assert [frame(store, A, lsn) for lsn in (1, 3, 6)] == [None] * 3
    assert frame(store, B, 2) is None


def test_the_row_of_a_snapshot_says_what_it_is(store: Store) -> None:
    filled(store, A, 3)
    before = time.time()
    snapshot(store, A, 3, b"three", pin="best")
    [row] = store.snapshots(A)
    assert (row.lsn, row.version, row.nbytes, row.pin) == (3, 2, 5, "best")
    assert before <= row.time <= time.time()


def test_only_the_newest_two_snapshots_stay(store: Store) -> None:
    filled(store, A, 9)
    for lsn in (2, 5, 9):
        snapshot(store, A, lsn)
    assert kept(store, A) == [5, 9]
    assert frame(store, A, 2) is None
    snapshot(store, A, 3)
    assert kept(store, A) == [5, 9]


def test_a_snapshot_of_the_same_lsn_replaces_the_one_before(store: Store) -> None:
    filled(store, A, 3)
    snapshot(store, A, 3, noise(100_000))
    snapshot(store, A, 3, b"new")
    assert kept(store, A) == [3]
    assert frame(store, A, 3) == b"new"
    assert all(e.payload is not None for e in store.events(A))


@pytest.mark.parametrize("size", SIZES)
def test_a_frame_comes_back_byte_for_byte(store: Store, size: int) -> None:
    filled(store, A, 1)
    snapshot(store, A, 1, noise(size))
    found = store.read_snapshot(A, 1)
    assert found is not None
    assert found.read() == b"".join(found.chunks(100_001)) == noise(size)


@pytest.mark.parametrize("durability", DURABILITIES)
def test_a_frame_may_come_from_any_writer_of_the_store(
    store: Store, durability: Durability
) -> None:
    filled(store, A, 2)
    for lsn, size in ((1, 10), (2, 200_000)):
        store.snapshot(A, lsn, payload(store, noise(size), size, durability))
        assert frame(store, A, lsn) == noise(size)


def test_payloads_at_or_below_the_older_snapshot_go_and_their_rows_stay(store: Store) -> None:
    filled(store, A, 8)
    snapshot(store, A, 3)
    assert all(e.payload is not None for e in store.events(A))
    snapshot(store, A, 6)
    assert [e.payload is not None for e in store.events(A)] == [False] * 3 + [True] * 5
    above = [e.payload.read()[0] for e in store.events(A, after_lsn=3) if e.payload]
    assert above == [4, 5, 6, 7, 8]


def test_who_reads_a_payload_reads_it_to_its_end_although_it_is_dropped(store: Store) -> None:
    filled(store, A, 3, size=200_000)
    held = list(store.events(A))
    chunks = [e.payload.chunks(1000) for e in held if e.payload]
    firsts = [bytes(next(c)) for c in chunks]
    snapshot(store, A, 2)
    snapshot(store, A, 3)
    store.delete(A)
    filled(store, B, 3, size=200_000)
    for lsn, (first, rest) in enumerate(zip(firsts, chunks, strict=True), start=1):
        assert first + b"".join(rest) == bytes([lsn]) * 200_000
    # And again from the start, by who has only held it until now.
    assert [e.payload.read()[0] for e in held if e.payload] == [1, 2, 3]


def test_who_reads_a_frame_reads_it_to_its_end_although_it_is_dropped(store: Store) -> None:
    filled(store, A, 3)
    snapshot(store, A, 1, noise(200_000))
    held = store.read_snapshot(A, 1)
    assert held is not None
    snapshot(store, A, 2)
    snapshot(store, A, 3)
    store.delete(A)
    assert held.read() == noise(200_000)


@pytest.mark.parametrize("size", [10, 100_000])
def test_events_that_are_walked_while_they_are_dropped_come_all(store: Store, size: int) -> None:
    filled(store, A, 200)
    commit(store, event(A, 201, payload=payload(store, noise(size))))
    walk = store.events(A)
    first = next(walk)
    snapshot(store, A, 200)
    snapshot(store, A, 201)
    rest = list(walk)
    assert [e.lsn for e in (first, *rest)] == list(range(1, 202))
    assert all(e.payload is None or e.payload.read() for e in rest)


def test_rows_below_the_older_snapshot_are_kept_up_to_a_limit(store: Store) -> None:
    filled(store, A, KEPT_ROWS + 10)
    snapshot(store, A, 5)
    snapshot(store, A, 12)
    assert lsns(store, A)[0] == 6  # 5 is all that may go, although 10 are too many
    snapshot(store, A, KEPT_ROWS + 10)
    assert lsns(store, A) == list(range(11, KEPT_ROWS + 11))
    assert lsns(store, A, after_lsn=3, upto_lsn=12) == [11, 12]
    commit(store, event(A, KEPT_ROWS + 11))
    assert lsns(store, A, after_lsn=KEPT_ROWS + 9) == [KEPT_ROWS + 10, KEPT_ROWS + 11]
    whole = [e.payload is not None for e in store.events(A, after_lsn=11)]
    assert whole == [False] + [True] * (KEPT_ROWS - 2) + [False]


@pytest.mark.parametrize("lsn", [0, 4, -1])
def test_a_snapshot_of_an_uncommitted_lsn_is_refused(store: Store, lsn: int) -> None:
    filled(store, A, 3)
    with pytest.raises(ValueError, match=rf"snapshot lsn must be in \[1, 3\], got {lsn}"):
        snapshot(store, A, lsn)
    assert store.snapshots(A) == []


def test_a_snapshot_of_an_unknown_session_is_refused(store: Store) -> None:
    with pytest.raises(SessionNotFound):
        snapshot(store, A, 1)


class _Torn:
    """A payload whose medium has lost its end."""

    nbytes = 100_000
    digest = b"\0" * 16

    def chunks(self, size: int = 1000) -> Iterator[memoryview]:
        yield memoryview(bytes(1000))
        raise Damaged("torn")

    def read(self) -> bytes:
        return b"".join(self.chunks())

    def discard(self) -> None:
        pass


def test_a_frame_that_does_not_read_back_changes_nothing(store: Store) -> None:
    filled(store, A, 3)
    snapshot(store, A, 1, b"one")
    with pytest.raises(Damaged, match="torn"):
        store.snapshot(A, 2, _Torn())
    assert kept(store, A) == [1]
    assert frame(store, A, 1) == b"one"
    assert all(e.payload is not None for e in store.events(A))


# --- pins ----------------------------------------------------------------------------------------


def test_a_pinned_snapshot_stays_until_it_is_let_go(store: Store) -> None:
    filled(store, A, 9)
    snapshot(store, A, 2, b"two", pin="best")
    for lsn in (5, 7, 9):
        snapshot(store, A, lsn)
    assert [(r.lsn, r.pin) for r in store.snapshots(A)] == [(2, "best"), (7, None), (9, None)]
    assert frame(store, A, 2) == b"two"
    assert store.unpin(A, 2) is True
    assert kept(store, A) == [7, 9]
    assert frame(store, A, 2) is None


def test_letting_go_of_what_is_not_pinned_does_nothing(store: Store) -> None:
    filled(store, A, 3)
    snapshot(store, A, 2)
    assert store.unpin(A, 2) is False
    assert store.unpin(A, 3) is False
    assert store.unpin(B, 1) is False
    assert kept(store, A) == [2]


def test_a_pin_among_the_newest_two_stays_without_its_name(store: Store) -> None:
    filled(store, A, 3)
    snapshot(store, A, 3, pin="p")
    assert store.unpin(A, 3) is True
    assert [(r.lsn, r.pin) for r in store.snapshots(A)] == [(3, None)]


def test_a_snapshot_that_replaces_a_pinned_one_keeps_its_pin(store: Store) -> None:
    filled(store, A, 3)
    snapshot(store, A, 3, pin="p")
    snapshot(store, A, 3, b"new")
    assert [(r.lsn, r.pin) for r in store.snapshots(A)] == [(3, "p")]
    snapshot(store, A, 3, pin="q")
    assert [r.pin for r in store.snapshots(A)] == ["q"]


def test_a_pinned_snapshot_counts_among_the_newest_two(store: Store) -> None:
    filled(store, A, 9)
    snapshot(store, A, 9, pin="p")
    for lsn in (3, 5):
        snapshot(store, A, lsn)
    assert kept(store, A) == [5, 9]
    assert [e.lsn for e in store.events(A) if e.payload] == [6, 7, 8, 9]


# --- rewinds -------------------------------------------------------------------------------------


def test_a_rewind_drops_what_is_behind_it(store: Store) -> None:
    filled(store, A, 6, size=100_000)
    snapshot(store, A, 2)
    snapshot(store, A, 5, noise(100_000))
    commit(store, event(A, 4, "rewind", payload=payload(store, b"new")))
    assert [(e.lsn, e.kind) for e in store.events(A)][2:] == [(3, "step"), (4, "rewind")]
    assert kept(store, A) == [2]
    assert frame(store, A, 5) is None
    commit(store, event(A, 5, payload=payload(store, noise(100_000))))
    got = [e.payload.read() for e in store.events(A, after_lsn=3) if e.payload]
    assert got == [b"new", noise(100_000)]
    row = store.session(A)
    assert row is not None
    assert (row.last_lsn, row.version, row.suspect) == (5, 4, False)


def test_a_rewind_can_follow_the_last_event(store: Store) -> None:
    filled(store, A, 3)
    commit(store, event(A, 4, "rewind"))
    assert lsns(store, A) == [1, 2, 3, 4]


@pytest.mark.parametrize("lsn", [0, 1, 5])
def test_a_rewind_begins_behind_the_create_and_leaves_no_gap(store: Store, lsn: int) -> None:
    filled(store, A, 3)
    [outcome] = store.append([event(A, lsn, "rewind")])
    assert isinstance(outcome.error, Internal)
    assert lsns(store, A) == [1, 2, 3]
    assert [e.payload is not None for e in store.events(A)] == [True] * 3


def test_a_rewind_of_no_session_or_by_a_fenced_owner_is_refused(store: Store) -> None:
    [outcome] = store.append([event(A, 2, "rewind")])
    assert isinstance(outcome.error, SessionNotFound)
    filled(store, A, 3)
    store.claim(A)
    [outcome] = store.append([event(A, 2, "rewind")])
    assert isinstance(outcome.error, Misdirected)
    assert lsns(store, A) == [1, 2, 3]


def test_a_rewind_below_the_older_snapshot_lets_new_events_keep_their_payloads(
    store: Store,
) -> None:
    filled(store, A, 6)
    snapshot(store, A, 4)
    snapshot(store, A, 6)
    commit(store, event(A, 2, "rewind", payload=payload(store, b"r")))
    commit(store, event(A, 3, payload=payload(store, b"s")))
    assert [e.payload and e.payload.read() for e in store.events(A)] == [None, b"r", b"s"]
    assert kept(store, A) == []


# --- durability ----------------------------------------------------------------------------------


@pytest.mark.parametrize("durability", DURABILITIES)
@pytest.mark.parametrize("size", [10, 200_000])
def test_events_of_each_durability_are_seen_at_once(
    store: Store, durability: Durability, size: int
) -> None:
    filled(store, A, 5, size=size, durability=durability)
    assert lsns(store, A) == [1, 2, 3, 4, 5]
    assert [e.payload.read() for e in store.events(A) if e.payload] == [
        bytes([lsn]) * size for lsn in range(1, 6)
    ]
    assert lsns(store, A, after_lsn=2, upto_lsn=4) == [3, 4]
    assert lsns(store, A, kinds={"create"}) == [1]
    row = store.session(A)
    assert row is not None
    assert (row.last_lsn, row.version, row.changed) == (5, 4, 1e9 + 5)
    assert [store.first_at(A, version) for version in range(6)] == [1, 2, 3, 4, 5, None]
    assert [e.payload for e in store.events(A, payloads=False)] == [None] * 5


@pytest.mark.parametrize("durability", DURABILITIES)
def test_refusals_are_the_same_at_each_durability(store: Store, durability: Durability) -> None:
    filled(store, A, 3, durability=durability)
    for lsn in (2, 3, 5):
        [outcome] = store.append([event(A, lsn, durability=durability)])
        assert isinstance(outcome.error, Internal)
        assert outcome.error.detail == (
            f"event of session 'a' has lsn {lsn}, expected 4 (last committed 3)"
        )
    [outcome] = store.append([event(A, 1, durability=durability)])
    assert isinstance(outcome.error, SessionExists)
    bad = event(A, 4, record={"x": float("nan")}, durability=durability)
    [outcome] = store.append([bad])
    assert isinstance(outcome.error, Internal)
    epoch = store.claim(A)
    [outcome] = store.append([event(A, 4, durability=durability)])
    assert isinstance(outcome.error, Misdirected)
    commit(store, event(A, 4, owner_epoch=epoch, durability=durability))
    [outcome] = store.append([event(B, 2, durability=durability)])
    assert isinstance(outcome.error, SessionNotFound)
    assert lsns(store, A) == [1, 2, 3, 4]


def test_sessions_of_all_durabilities_share_one_call(store: Store) -> None:
    keys = {d: Key("default", d) for d in DURABILITIES}
    batch = [event(keys[d], lsn, durability=d) for lsn in range(1, 5) for d in DURABILITIES]
    batch.insert(4, event(A, 7))
    outcomes = store.append(batch)
    assert [(o.key, o.lsn) for o in outcomes] == [(e.key, e.lsn) for e in batch]
    assert [i for i, o in enumerate(outcomes) if o.error is not None] == [4]
    for key in keys.values():
        assert lsns(store, key) == [1, 2, 3, 4]


def test_a_session_may_change_between_always_and_os(store: Store) -> None:
    order: list[Durability] = ["always", "os", "os", "always", "os", "always", "always"]
    for lsn, durability in enumerate(order, start=1):
        data = payload(store, noise(100_000 + lsn), 100_000, durability)
        commit(store, event(A, lsn, payload=data, durability=durability))
    assert lsns(store, A) == list(range(1, 8))
    assert [e.payload.nbytes for e in store.events(A) if e.payload] == [
        100_000 + lsn for lsn in range(1, 8)
    ]


def test_a_snapshot_ends_what_memory_alone_has(store: Store) -> None:
    filled(store, A, 4, durability="memory")
    snapshot(store, A, 4, b"four")
    commit(store, event(A, 5), event(A, 6, durability="os"))
    assert lsns(store, A) == [1, 2, 3, 4, 5, 6]
    commit(store, event(A, 7, durability="memory"), event(A, 8, durability="memory"))
    assert lsns(store, A) == list(range(1, 9))


def test_a_snapshot_in_the_middle_of_what_memory_alone_has(store: Store) -> None:
    filled(store, A, 6, durability="memory")
    snapshot(store, A, 3, b"three")
    assert lsns(store, A) == [1, 2, 3, 4, 5, 6]
    assert [e.payload.read()[0] for e in store.events(A, after_lsn=3) if e.payload] == [4, 5, 6]
    commit(store, event(A, 7, durability="memory"))
    snapshot(store, A, 7, b"seven")
    assert lsns(store, A) == list(range(1, 8))
    assert [store.first_at(A, version) for version in (0, 3, 6, 7)] == [1, 4, 7, None]


@pytest.mark.parametrize("lsn", [2, 4, 6])
def test_a_rewind_of_what_memory_alone_has(store: Store, lsn: int) -> None:
    filled(store, A, 5, size=100_000, durability="memory")
    commit(store, event(A, lsn, "rewind", durability="memory"))
    assert lsns(store, A) == list(range(1, lsn + 1))
    commit(store, event(A, lsn + 1, durability="memory"))
    assert lsns(store, A) == list(range(1, lsn + 2))
    assert [e.payload.read() for e in store.events(A) if e.payload] == [
        bytes([at]) * 100_000 for at in range(1, lsn)
    ]


def test_deleting_what_memory_alone_has(store: Store) -> None:
    filled(store, A, 3, durability="memory")
    assert store.delete(A) is True
    assert lsns(store, A) == []
    filled(store, A, 2, durability="memory")
    assert lsns(store, A) == [1, 2]


# --- what a store knows of a session -------------------------------------------------------------


def test_the_row_of_a_session_follows_its_events(store: Store) -> None:
    create = event(A, 1, idempotency_key="k", digest=b"d", about={"name": "ü", "lr": [1]})
    commit(store, create)
    row = store.session(A)
    assert row is not None
    assert row == store.sessions()[0]
    assert (row.last_lsn, row.version, row.updates, row.created) == (1, 0, 0, create.time)
    assert (row.create_key, row.create_digest, row.suspect) == ("k", b"d", False)
    assert row.about == {"name": "ü", "lr": [1]}
    commit(store, event(A, 2, version=7, updates=3, digest=b"x", idempotency_key="l"))
    row = store.session(A)
    assert row is not None
    assert (row.last_lsn, row.version, row.updates) == (2, 7, 3)
    assert (row.created, row.changed) == (create.time, 1e9 + 2)
    assert row.about == {"name": "ü", "lr": [1]}
    assert (row.create_key, row.create_digest) == ("k", b"d")
    commit(store, event(A, 3, about={"name": "v"}))
    row = store.session(A)
    assert row is not None
    assert row.about == {"name": "v"}
    assert store.session(B) is None


@pytest.mark.parametrize("about", [{"x": float("nan")}, {"x": b""}], ids=str)
def test_what_stands_in_a_list_is_strict_json(store: Store, about: dict[str, Any]) -> None:
    [outcome] = store.append([event(A, 1, about=about)])
    assert isinstance(outcome.error, Internal)
    assert store.sessions() == []


def test_the_first_event_of_a_version_is_found(store: Store) -> None:
    for lsn, version in enumerate([0, 0, 1, 2, 2, 2, 5], start=1):
        commit(store, event(A, lsn, version=version))
    found = [store.first_at(A, version) for version in range(-1, 7)]
    assert found == [1, 1, 3, 4, 7, 7, 7, None]
    assert store.first_at(B, 0) is None


def test_the_first_event_of_a_version_is_found_among_the_kept_ones(store: Store) -> None:
    filled(store, A, KEPT_ROWS + 10)
    snapshot(store, A, 5)
    snapshot(store, A, 12)
    assert [store.first_at(A, version) for version in (0, 5, 6, 20)] == [6, 6, 7, 21]


# --- end -----------------------------------------------------------------------------------------


def test_delete_forgets_everything_and_the_key_can_be_created_again(store: Store) -> None:
    filled(store, A, 3)
    filled(store, B, 1)
    snapshot(store, A, 2)
    assert store.delete(A) is True
    assert store.delete(A) is False
    assert lsns(store, A) == []
    assert store.snapshots(A) == []
    assert store.read_snapshot(A, 2) is None
    assert [row.key for row in store.sessions()] == [B]
    [outcome] = store.append([event(A, 4)])
    assert isinstance(outcome.error, SessionNotFound)
    commit(store, event(A, 1))
    assert [row.key for row in store.sessions()] == [B, A]
    [got] = store.events(A)
    assert got.payload is None


def test_a_closed_store_says_so(store: Store) -> None:
    filled(store, A, 1)
    frame = payload(store, b"s")
    store.close()
    store.close()
    calls: list[Callable[[], object]] = [
        lambda: store.append([event(A, 2)]),
        lambda: store.writer(),
        lambda: store.events(A),
        lambda: store.submit([event(A, 2)]),
        lambda: store.sessions(),
        lambda: store.session(A),
        lambda: store.first_at(A, 0),
        lambda: store.snapshots(A),
        lambda: store.read_snapshot(A, 1),
        lambda: store.snapshot(A, 1, frame),
        lambda: store.unpin(A, 1),
        lambda: store.delete(A),
        lambda: store.claim(A),
    ]
    for call in calls:
        with pytest.raises(Unavailable, match="the store is closed"):
            call()


def test_a_store_states_its_promise(store: Store) -> None:
    assert store.promise == ("memory" if store.name == "memory" else "always")
    assert store.name in {"memory", "sqlite", "postgresql"}


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


def test_calls_that_do_not_wait_are_committed_in_their_order(store: Store) -> None:
    sizes = [10, 300_000, 0, 70_000, 5]
    futures = []
    for lsn in range(1, 41):
        data = payload(store, noise(sizes[lsn % 5]))
        futures.append(store.submit([event(A, lsn, payload=data)]))
    for lsn, future in enumerate(futures, start=1):
        [outcome] = future.result(timeout=60)
        assert (outcome.lsn, outcome.error) == (lsn, None)
    assert lsns(store, A) == list(range(1, 41))


def test_what_a_future_has_answered_is_seen_by_every_later_call(store: Store) -> None:
    def work(i: int) -> None:
        key = Key("default", f"s{i}")
        for lsn in range(1, 31):
            [outcome] = store.submit([event(key, lsn)]).result(timeout=60)
            assert outcome.error is None
            row = store.session(key)
            assert row is not None
            assert row.last_lsn == lsn
            assert lsns(store, key, after_lsn=lsn - 1) == [lsn]

    run_in_threads(8, work)


def test_no_events_are_no_outcomes(store: Store) -> None:
    assert store.append([]) == []
    assert store.submit([]).result(timeout=60) == []


def test_a_store_finishes_what_was_submitted_before_it_is_closed(backend: Backend) -> None:
    store = backend.open()
    futures = [
        store.submit([event(A, lsn, payload=payload(store, noise(80_000)))]) for lsn in range(1, 21)
    ]
    store.close()
    assert [future.result(timeout=60)[0].error for future in futures] == [None] * 20


def test_sessions_are_written_read_and_trimmed_in_parallel(store: Store) -> None:
    def work(i: int) -> None:
        key = Key("default", f"s{i}")
        for lsn in range(1, 41):
            data = bytes([i, lsn]) * (50_000 if lsn % 3 else 10)
            commit(store, event(key, lsn, payload=payload(store, data)))
            if lsn % 10 == 0:
                snapshot(store, key, lsn, data)
        for e in store.events(key, after_lsn=30):
            assert e.payload is not None
            assert e.payload.read() == bytes([i, e.lsn]) * (50_000 if e.lsn % 3 else 10)
        assert [e.lsn for e in store.events(key)] == list(range(21, 41))

    run_in_threads(4, work)
    assert len(store.sessions()) == 4


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


def test_the_key_that_created_a_deleted_session_stays_known_for_a_day(backend: Backend) -> None:
    store = backend.open(kept_rows=KEPT_ROWS)
    now = time.time()
    old = {"idempotency_key": "old", "digest": b"1", "time": now - 25 * 3600}
    commit(store, event(A, 1, **old))
    commit(store, event(B, 1, idempotency_key="b", digest=b"2", time=now))
    commit(store, event(Key("default", "c"), 1))
    for key in (A, B, Key("default", "c")):
        assert store.delete(key)
    # Created again by the same key, and deleted again: still one.
    commit(store, event(B, 1, idempotency_key="b", digest=b"3", time=now + 1))
    store.delete(B)
    if backend.name != "memory":
        store.close()
        store = backend.open(kept_rows=KEPT_ROWS)
    spent = [row for row in store.spent_keys() if row.idempotency_key != "old"]
    assert [(row.key, row.idempotency_key, row.digest) for row in spent][-1] == (B, "b", b"3")
    if backend.name != "memory":
        assert len(store.spent_keys()) == 1
    store.close()
