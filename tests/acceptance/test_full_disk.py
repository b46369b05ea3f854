"""A disk that is really full: 507, nothing applied, reading goes on, and it resumes by itself."""

from __future__ import annotations

import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optserve_client import Client, errors
from tests import oracle
from tests.serving import ServerProcess

DISK_BYTES = 12 * 2**20
#: Payloads of the first are files, those of the second rows.
SHAPES: dict[str, oracle.Shapes] = {"large": {"w": (200, 200), "b": (200,)}, "small": {"w": (5, 7)}}
BODY: dict[str, Any] = {"optimizer": {"name": "Adam", "lr": 0.01}, "impl": "fused"}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, with room for 12 MiB."""
    where = tmp_path / "disk"
    where.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES},mode=0700", "optserve", str(where)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("a small disk needs mount")
    if done.returncode:
        pytest.skip(f"a small disk needs the right to mount one: {done.stderr.strip()}")
    try:
        yield where
    finally:
        subprocess.run(["umount", "--lazy", str(where)], check=True)


class Ballast:
    """A file that takes all the room that is left."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "ballast"

    def fill(self, left_bytes: int = 0) -> None:
        with self.path.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(b"\0" * 4096)
            except OSError:
                file.truncate(max(file.tell() - left_bytes, 0))

    def go(self) -> None:
        self.path.unlink()


class Training:
    """One session, and torch's own numbers for the steps that it acknowledged."""

    def __init__(self, client: Client, name: str, size: str) -> None:
        self.shapes = SHAPES[size]
        params = oracle.tensors(1, self.shapes)
        self.session = client.create(**_create(params), id=name)
        self.twin = oracle.Twin(BODY, params, "fused")
        self.steps = 0

    def step(self) -> None:
        grads = oracle.tensors(100 + self.steps, self.shapes)
        result = self.session.step(grads)
        self.twin.push(grads, None, self.steps)
        self.steps += 1
        assert result.applied_version == self.steps

    def check(self) -> None:
        self.twin.check(self.session.export_state(), self.steps, self.steps)


def _create(params: oracle.Tensors) -> dict[str, Any]:
    return {"optimizer": BODY["optimizer"], "params": params, "impl": BODY["impl"]}


def step_until_full(training: Training) -> errors.OutOfSpace:
    with pytest.raises(errors.OutOfSpace) as caught:
        for _ in range(1000):
            training.step()
    return caught.value


def test_a_full_disk_refuses_steps_until_there_is_room(disk: Path) -> None:
    ballast = Ballast(disk)
    with (
        ServerProcess(data_dir=disk / "data") as server,
        Client(server.url, retries=0) as hasty,
        Client(server.url) as patient,
    ):
        large, small = Training(hasty, "large", "large"), Training(hasty, "small", "small")
        waiting = Training(patient, "waiting", "large")
        sessions = (large, small, waiting)
        for one in sessions:
            for _ in range(3):
                one.step()
        ballast.fill(left_bytes=300_000)
        refused = step_until_full(large)
        assert (refused.status, refused.code) == (507, "out_of_space")
        ballast.fill()
        step_until_full(small)
        check_reading_goes_on(sessions)
        with pytest.raises(errors.OutOfSpace):
            hasty.create(**_create(oracle.tensors(1, SHAPES["large"])), id="more")
        step_as_soon_as_there_is_room(waiting, ballast)
        for one in sessions:
            one.step()
            one.check()
    with ServerProcess(data_dir=disk / "data") as again, Client(again.url) as client:
        for one in sessions:
            one.session = client.session(one.session.id)
            one.check()


def check_reading_goes_on(sessions: tuple[Training, ...]) -> None:
    """And shows nothing of what was refused."""
    for one in sessions:
        params = one.session.params()
        assert params.version == one.session.status()["version"] == one.steps
        for key, leaf in one.twin.leaves.items():
            assert np.array_equal(np.asarray(params[key]), leaf.detach().numpy())
        one.check()


def step_as_soon_as_there_is_room(training: Training, ballast: Ballast) -> None:
    """A client that repeats by itself needs nothing else."""
    before = training.steps
    thread = threading.Thread(target=training.step)
    thread.start()
    thread.join(0.5)
    assert thread.is_alive(), "a step was answered on a full disk"
    ballast.go()
    thread.join(60)
    assert training.steps == before + 1


def test_a_server_does_not_start_on_a_full_disk_and_says_so(disk: Path) -> None:
    ballast = Ballast(disk)
    with ServerProcess(data_dir=disk / "data") as server, Client(server.url, retries=0) as client:
        training = Training(client, "large", "large")
        training.step()
        ballast.fill()
        step_until_full(training)
        server.stop(signal.SIGKILL)
    starting = ServerProcess(data_dir=disk / "data")
    with pytest.raises(AssertionError, match=r"(disk is full|No space left on device)"):
        starting.wait_ready()
    ballast.go()
    with ServerProcess(data_dir=disk / "data") as again, Client(again.url) as client:
        training.session = client.session("large")
        training.check()
        training.step()
        training.check()
