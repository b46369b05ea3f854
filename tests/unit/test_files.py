"""Payload files, on a disk that fails, waits and forgets on demand, and on the real one."""

from __future__ import annotations

import ctypes
import errno
import gc
import mmap
import random
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import xxhash

from optserve.store import behind as behind_module
from optserve.store.base import DURABILITIES
from optserve.store.disk import DirectorySync
from optserve.store.files import INLINE_BYTES, FilePayload, OsDisk, PayloadFiles
from optserve.store.payloads import InlinePayload, SpooledPayload
from optserve_client.errors import Damaged, OutOfSpace, Unavailable
from tests.disk import Fault, Log, LossyDisk, Medium

LARGE = INLINE_BYTES + 1
WHERE = Path("/payloads")
LIMIT_S = 30


class Faults:
    """One fault for the n-th of an operation, and gates that operations wait at."""

    def __init__(self) -> None:
        self.due: dict[tuple[str, int], Fault] = {}
        self.gates: dict[str, threading.Event] = {}
        self.entered: dict[str, threading.Semaphore] = {}
        self.counts: dict[str, int] = {}

    def __call__(self, operation: str, name: str) -> Fault | None:
        self.counts[operation] = number = self.counts.get(operation, 0) + 1
        if (gate := self.gates.get(operation)) is not None:
            self.entered[operation].release()
            assert gate.wait(LIMIT_S)
        return self.due.get((operation, number))

    def gate(self, operation: str) -> threading.Event:
        """Let the operation wait for the event; ``entered[operation]`` counts those that do."""
        self.entered[operation] = threading.Semaphore(0)
        self.gates[operation] = threading.Event()
        return self.gates[operation]


@pytest.fixture
def faults() -> Faults:
    return Faults()


@pytest.fixture
def disk(faults: Faults) -> LossyDisk:
    return LossyDisk({}, Log(), faults)


@pytest.fixture
def files(disk: LossyDisk) -> Iterator[PayloadFiles]:
    files = PayloadFiles(WHERE, disk)
    yield files
    files.close()


@pytest.fixture
def real(tmp_path: Path) -> Iterator[PayloadFiles]:
    files = PayloadFiles(tmp_path / "a" / "payloads")
    yield files
    files.close()


