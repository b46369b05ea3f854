"""The journal's copy of a large body: in order, whole, and never of memory that was given back."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import xxhash

from optserve.sessions.journaling import BEHIND_BYTES, Journaling, JournalingBehind, Unkept
from optserve.sessions.turn import Executor
from optserve_client.errors import Unavailable

LIMIT_S = 10


class Writer:
    """A payload writer that can be held up, and fail."""

    def __init__(self) -> None:
        self.written = bytearray()
        self.open = threading.Event()
        self.open.set()
        self.busy = threading.Event()
        self.failure: Exception | None = None
        self.sealed = self.discarded = False

    def write(self, chunk: Any) -> None:
        self.busy.set()
        assert self.open.wait(LIMIT_S)
        if self.failure is not None:
            raise self.failure
        self.written += chunk

    def digest(self) -> bytes:
        return xxhash.xxh3_128_digest(self.written)

    def seal(self) -> Any:
        self.sealed = True
        return "payload"

    def discard(self) -> None:
        self.discarded = True


@pytest.fixture
def executor() -> Iterator[Executor]:
    executor = Executor(2)
    yield executor
    executor.close()


def pieces(count: int, size: int) -> list[memoryview]:
    return [memoryview(bytes([i % 251]) * size) for i in range(count)]


@pytest.mark.parametrize("size", [10, 70_000, BEHIND_BYTES, 3 * BEHIND_BYTES])
def test_everything_is_written_in_order(executor: Executor, size: int) -> None:
    for kind in (Journaling, lambda w: JournalingBehind(w, executor)):
        writer: Any = Writer()
        journaling = kind(writer)
        for piece in pieces(12, size):
            journaling.add(piece)
        journaling.drain()
        digest, payload = journaling.seal()
        assert bytes(writer.written) == b"".join(pieces(12, size))
        assert (digest, payload) == (writer.digest(), "payload")


def test_who_adds_does_not_wait_for_the_writing(executor: Executor) -> None:
    writer: Any = Writer()
    journaling = JournalingBehind(writer, executor)
    writer.open.clear()
    for piece in pieces(5, BEHIND_BYTES):
        journaling.add(piece)
    assert writer.busy.wait(LIMIT_S)
    assert not writer.written
    writer.open.set()
    journaling.drain()
    assert len(writer.written) == 5 * BEHIND_BYTES


def test_memory_is_given_back_when_nobody_reads_it_any_more(executor: Executor) -> None:
    writer: Any = Writer()
    released = threading.Event()
    journaling = JournalingBehind(writer, executor)
    writer.open.clear()
    journaling.add(pieces(1, BEHIND_BYTES)[0])
    assert writer.busy.wait(LIMIT_S)
    journaling.abandon(released.set)
    assert not released.is_set()
    writer.open.set()
    assert released.wait(LIMIT_S)
    assert writer.discarded
    assert not writer.sealed


def test_memory_that_nobody_reads_is_given_back_at_once(executor: Executor) -> None:
    for journaling in (Journaling(Writer()), JournalingBehind(Writer(), executor)):  # type: ignore[arg-type]
        released: list[int] = []
        journaling.add(pieces(1, 10)[0])
        journaling.abandon(lambda released=released: released.append(1))  # type: ignore[misc]
        assert released == [1]


def test_what_failed_behind_is_raised_to_who_goes_on(executor: Executor) -> None:
    writer: Any = Writer()
    writer.failure = Unavailable("the disk is gone")
    journaling = JournalingBehind(writer, executor)
    with pytest.raises(Unavailable, match="the disk is gone"):
        for piece in pieces(1000, BEHIND_BYTES):
            journaling.add(piece)
            writer.busy.wait(LIMIT_S)
    with pytest.raises(Unavailable, match="the disk is gone"):
        journaling.drain()


def test_a_closed_executor_is_told_to_who_adds() -> None:
    executor = Executor(1)
    executor.close()
    journaling = JournalingBehind(Writer(), executor)  # type: ignore[arg-type]
    with pytest.raises(Unavailable):
        journaling.add(pieces(1, BEHIND_BYTES)[0])
    journaling.drain()


def test_what_is_not_kept_has_its_digest() -> None:
    unkept = Unkept()
    unkept.write(b"ab")
    unkept.write(memoryview(b"c"))
    assert Journaling(unkept).seal() == (xxhash.xxh3_128_digest(b"abc"), None)
