"""EIO and ENOSPC at any call that changes a file: refused, nothing applied, and it goes on."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from optserve_client import Client, errors
from tests import lives, oracle, syscalls
from tests.lives import TODAY, Life, Reference
from tests.record import Figure
from tests.serving import ServerProcess
from tests.syscalls import Call
from tests.waiting import wait_until
from tests.zygote import Zygote

CALLS = ("pwrite64", "write", "fdatasync", "fsync", "openat", "ftruncate", "unlink")
SYNCS = ("fdatasync", "fsync")
#: How many calls of one kind fail in a row.
ROWS = (1, 3)

pytestmark = pytest.mark.skipif(
    syscalls.unavailable() is not None, reason=str(syscalls.unavailable())
)


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with Zygote("tests.scenario") as zygote:
        yield zygote


@pytest.fixture(scope="module")
def reference(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return lives.reference(zygote, tmp_path_factory.mktemp("reference"))


def fails(call: Call) -> bool:
    """Whether to let this call fail: every one but opens of payloads that are only to be read."""
    return call.name != "openat" or call.creates or "payloads/" not in call.path


class Faults:
    """Lets calls of one name fail, from the ``first``-th on, ``count`` of them."""

    def __init__(self, name: str, error: int, first: int, count: int) -> None:
        self.name, self.error = name, error
        self.numbers = range(first, first + count)
        self.seen = 0
        self.failed: list[Call] = []

    def __call__(self, number: int, call: Call) -> int | None:
        if call.name != self.name or not fails(call):
            return None
        self.seen += 1
        if self.seen not in self.numbers:
            return None
        self.failed.append(call)
        return self.error


@pytest.mark.timeout(3600)  # of the long form
@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC], ids=["EIO", "ENOSPC"])
@pytest.mark.parametrize("name", CALLS)
def test_a_call_that_fails_costs_a_retry(
    zygote: Zygote,
    reference: Reference,
    tmp_path: Path,
    long_form: bool,
    figure: Figure,
    name: str,
    error: int,
) -> None:
    total = sum(call.name == name and fails(call) for call in reference.calls)
    stride = 1 if long_form else max(1, total // 6)
    refused = cases = 0
    for first in range(1 if long_form else TODAY % stride + 1, total + 1, stride):
        counts = ROWS if long_form else (ROWS[(cases + TODAY) % len(ROWS)],)
        for count in counts:
            faults = Faults(name, error, first, count)
            directory = tmp_path / f"{first}-{count}"
            directory.mkdir()
            try:
                refused += one_case(zygote, reference, directory, faults)
            except AssertionError as exc:
                where = f"{errno.errorcode[error]} at {name} {first}"
                raise AssertionError(f"{where}, {list(map(str, faults.failed))}: {exc}") from exc
            shutil.rmtree(directory)
            cases += 1
    figure(f"{errno.errorcode[error]} at {name}: survived", cases, "cases")
    figure(f"{errno.errorcode[error]} at {name}: requests refused, then answered", refused, "")


def one_case(zygote: Zygote, reference: Reference, directory: Path, faults: Faults) -> int:
    """Live with ``faults``, and once more without; return how many requests were refused."""
    life = lives.live(zygote, directory, 0, faults)
    judge(reference, life, faults)
    judge_entries(life, faults, directory)
    after = lives.live(zygote, directory, reference.requests)
    # The snapshot at the end may be what failed: the session without durability may have gone back.
    assert not reference.judge_found(reference.requests, after.of("found")[0]["found"])
    lives.assert_no_orphans(directory)
    return len(life.of("refused"))


def judge(reference: Reference, life: Life, faults: Faults) -> None:
    reference.judge_end(life)
    codes = {message["code"] for message in life.of("refused") if message["refused"] != "open"}
    assert codes <= {"unavailable", "out_of_space"}, life.of("refused")
    if faults.error == errno.EIO:
        assert "out_of_space" not in codes, life.of("refused")
    assert len(faults.numbers) > 1 or not life.of("unread"), "reading did not go on"
    refusals = iter(life.of("refused"))
    for read in life.of("read"):
        refusal = next(r for r in refusals if r["refused"] != "open")
        before = reference.states(read["read"])
        after = reference.states(read["read"] + 1)
        session = reference.session(read["read"])
        allowed = {before[session]}
        if refusal["code"] == "unavailable":  # then it may be committed all the same
            allowed.add(after[session])
        if session != lives.FORGETFUL:
            assert read["digest"] in allowed, f"after {refusal['detail']}"
    if faults.name in SYNCS:
        judge_syncs(life, faults)


class FailCheckpoint:
    """Lets the first sync of the log fail for which no answer waits: it begins a checkpoint."""

    def __init__(self) -> None:
        self.answered = 0
        self.failed: list[Call] = []

    def __call__(self, number: int, call: Call) -> int | None:
        calm = self.answered >= 10 and not self.failed
        if not calm or call.name != "fdatasync" or not call.path.endswith("-wal"):
            return None
        self.failed.append(call)
        return errno.EIO

    def hear(self, message: lives.Message) -> None:
        self.answered += "done" in message and message["session"] == "wide"


def test_a_checkpoint_that_cannot_sync_the_log_is_no_secret(zygote: Zygote, tmp_path: Path) -> None:
    """SQLite keeps quiet about it, and the kernel then calls the lost pages of the log clean: a
    synced commit behind them is worth nothing, so none may be answered before a new log begins.
    """
    reference = lives.reference(zygote, tmp_path / "reference", "unsynced")
    fault = FailCheckpoint()
    life = lives.live(zygote, tmp_path / "data", 0, fault, "unsynced", fault.hear)
    assert fault.failed, "the log was never copied"
    reference.judge_end(life)
    failed = next(i for i, entry in enumerate(life.log) if entry is fault.failed[0])
    fresh = next(
        i
        for i, entry in enumerate(life.log)
        if i > failed
        and isinstance(entry, Call)
        and entry.name in ("ftruncate", "unlink")
        and entry.path.endswith("-wal")
    )
    for entry in life.log[failed:fresh]:
        assert isinstance(entry, Call) or entry.get("session") in (*lives.UNSYNCED, None), entry


def judge_syncs(life: Life, faults: Faults) -> None:
    """Nothing counts on what could not be synced.

    A payload file is given up. The log of the database is copied into it as a whole, and emptied,
    before anything else is acknowledged.
    """
    given_up: set[str] = set()
    log_failed = False
    number = 0
    for entry in life.log:
        if not isinstance(entry, Call):
            answered = "done" in entry and entry["session"] not in lives.UNSYNCED
            assert not (answered and log_failed), f"{entry['done']} was answered all the same"
            continue
        number += entry.name == faults.name
        if entry.name == faults.name and number in faults.numbers:
            given_up.add(entry.path)
            log_failed |= entry.path.endswith("-wal")
        elif entry.name in SYNCS and is_payload(entry):
            assert entry.path not in given_up, f"{entry} was tried again after it had failed"
        elif entry.name in ("ftruncate", "unlink") and entry.path.endswith("-wal"):
            log_failed = False


def is_payload(call: Call) -> bool:
    return Path(call.path).parent.name == "payloads"


def judge_entries(life: Life, faults: Faults, directory: Path) -> None:
    """No row names a file whose entry was lost by the first sync of the directory after it."""
    named = lives.payload_names(directory)
    waiting: set[str] = set()
    number = 0
    for call in life.calls:
        number += call.name == faults.name and fails(call)
        failed = call.name == faults.name and fails(call) and number in faults.numbers
        if call.creates and is_payload(call) and not failed:
            waiting.add(Path(call.path).name)
        elif call.name == "fsync" and call.path == str(directory / "payloads"):
            assert not (failed and waiting & named), f"{waiting & named} may have lost their names"
            waiting.clear()


# --- over HTTP -----------------------------------------------------------------------------------


@contextlib.contextmanager
def failing_syncs(pid: int) -> Iterator[None]:
    """Let every sync of a running process fail with EIO, for as long as the block takes."""
    strace = ["strace", "-f", "-qq", "-o", os.devnull, "-p", str(pid)]
    calls = ["-e", "trace=fsync,fdatasync", "-e", "inject=fsync,fdatasync:error=EIO"]
    process = subprocess.Popen([*strace, *calls])
    try:

        def attached() -> bool:
            assert process.poll() is None, "strace cannot attach"
            return all(
                f"TracerPid:\t{process.pid}\n" in (task / "status").read_text()
                for task in Path(f"/proc/{pid}/task").iterdir()
            )

        wait_until(attached, "strace")
        yield
    finally:
        process.send_signal(signal.SIGINT)  # it lets go, and the process runs on
        process.wait(10)


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
@pytest.mark.parametrize("shape", [(5, 7), (150, 150)], ids=["row", "file"])
def test_while_no_sync_works_steps_are_503_and_reading_goes_on(shape: tuple[int, ...]) -> None:
    body: dict[str, Any] = {"optimizer": {"name": "Adam", "lr": 0.1}}
    params = oracle.tensors(1, {"w": shape})
    twin = oracle.Twin(body, params, "fused")
    with (
        ServerProcess() as server,
        Client(server.url, retries=0) as hasty,
        Client(server.url) as patient,
    ):
        session = hasty.create(body["optimizer"], params, impl="fused", id="a")
        other = patient.create(body["optimizer"], params, impl="fused", id="b")
        for one in (session, other):
            one.step(oracle.tensors(2, {"w": shape}))
        twin.push(oracle.tensors(2, {"w": shape}), None, 0)
        with failing_syncs(server.process.pid):
            for _ in range(3):  # the same call again, as the client's docstring says
                with pytest.raises(errors.Unavailable) as caught:
                    session.step(oracle.tensors(3, {"w": shape}))
                assert (caught.value.status, caught.value.code) == (503, "unavailable")
                assert other.params().version == 1
                twin.check(other.export_state(), 1, 1)
            waiting = threading.Thread(target=other.step, args=[oracle.tensors(3, {"w": shape})])
            waiting.start()
            waiting.join(0.5)
            assert waiting.is_alive(), "a step was answered though nothing could be synced"
        waiting.join(60)
        assert session.step(oracle.tensors(3, {"w": shape})).applied_version == 2
        twin.push(oracle.tensors(3, {"w": shape}), None, 1)
        for one in (session, other):
            twin.check(one.export_state(), 2, 2)