def bytes_of(nbytes: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(nbytes)


def written(files: PayloadFiles, data: bytes, durability: str = "always") -> FilePayload:
    writer = files.writer(None, durability)  # type: ignore[arg-type]
    writer.write(data)
    payload = writer.seal()
    assert isinstance(payload, FilePayload)
    return payload


def named(disk: LossyDisk, data: bytes, name: str = "0123") -> PayloadFiles:
    """Files of a later process, which finds one."""
    return PayloadFiles(WHERE, LossyDisk({name: data}, disk.log))


def kinds(disk: LossyDisk) -> list[str]:
    return [operation[0] for operation in disk.log.operations]


def poll(condition: Callable[[], bool]) -> None:
    ended = threading.Event()
    for _ in range(LIMIT_S * 100):
        if condition():
            return
        ended.wait(0.01)
    pytest.fail("waited in vain")


# --- writing ---


@pytest.mark.parametrize("durability", DURABILITIES)
@pytest.mark.parametrize("hint", [None, 0, LARGE, 3 * 2**20])
@pytest.mark.parametrize("nbytes", [0, 1, INLINE_BYTES, LARGE, 3 * 2**20 + 7])
def test_what_was_written_comes_back(
    real: PayloadFiles, nbytes: int, hint: int | None, durability: str
) -> None:
    data = bytes_of(nbytes)
    writer = real.writer(hint, durability)  # type: ignore[arg-type]
    for at in range(0, nbytes, 100_000):
        writer.write(memoryview(data)[at : at + 100_000])
    payload = writer.seal()
    real.settle(payload)
    real.verify(payload)
    assert payload.read() == b"".join(payload.chunks(70_000)) == data
    assert payload.nbytes == nbytes
    assert payload.digest == writer.digest() == xxhash.xxh3_128_digest(data)
    large = nbytes > INLINE_BYTES or (nbytes > 0 and (hint or 0) > INLINE_BYTES)
    kind = (SpooledPayload if durability == "memory" else FilePayload) if large else InlinePayload
    assert type(payload) is kind
    in_files = 1 if kind is FilePayload else 0
    assert len(real.disk.names(real.directory)) == in_files


def test_files_are_the_owners_alone(real: PayloadFiles) -> None:
    payload = written(real, bytes_of(LARGE))
    assert real.directory.stat().st_mode & 0o777 == 0o700
    assert payload.file.path.stat().st_mode & 0o777 == 0o600


def test_every_large_payload_has_a_name_of_its_own(tmp_path: Path) -> None:
    names = set()
    for _ in range(3):
        files = PayloadFiles(tmp_path / "payloads")
        names |= {written(files, bytes_of(LARGE)).name for _ in range(5)}
        files.close()
    assert len(names) == len(list((tmp_path / "payloads").iterdir())) == 15


def test_settled_means_bytes_and_name_are_durable(files: PayloadFiles, disk: LossyDisk) -> None:
    data = bytes_of(3 * 2**20)
    payload = written(files, data)
    files.settle(payload)
    medium = Medium({})
    for operation in disk.log.operations:
        medium.apply(operation)
    rng = random.Random(1)
    for _ in range(50):
        assert medium.sample(rng) == {payload.name: data}


def test_the_sync_begins_when_the_payload_is_sealed(
    files: PayloadFiles, disk: LossyDisk, faults: Faults
) -> None:
    gate = faults.gate("datasync")
    payload = written(files, bytes_of(LARGE))
    assert faults.entered["datasync"].acquire(timeout=LIMIT_S)  # nobody called settle
    assert payload.read() == bytes_of(LARGE)  # nor waits for it
    gate.set()
    files.settle(payload)


def test_os_is_written_but_not_synced_until_the_flush(files: PayloadFiles, disk: LossyDisk) -> None:
    payload = written(files, bytes_of(LARGE), "os")
    other = written(files, bytes_of(LARGE), "os")
    assert disk.contents()[payload.name] == bytes_of(LARGE)
    assert "file_sync" not in kinds(disk)
    other.discard()
    name = payload.name
    del payload  # its event was committed
    files.flush()
    files.flush()
    assert kinds(disk).count("file_sync") == 1
    assert set(disk.contents()) == {name}


def test_a_flush_that_failed_fails_again(files: PayloadFiles, faults: Faults) -> None:
    payload = written(files, bytes_of(LARGE), "os")
    name = payload.name
    faults.due["datasync", 1] = errno.EIO
    del payload
    for _ in range(2):
        with pytest.raises(Unavailable, match=r"^cannot sync the payloads: Input/output error$"):
            files.flush([name])
    files.flush(["others"])
    assert faults.counts["datasync"] == 1
    files.remove([name])
    files.flush()
    assert files.disk.names(WHERE) == []


@pytest.mark.parametrize(
    ("number", "error", "sentence"),
    [
        (errno.ENOSPC, OutOfSpace, "No space left on device"),
        (errno.EDQUOT, OutOfSpace, "Disk quota exceeded"),
        (errno.EIO, Unavailable, "Input/output error"),
    ],
)
class TestRefusals:
    def test_writing(
        self,
        files: PayloadFiles,
        disk: LossyDisk,
        faults: Faults,
        number: int,
        error: type[Exception],
        sentence: str,
    ) -> None:
        faults.due["write", 2] = number
        writer = files.writer(None, "always")
        writer.write(bytes(LARGE))
        with pytest.raises(
            error, match=rf"^cannot write a payload beyond {LARGE} bytes: {sentence}$"
        ):
            writer.write(bytes(LARGE))
        assert disk.contents() == {}
        assert disk.descriptors == 0
        with pytest.raises(ValueError, match="sealed or discarded"):
            writer.seal()
        files.settle(written(files, bytes(LARGE)))  # the next one is not affected

    def test_making(
        self,
        files: PayloadFiles,
        faults: Faults,
        number: int,
        error: type[Exception],
        sentence: str,
    ) -> None:
        faults.due["create", 1] = number
        with pytest.raises(error, match=rf"^cannot make a payload file: {sentence}$"):
            files.writer(LARGE, "always").write(b"x")
        files.settle(written(files, bytes(LARGE)))

    def test_syncing_is_tried_once(
        self,
        files: PayloadFiles,
        disk: LossyDisk,
        faults: Faults,
        number: int,
        error: type[Exception],
        sentence: str,
    ) -> None:
        faults.due["datasync", 1] = number
        payload = written(files, bytes(LARGE))
        for _ in range(2):
            with pytest.raises(
                error, match=rf"^cannot sync a payload of {LARGE} bytes: {sentence}$"
            ):
                files.settle(payload)
        assert kinds(disk).count("file_sync") == 1
        payload.discard()
        assert disk.contents() == {}
        files.settle(written(files, bytes(LARGE)))


# --- the directory ---


def test_one_directory_sync_serves_all_who_asked_before_it_began(
    disk: LossyDisk, faults: Faults
) -> None:
    entries = DirectorySync(disk, WHERE)
    gate, entered = faults.gate("sync_directory"), faults.entered
    with ThreadPoolExecutor(6) as pool:
        first = pool.submit(entries.sync, 0)
        assert entered["sync_directory"].acquire(timeout=LIMIT_S)
        asked = [pool.submit(entries.sync, 0) for _ in range(5)]  # the running one is too early
        poll(lambda: len(entries._turn._waiters) == 5)  # type: ignore[attr-defined]
        gate.set()
        for future in (first, *asked):
            future.result(LIMIT_S)
    assert kinds(disk).count("entry_sync") == 2


def test_a_failed_directory_sync_takes_every_name_with_it_that_was_not_durable(
    files: PayloadFiles, disk: LossyDisk, faults: Faults
) -> None:
    faults.due["sync_directory", 1] = errno.EIO
    late = written(files, bytes_of(LARGE), "os")  # asks only after the sync that failed
    early = written(files, bytes_of(LARGE))
    for payload in (early, late, early, late):
        with pytest.raises(Unavailable, match="cannot sync a payload"):
            files.settle(payload)
    files.settle(written(files, bytes_of(LARGE)))


# --- reading ---


def test_a_held_payload_outlives_its_removal(files: PayloadFiles, disk: LossyDisk) -> None:
    data = bytes_of(3 * 2**20)
    made = written(files, data)
    files.settle(made)
    name, nbytes, digest = made.name, made.nbytes, made.digest
    payloads = [made, files.open(name, nbytes, digest)]
    reader = payloads[0].chunks()
    first = next(reader)
    files.remove([name])
    assert bytes(first) + b"".join(reader) == data
    del made, reader
    payloads.pop(0)
    assert payloads[0].read() == data
    payloads.clear()
    gc.collect()
    assert disk.contents() == {}
    assert disk.descriptors == 0


def test_a_payload_has_one_descriptor_while_it_is_read_and_none_else(
    files: PayloadFiles, disk: LossyDisk
) -> None:
    data = bytes_of(3 * 2**20)
    payloads = [written(files, data, d) for d in ("always", "os") for _ in range(20)]
    for payload in payloads:
        files.settle(payload)
    assert disk.descriptors == 0
    readers = [payloads[0].chunks(1000) for _ in range(5)]
    assert len({bytes(next(reader)) for reader in readers}) == 1
    assert disk.descriptors == 1
    readers.clear()
    assert disk.descriptors == 0
    payloads[0].read()
    assert disk.descriptors == 0


def test_what_a_row_names_must_be_there_and_complete(disk: LossyDisk) -> None:
    data = bytes_of(LARGE)
    digest = xxhash.xxh3_128_digest(data)
    files = named(disk, data)
    assert files.open("0123", LARGE, digest).read() == data
    with pytest.raises(Damaged, match=r"^payload file 4567 cannot be read: No") as missing:
        files.open("4567", LARGE, digest)
    assert missing.value.extra == {"file": "4567"}
    with pytest.raises(Damaged, match=f"^payload file 0123 has {LARGE} bytes, expected 70000$"):
        files.open("0123", 70_000, digest)
    files.close()


def test_other_bytes_than_were_written_are_not_handed_out(disk: LossyDisk) -> None:
    data = bytes_of(3 * 2**20)
    digest = xxhash.xxh3_128_digest(data)
    files = named(disk, data[:-1] + bytes([data[-1] ^ 1]))
    payload = files.open("0123", len(data), digest)
    sentence = "^payload file 0123 does not have its digest$"
    with pytest.raises(Damaged, match=sentence):
        payload.read()
    with pytest.raises(Damaged, match=sentence):
        files.verify(payload)
    handed = []
    with pytest.raises(Damaged, match=sentence):
        handed.extend(payload.chunks(2**20))
    assert sum(map(len, handed)) < len(data)  # who stops at the last byte is told too
    files.close()


def test_an_unreadable_file_is_damaged(files: PayloadFiles, faults: Faults) -> None:
    payload = written(files, bytes_of(LARGE))
    faults.due["pread", 1] = errno.EIO
    with pytest.raises(Damaged, match=rf"^payload file {payload.name} cannot be read at byte 0:"):
        payload.read()


def test_what_cannot_be_opened_now_is_not_called_damaged(
    files: PayloadFiles, faults: Faults
) -> None:
    payload = written(files, bytes_of(LARGE))
    files.settle(payload)
    faults.due["open", 1] = errno.EMFILE
    with pytest.raises(Unavailable, match=rf"^payload file {payload.name} cannot be read: Too"):
        payload.read()
    assert payload.read() == bytes_of(LARGE)


def test_a_wrong_write_is_found_by_verify(files: PayloadFiles, faults: Faults) -> None:
    faults.due["write", 1] = "rot"
    payload = written(files, bytes_of(LARGE))
    files.settle(payload)
    with pytest.raises(Damaged, match="does not have its digest"):
        files.verify(payload)


def test_a_small_payload_is_compared_with_its_digest_too() -> None:
    payload = InlinePayload(b"others", xxhash.xxh3_128_digest(b"bytes"))
    for read in (payload.read, payload.chunks):
        with pytest.raises(Damaged, match="a payload of 6 bytes does not have its digest"):
            read()


# --- the end of a file ---


def test_discard_does_not_wait_for_the_sync(
    files: PayloadFiles, disk: LossyDisk, faults: Faults
) -> None:
    gate = faults.gate("datasync")
    payload = written(files, bytes_of(LARGE))
    assert faults.entered["datasync"].acquire(timeout=LIMIT_S)
    payload.discard()
    assert len(disk.contents()) == 1
    gate.set()
    poll(lambda: disk.contents() == {})
    poll(lambda: disk.descriptors == 0)
    operations = kinds(disk)
    assert operations.index("unlink") > operations.index("file_synced")


@pytest.mark.parametrize("ending", ["discard", "forgotten"])
def test_what_was_not_sealed_leaves_nothing(
    files: PayloadFiles, disk: LossyDisk, ending: str
) -> None:
    writer = files.writer(None, "always")
    writer.write(bytes(LARGE))
    assert len(disk.contents()) == 1
    if ending == "discard":
        writer.discard()
        writer.discard()
    else:
        del writer
    assert disk.contents() == {}
    assert disk.descriptors == 0


def test_remove_never_raises(files: PayloadFiles, disk: LossyDisk, faults: Faults) -> None:
    names = [written(files, bytes_of(LARGE), "os").name for _ in range(2)]
    faults.due["unlink", 2] = errno.EIO
    files.remove(["missing", *names])
    assert set(disk.contents()) == {names[0]}


def test_sweep_removes_what_no_row_names(disk: LossyDisk) -> None:
    found = {"kept": bytes(LARGE), "orphan": bytes(LARGE), "short": b""}
    lossy = LossyDisk(found, disk.log)
    files = PayloadFiles(WHERE, lossy)
    in_flight = written(files, bytes_of(LARGE))
    assert files.sweep(lambda name: name == "kept") == ["orphan", "short"]
    assert set(lossy.contents()) == {"kept", in_flight.name}
    files.close()


def test_close_leaves_what_is_held_readable(tmp_path: Path) -> None:
    files = PayloadFiles(tmp_path)
    kept, dropped = (written(files, bytes_of(LARGE, seed)) for seed in (1, 2))
    files.remove([dropped.name])
    files.close()
    files.close()
    assert [path.name for path in tmp_path.iterdir()] == [kept.name]
    later = PayloadFiles(tmp_path)
    later.sweep(lambda _: False)
    later.close()
    assert list(tmp_path.iterdir()) == []
    assert (kept.read(), dropped.read()) == (bytes_of(LARGE, 1), bytes_of(LARGE, 2))


def test_a_closed_store_takes_nothing(tmp_path: Path) -> None:
    files = PayloadFiles(tmp_path)
    late = files.writer(None, "always")
    late.write(bytes(LARGE))
    files.close()
    with pytest.raises(Unavailable, match="the store is closed"):
        files.writer(None, "always")
    with pytest.raises(Unavailable, match="the store is closed"):
        late.seal()
    assert list(tmp_path.iterdir()) == []


def test_many_threads_at_once(real: PayloadFiles) -> None:
    def work(seed: int) -> None:
        for round_ in range(10):
            data = bytes_of(LARGE + seed, seed + 100 * round_)
            made = written(real, data)
            real.settle(made)
            again = real.open(made.name, made.nbytes, made.digest)
            real.remove([made.name])
            real.verify(again)
            assert again.read() == data

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    gc.collect()
    assert real.disk.names(real.directory) == []


# --- the disk in memory, which must be as bad as it claims ---


def states(log: Log, count: int = 200) -> list[dict[str, bytes]]:
    medium, rng = Medium({"old": b"o" * 10}), random.Random(7)
    for operation in log.operations:
        medium.apply(operation)
    return [medium.sample(rng) for _ in range(count)]


def test_lossy_disk_loses_what_was_not_synced() -> None:
    log = Log()
    disk = LossyDisk({"old": b"o" * 10}, log)
    fd = disk.create(WHERE / "new")
    disk.write(fd, memoryview(b"1" * 10_000))
    disk.unlink(WHERE / "old")
    found = states(log)
    assert (
        {"old" in state for state in found} == {"new" in state for state in found} == {True, False}
    )
    contents = {state["new"] for state in found if "new" in state}
    assert {b"", b"1" * 10_000, bytes(10_000), b"1" * 4096} <= contents
    assert b"\0" * 4096 + b"1" * (10_000 - 4096) in contents
    disk.datasync(fd)
    found = states(log)
    assert {state["new"] for state in found if "new" in state} == {b"1" * 10_000}
    assert any("new" not in state for state in found)
    disk.sync_directory(WHERE)
    assert all(state == {"new": b"1" * 10_000} for state in states(log))


def test_lossy_disk_forgets_what_a_failed_sync_should_have_written() -> None:
    log, faults = Log(), Faults()
    faults.due.update({("datasync", 1): errno.EIO, ("sync_directory", 1): errno.EIO})
    disk = LossyDisk({}, log, faults)
    fd = disk.create(WHERE / "new")
    disk.write(fd, memoryview(b"1" * 10))
    for sync in (lambda: disk.datasync(fd), lambda: disk.sync_directory(WHERE)):
        with pytest.raises(OSError, match="Input/output error"):
            sync()
        sync()
    assert disk.contents() == {"new": b"1" * 10}
    found = states(log)
    assert any("new" not in state for state in found)
    assert any(state.get("new") == b"" for state in found)


def test_real_disk_is_a_disk(tmp_path: Path) -> None:
    disk = OsDisk()
    disk.make_directory(tmp_path / "a" / "b")
    disk.make_directory(tmp_path / "a" / "b")
    fd = disk.create(tmp_path / "a" / "b" / "c")
    assert disk.write(fd, memoryview(b"12345")) == 5
    disk.write_back(fd, 0, 5)
    disk.datasync(fd)
    disk.sync_directory(tmp_path / "a" / "b")
    disk.forget(fd, 3)
    disk.forget(fd)
    assert disk.pread(fd, 10, 2) == b"345"
    assert disk.size(tmp_path / "a" / "b" / "c") == 5
    disk.unlink(tmp_path / "a" / "b" / "c")
    assert disk.pread(fd, 10, 0) == b"12345"
    disk.close(fd)
    assert disk.names(tmp_path / "a" / "b") == []


# --- behind the writer ---

PIECE, LAG = 100_000, 150_000


class Followed(OsDisk):
    """Notes what is asked of it behind a writer, which ``gate`` keeps waiting."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[object, ...]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.error: OSError | None = None

    def write_back(self, fd: int, begin: int, nbytes: int) -> None:
        assert self.gate.wait(LIMIT_S)
        self.asked.append(("write_back", begin, begin + nbytes))
        if self.error is not None:
            raise self.error
        super().write_back(fd, begin, nbytes)

    def forget(self, fd: int, end: int = 0) -> None:
        self.asked.append(("forget", end))
        super().forget(fd, end)


@pytest.fixture
def followed(monkeypatch: pytest.MonkeyPatch) -> Followed:
    monkeypatch.setattr(behind_module, "PIECE_BYTES", PIECE)
    monkeypatch.setattr(behind_module, "LAG_BYTES", LAG)
    return Followed()


def written_slowly(files: PayloadFiles, disk: Followed, data: bytes, durability: str) -> str:
    """Write piece by piece, each when the one before is on its way; return the name."""
    writer = files.writer(None, durability)  # type: ignore[arg-type]
    for at in range(0, len(data), PIECE):
        writer.write(memoryview(data)[at : at + PIECE])
        drained(files)
    payload = writer.seal()
    drained(files)
    files.settle(payload)
    assert payload.read() == data
    assert isinstance(payload, FilePayload)
    return payload.name


def drained(files: PayloadFiles) -> None:
    files.behind._thread.submit(int).result(LIMIT_S)


@pytest.mark.parametrize("durability", ["always", "os"])
def test_large_payloads_leave_the_memory_while_they_are_written(
    tmp_path: Path, followed: Followed, durability: str
) -> None:
    files = PayloadFiles(tmp_path, followed)
    data = bytes_of(250_000)
    written_slowly(files, followed, data, durability)
    expected: list[tuple[object, ...]] = [
        ("write_back", 0, 100_000),
        ("write_back", 100_000, 200_000),
        ("forget", 50_000),
        ("write_back", 200_000, 250_000),
        ("forget", 100_000),
    ]
    assert followed.asked == expected
    written_slowly(files, followed, data, durability)
    assert followed.asked == [*expected, ("forget", 0), *expected]  # the end of the one before
    files.close()


def test_small_files_are_not_followed(tmp_path: Path, followed: Followed) -> None:
    files = PayloadFiles(tmp_path, followed)
    files.settle(written(files, bytes_of(PIECE - 1)))
    files.close()
    assert followed.asked == []


def test_a_writer_does_not_wait_for_a_slow_medium(tmp_path: Path, followed: Followed) -> None:
    files = PayloadFiles(tmp_path, followed)
    followed.gate.clear()
    data = bytes_of(10 * PIECE)
    writer = files.writer(None, "os")
    for at in range(0, len(data), PIECE):
        writer.write(memoryview(data)[at : at + PIECE])
    payload = writer.seal()
    assert payload.read() == data
    assert followed.asked == []
    followed.gate.set()
    drained(files)
    assert [asked for asked in followed.asked if asked[0] == "write_back"] == [
        ("write_back", 0, PIECE),
        ("write_back", PIECE, 10 * PIECE),
    ]
    files.close()


def test_what_fails_behind_the_writer_costs_nothing(tmp_path: Path, followed: Followed) -> None:
    files = PayloadFiles(tmp_path, followed)
    followed.error = OSError(errno.EIO, "Input/output error")
    name = written_slowly(files, followed, bytes_of(3 * PIECE), "always")
    files.remove([name])  # its end is still to be forgotten
    written_slowly(files, followed, bytes_of(3 * PIECE), "always")
    files.close()


def test_a_discarded_file_goes_when_nobody_follows_any_more(
    disk: LossyDisk, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(behind_module, "PIECE_BYTES", PIECE)
    faults.due["write", 3] = errno.ENOSPC
    files = PayloadFiles(WHERE, disk)
    writer = files.writer(None, "always")
    writer.write(bytes_of(PIECE))
    writer.write(bytes_of(PIECE))
    with pytest.raises(OutOfSpace):
        writer.write(bytes_of(PIECE))
    poll(lambda: disk.contents() == {} and disk.descriptors == 0)
    files.close()


def test_a_writer_goes_on_when_nobody_follows_any_more(tmp_path: Path, followed: Followed) -> None:
    files = PayloadFiles(tmp_path, followed)
    writer = files.writer(None, "always")
    writer.write(bytes_of(PIECE))
    files.close()
    for _ in range(3):
        writer.write(bytes_of(PIECE))
    with pytest.raises(Unavailable, match="the store is closed"):
        writer.seal()
    assert list(tmp_path.iterdir()) == []


def cached_bytes(path: Path) -> int:
    """Return how much of a file the system has in memory."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
        address = ctypes.addressof(ctypes.c_char.from_buffer(view))
        pages = (ctypes.c_ubyte * -(-len(view) // mmap.PAGESIZE))()
        mincore = ctypes.CDLL(None).mincore
        mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
        assert mincore(address, len(view), ctypes.addressof(pages)) == 0
        return sum(page & 1 for page in pages) * mmap.PAGESIZE


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what is in memory")
@pytest.mark.parametrize("durability", ["always", "os"])
def test_the_memory_of_a_payload_comes_back(tmp_path: Path, durability: str) -> None:
    probe, disk = tmp_path / "probe", OsDisk()
    fd = disk.create(probe)
    disk.write(fd, memoryview(bytes(PIECE)))
    disk.datasync(fd)
    disk.forget(fd)
    disk.close(fd)
    if cached_bytes(probe):
        pytest.skip("this file system lies in memory")
    files = PayloadFiles(tmp_path / "payloads")
    payload = written(files, bytes_of(32 * 2**20), durability)
    files.settle(payload)
    assert cached_bytes(payload.file.path) > 0
    written(files, bytes_of(32 * 2**20), durability)
    drained(files)
    assert cached_bytes(payload.file.path) == 0
    files.close()
