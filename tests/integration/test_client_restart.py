"""Both clients while their server is killed and started again: a pause, and nothing else."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from optserve_client import AsyncClient, Client, errors
from tests.forked import Forkery
from tests.serving import ServerProcess, free_port

ONE = {"w": np.ones(3, np.float32)}


class Restarting:
    """A server on one address and one data directory, which can be killed and started again."""

    def __init__(self, forkery: Forkery, data_dir: Path) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._flags = ("--port", str(self.port), "--threads", "1")
        self._forkery, self.data_dir = forkery, data_dir
        self.server = self._start()
        self.server.wait_ready()

    def _start(self) -> ServerProcess:
        launch = self._forkery.launch
        return ServerProcess(*self._flags, data_dir=self.data_dir, launch=launch)

    def kill(self) -> None:
        assert self.server.stop(signal.SIGKILL) == -signal.SIGKILL
        self.server.close()

    def again(self) -> None:
        self.server = self._start()
        self.server.wait_ready()

    def back_soon(self) -> threading.Thread:
        """Start the server again while the caller goes on."""
        thread = threading.Thread(target=self.again)
        thread.start()
        return thread

    def close(self) -> None:
        self.server.stop(signal.SIGKILL)
        self.server.close()


@pytest.fixture(scope="module")
def forkery() -> Iterator[Forkery]:
    with Forkery() as started:
        yield started


@pytest.fixture
def place(forkery: Forkery, tmp_path: Path) -> Iterator[Restarting]:
    restarting = Restarting(forkery, tmp_path)
    try:
        yield restarting
    finally:
        restarting.close()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Let torch compute here as on the server."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Kills(threading.Thread):
    """Kills the server ``times`` times, each time when some more steps were made."""

    def __init__(self, place: Restarting, times: int) -> None:
        super().__init__()
        self._place, self._times = place, times
        self._steps = threading.Semaphore(0)
        self.failure: BaseException | None = None

    def stepped(self) -> None:
        self._steps.release()

    def run(self) -> None:
        try:
            for _ in range(self._times):
                for _ in range(20):
                    assert self._steps.acquire(timeout=60), "the client stands still"
                self._place.kill()
                self._place.again()
        except BaseException as exc:
            self.failure = exc

    def check(self) -> None:
        self.join()
        if self.failure is not None:
            raise self.failure


class Local:
    """The same training with torch itself."""

    def __init__(self) -> None:
        self.p = torch.nn.Parameter(torch.ones(3))
        self.optimizer = torch.optim.AdamW([self.p], lr=0.01, fused=True)

    def step(self, grad: Any) -> None:
        self.p.grad = torch.from_numpy(grad.copy())
        self.optimizer.step()

    def check(self, served: Any) -> None:
        assert torch.equal(torch.from_numpy(served["w"]), self.p.detach())


def test_the_blocking_client_trains_on_through_three_kills(place: Restarting) -> None:
    rng, local, kills = np.random.default_rng(0), Local(), Kills(place, 3)
    with Client(place.url) as client:
        session = client.create("AdamW", ONE, lr=0.01)
        kills.start()
        steps = 0
        while kills.is_alive() or steps < 100:
            grad = rng.standard_normal(3).astype(np.float32)
            local.step(grad)
            result = session.step({"w": grad})
            local.check(result.params)
            steps += 1
            assert (result.version, result.updates) == (steps, steps)
            kills.stepped()
        kills.check()
        assert session.status()["recovery"] == {"bit_exact": True, "reason": None}
        history = [row["version"] for row in session.history(limit=100_000)]
    assert history == list(range(1, steps + 1))


def test_the_awaited_client_trains_on_through_two_kills(place: Restarting) -> None:
    async def train() -> None:
        rng, local, kills = np.random.default_rng(1), Local(), Kills(place, 2)
        async with AsyncClient(place.url) as client:
            session = await client.create("AdamW", ONE, lr=0.01)
            kills.start()
            steps = 0
            while kills.is_alive() or steps < 60:
                grad = rng.standard_normal(3).astype(np.float32)
                local.step(grad)
                result = await session.step({"w": grad})
                local.check(result.params)
                steps += 1
                assert (result.version, result.updates) == (steps, steps)
                kills.stepped()
            kills.check()

    asyncio.run(train())


def test_every_kind_of_change_waits_for_the_server_and_happens_once(place: Restarting) -> None:
    with Client(place.url) as client:
        session = client.create("AdamW", ONE, lr=0.01, id="first")
        for _ in range(3):
            session.step(ONE)
        calls: list[Callable[[], Any]] = [
            lambda: session.rollback(1),
            lambda: session.pin(2, "kept"),
            lambda: session.fork("second", version=2),
            lambda: client.import_session(session.export_state(), id="third"),
            lambda: client.create("SGD", ONE, lr=0.5, id="fourth"),
            lambda: client.session("second").delete(),
            lambda: session.unpin(2),
        ]
        for call in calls:
            place.kill()
            thread = place.back_soon()
            call()
            thread.join()
        assert sorted(row["id"] for row in client.list().sessions) == ["first", "fourth", "third"]
        versions = session.versions()
        assert [row["kind"] for row in versions] == ["create", "step", "step", "step", "rollback"]
        assert [row["pin"] for row in versions] == [None] * 5
        session.step(ONE)
        forked = client.session("third")
        np.testing.assert_array_equal(forked.step(ONE).params["w"], session.params()["w"])


class Cut(httpx.HTTPTransport):
    """Lets each change through, kills the server, starts it again, and loses the answer."""

    def __init__(self, place: Restarting) -> None:
        super().__init__()
        self._place = place
        self.cuts = 0

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        response = super().handle_request(request)
        if request.method == "GET" or self.cuts % 2:
            self.cuts += request.method != "GET"
            return response
        response.read()
        response.close()
        self.cuts += 1
        self._place.kill()
        self._place.again()
        raise httpx.ReadError("the answer is lost")


def test_what_was_applied_before_the_kill_is_not_applied_after_it(place: Restarting) -> None:
    with Client(place.url, transport=Cut(place)) as client:
        session = client.create("AdamW", ONE, lr=0.01)
        assert session.created
        result = session.step(ONE)
        assert (result.duplicate, result.version, result.applied_version) == (True, 1, 1)
        pinned = session.pin(1)
        assert (pinned["duplicate"], pinned["pinned"]) == (True, {"version": 1, "pin": "v1"})
        back = session.rollback(0)
        assert (back["duplicate"], back["version"]) == (True, 2)
        fork = session.fork()
        assert fork.created
        loaded = client.import_session(session.export_state())
        assert loaded.created
        fork.delete()
        assert len(client.list().sessions) == 2
        assert session.status()["version"] == 2
        assert loaded.status()["version"] == 2


TWO = {"w": np.ones(3, np.float32), "b/c": np.full(20_000, 2, np.float32)}


class Pushed:
    """Steps that are pushed and the same ones with torch itself."""

    def __init__(self, client: Client) -> None:
        self.session = client.create("AdamW", TWO, lr=0.01)
        self.local = {n: torch.nn.Parameter(torch.from_numpy(v.copy())) for n, v in TWO.items()}
        self.optimizer = torch.optim.AdamW(list(self.local.values()), lr=0.01, fused=True)
        self.steps = 0

    def push(self, between: Callable[[int], None] = lambda number: None) -> Any:
        """Push one step; ``between`` is called before each request."""
        self.steps += 1
        grads = {name: value * self.steps for name, value in TWO.items()}
        with self.session.push(loss=float(self.steps)) as push:
            for number, name in enumerate(grads):
                between(number)
                push.put(name, grads[name])
            between(len(grads))
            result = push.commit()
        for name, p in self.local.items():
            p.grad = torch.from_numpy(grads[name])
        self.optimizer.step()
        assert (result.version, result.updates) == (self.steps, self.steps)
        for name, p in self.local.items():
            assert torch.equal(torch.from_numpy(result.params[name]), p.detach()), name
        return result


@pytest.mark.parametrize("when", [0, 1, 2])
def test_a_server_that_is_killed_in_the_middle_of_a_push_costs_nothing_but_time(
    place: Restarting, when: int
) -> None:
    def kill(number: int) -> None:
        if number == when:
            place.kill()
            threads.append(place.back_soon())

    threads: list[threading.Thread] = []
    with Client(place.url) as client:
        pushed = Pushed(client)
        pushed.push()
        assert not pushed.push(kill).duplicate
        threads.pop().join()
        pushed.push()
        assert [row["loss"] for row in pushed.session.history()] == [1.0, 2.0, 3.0]


class CutCommit(httpx.HTTPTransport):
    """Lets the first commit through, kills the server, starts it again, and loses the answer."""

    def __init__(self, place: Restarting) -> None:
        super().__init__()
        self._place = place
        self.cuts = 0

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        response = super().handle_request(request)
        if self.cuts or not request.url.path.endswith("/commit"):
            return response
        self.cuts += 1
        response.read()
        response.close()
        self._place.kill()
        self._place.again()
        raise httpx.ReadError("the answer is lost")


def test_a_push_that_was_committed_before_the_kill_is_not_applied_after_it(
    place: Restarting,
) -> None:
    with Client(place.url, transport=CutCommit(place)) as client:
        pushed = Pushed(client)
        assert pushed.push().duplicate
        assert not pushed.push().duplicate
        assert [row["loss"] for row in pushed.session.history()] == [1.0, 2.0]


def test_pushes_go_on_through_kills_at_any_moment(place: Restarting) -> None:
    kills = Kills(place, 3)
    with Client(place.url) as client:
        pushed = Pushed(client)
        kills.start()
        while kills.is_alive() or pushed.steps < 60:
            pushed.push(lambda number: kills.stepped())
        kills.check()
        losses = [row["loss"] for row in pushed.session.history(limit=100_000)]
        assert losses == [float(n + 1) for n in range(pushed.steps)]
        assert pushed.session.status()["recovery"] == {"bit_exact": True, "reason": None}


def test_lost_history_is_told_until_the_program_resumes(place: Restarting) -> None:
    with Client(place.url) as client:
        session = client.create("SGD", ONE, lr=0.5, durability="memory")
        for _ in range(3):
            assert session.step(ONE).raw["durability"] == "memory"
        place.kill()
        place.again()
        for change in (
            lambda: session.step(ONE),
            lambda: session.patch(notes="n"),
            lambda: session.step(ONE),
        ):
            with pytest.raises(errors.SessionRewound) as caught:
                change()
        at = session.status()
        assert caught.value.extra["generation"] == at["generation"]
        assert (caught.value.extra["version"], at["version"], at["notes"]) == (0, 0, None)
        session.resume()
        assert session.step(ONE).version == 1


def test_a_damaged_session_is_told_at_once_and_can_be_deleted(place: Restarting) -> None:
    large = {"w": np.ones(50_000, np.float32)}  # its payload is a file
    with Client(place.url) as client:
        other = client.create("SGD", ONE, lr=0.5)
        before = set(place.data_dir.rglob("*"))
        session = client.create("SGD", large, lr=0.5, id="large")
        session.step(large)
        place.kill()
        for path in set(place.data_dir.rglob("*")) - before:
            if path.is_file() and path.stat().st_size > 100_000:
                whole = bytearray(path.read_bytes())
                whole[-1] ^= 1
                path.write_bytes(whole)
        place.again()
        for call in (lambda: session.step(large), session.params, session.status):
            with pytest.raises(errors.Damaged, match="'large'") as caught:
                call()
        assert "earlier attempt" not in caught.value.detail
        assert other.step(ONE).version == 1
        session.delete()
        assert [row["id"] for row in client.list().sessions] == [other.id]
        assert client.create("SGD", large, lr=0.5, id="large").step(large).version == 1


def test_a_server_that_was_told_to_stop_and_comes_back_costs_nothing(place: Restarting) -> None:
    with Client(place.url) as client:
        session = client.create("SGD", ONE, lr=0.5)
        session.step(ONE)
        assert place.server.stop() == 0
        place.server.close()
        thread = place.back_soon()
        assert session.step(ONE).version == 2
        thread.join()
