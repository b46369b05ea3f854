"""Several workers on one session, each in a thread with a client of its own, and a real server."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch

from optserve_client import AsyncClient, AsyncWorker, Bits, Client, Session, TopK, Worker, errors
from tests.proxy import Proxy
from tests.serving import ServerProcess
from tests.waiting import wait_until

SHAPES = {"w": (7, 3), "b": (3,), "scale": ()}
ONE = {"w": np.ones(3, np.float32)}
NAMES = ["w10", "w2", "w3"]  # in byte order

Arrays = dict[str, Any]


@pytest.fixture
def client(server: ServerProcess) -> Iterator[Client]:
    with Client(server.url) as connected:
        yield connected


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def arrays(*seed: int) -> Arrays:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


def sync(count: int, deadline_s: float = 30.0, **more: Any) -> dict[str, Any]:
    return {"mode": "sync", "count": count, "deadline_s": deadline_s, **more}


def round_of(session: Session) -> dict[str, Any] | None:
    found: dict[str, Any] | None = session.workers()["round"]
    return found


def has_pushed(session: Session, *names: str) -> Callable[[], bool]:
    return lambda: (round_of(session) or {}).get("contributed") == list(names)


class Local:
    """One process that combines the same gradients in the order of the workers' names."""

    def __init__(self, params: Mapping[str, Any]) -> None:
        self.params = {n: torch.nn.Parameter(tensor(p)) for n, p in params.items()}
        self.optimizer = torch.optim.AdamW(self.params.values(), lr=0.01, fused=True)

    def step(self, pushes: list[Mapping[str, Any]]) -> None:
        for name, p in self.params.items():
            total = tensor(pushes[0][name])
            for push in pushes[1:]:
                total += tensor(push[name])
            p.grad = total / len(pushes)
        self.optimizer.step()

    def check(self, served: Mapping[str, Any]) -> None:
        for name, p in self.params.items():
            assert torch.equal(tensor(served[name]), p.detach()), name


def tensor(value: Any) -> torch.Tensor:
    if isinstance(value, Bits):
        return torch.from_numpy(value.array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(np.array(value))


def train(
    url: str,
    session_id: str,
    name: str,
    rounds: int,
    gradient: Callable[[int], Any],
    **options: Any,
) -> Worker:
    """Run one worker's loop; return the worker, for what it knows at the end."""
    with Client(url, **options) as client, Worker(client, session_id, name) as worker:
        worker.pull()
        for i in range(rounds):
            result = worker.push(gradient(i), loss=float(i))
            assert result.round is not None
            assert (result.applied, result.version) == (True, i + 1)
            assert result.round["workers"] == NAMES
        return worker


# Rounds ------------------------------------------------------------------------------------------


def test_three_workers_train_as_one_process_with_the_same_gradients(
    client: Client, server: ServerProcess, threads: ThreadPoolExecutor
) -> None:
    session = client.create("AdamW", arrays(0), lr=0.01, workers=sync(3))
    local = Local(arrays(0))
    for i in range(10):
        local.step([arrays(i, k) for k in range(3)])

    def loop(k: int) -> Worker:
        return train(server.url, session.id, NAMES[k], 10, lambda i: arrays(i, k))

    workers = list(threads.map(loop, (2, 0, 1)))
    for worker in workers:
        assert worker.params is not None
        local.check(worker.params)
    local.check(session.params())
    rows = session.workers()["workers"]
    assert [(row["worker"], row["contributions"]) for row in rows] == [(n, 10) for n in NAMES]
    assert [row["loss"] for row in session.history()] == [float(i) for i in range(10)]


@pytest.mark.parametrize("seed", range(2))
def test_lost_and_repeated_messages_make_no_push_count_twice(
    client: Client, server: ServerProcess, threads: ThreadPoolExecutor, seed: int
) -> None:
    rounds = 10
    session = client.create("AdamW", arrays(0), lr=0.01, workers=sync(3))
    local = Local(arrays(0))
    for i in range(rounds):
        local.step([arrays(i, k) for k in range(3)])
    faults = {"drop_request": 80, "cut_request": 50, "drop_reply": 150, "cut_reply": 100}
    faults |= {"duplicate": 100, "duplicate_and_drop_reply": 100, "duplicate_later": 50}
    with Proxy(address(server), seed, faults) as proxy:

        def loop(k: int) -> Worker:
            gradient = lambda i: arrays(i, k)
            return train(proxy.url, session.id, NAMES[k], rounds, gradient, timeout=5.0)

        for worker in threads.map(loop, range(3)):
            assert worker.params is not None
            local.check(worker.params)
        proxy.settle()
    assert len(proxy.faults) > 4
    status = session.status()
    assert (status["version"], status["updates"]) == (rounds, rounds)
    listed = session.workers()
    assert [row["contributions"] for row in listed["workers"]] == [rounds] * 3
    assert listed["round"] is None


def address(server: ServerProcess) -> tuple[str, int]:
    found = urlsplit(server.url)
    assert found.hostname is not None
    assert found.port is not None
    return found.hostname, found.port


def test_a_push_waits_longer_than_one_request_does(
    client: Client, server: ServerProcess, threads: ThreadPoolExecutor
) -> None:
    session = client.create("SGD", ONE, lr=1.0, workers=sync(2))
    with Proxy(address(server), 0, {}) as proxy, Client(proxy.url, timeout=1.0) as impatient:
        impatient._patience_s = 0.05
        waiting = threads.submit(impatient.session(session.id).step, ONE, base_version=0)
        wait_until(lambda: proxy.requests >= 4, "a push that is sent again")
        assert not waiting.done()
        other = client.session(session.id).step(ONE, base_version=0)
        result = waiting.result(10)
    assert (result.duplicate, other.duplicate) == (True, False)
    assert result.version == result.applied_version == other.applied_version == 1
    assert result.round == other.round
    np.testing.assert_array_equal(result.params["w"], np.zeros(3))


def test_a_push_that_does_not_wait_can_be_sent_again_to_wait(client: Client) -> None:
    session = client.create("SGD", ONE, lr=1.0, workers=sync(2))
    worker = Worker(client, session.id, "w1")
    worker.pull()
    result = worker.push(ONE, wait_s=0)
    assert (result.applied, result.applied_version, result.params) == (False, None, None)
    assert result.round is not None
    assert (result.round["contributed"], result.round["count"]) == (["w1"], 2)
    with pytest.raises(errors.Conflict, match="has pushed into round 1 already"):
        worker.push(ONE)
    assert session.step(ONE, base_version=0).version == 1
    assert worker.pull().version == 1


def test_a_worker_that_is_late_gets_the_params_of_now(client: Client) -> None:
    how = sync(2, 0.2, quorum=1)
    session = client.create("SGD", ONE, lr=1.0, workers=how)
    quick, slow = Worker(client, session.id, "a"), Worker(client, session.id, "b")
    dropping = Worker(client, session.id, "c", on_stale="drop")
    for worker in (quick, slow, dropping):
        worker.pull()
    result = quick.push(ONE)
    assert result.round is not None
    assert (result.round["closed_by"], result.round["missing"]) == ("deadline", 1)
    with pytest.raises(errors.StaleGradient) as caught:
        slow.push(ONE)
    assert caught.value.extra["version"] == slow.version == 1
    assert slow.params is not None
    np.testing.assert_array_equal(slow.params["w"], np.zeros(3))
    dropped = dropping.push(ONE)
    assert (dropped.skipped, dropped.version, dropped.updates) == ("stale_gradient", 1, 1)
    assert slow.push(ONE).version == 2
    assert session.workers()["version"] == 2


def test_a_round_that_fails_is_told_and_its_push_may_go_into_the_next(
    client: Client, threads: ThreadPoolExecutor
) -> None:
    session = client.create("SGD", ONE, lr=1.0, workers=sync(2, 0.2))
    worker = Worker(client, session.id, "a")
    worker.pull()
    with pytest.raises(errors.RoundFailed, match="round 1 failed: 1 of 2"):
        worker.push(ONE)
    patient = Worker(client, session.id, "b", retry_rounds=1000)
    patient.pull()
    waiting = threads.submit(patient.push, ONE)
    wait_until(lambda: (round_of(session) or {"number": 0})["number"] > 3, "a third round")
    session.patch(workers=sync(2, 30.0))
    wait_until(has_pushed(session, "b"), "the push")
    assert worker.push(ONE).version == 1
    assert waiting.result(10).version == 1
    assert worker.version == patient.version == 1


def test_weights_count_in_a_weighted_mean(client: Client, threads: ThreadPoolExecutor) -> None:
    how = sync(2, reduce="weighted_mean")
    session = client.create("SGD", {"w": np.zeros(2)}, lr=1.0, workers=how)

    def push(name: str, value: float, weight: float) -> Any:
        worker = Worker(client, session.id, name)
        worker.pull()
        return worker.push({"w": np.full(2, value)}, weight=weight)

    one, two = threads.submit(push, "a", 1.0, 3.0), threads.submit(push, "b", 5.0, 1.0)
    assert [one.result(10).round["weight"], two.result(10).round["weight"]] == [3.0, 1.0]
    np.testing.assert_array_equal(session.params()["w"], [-2.0, -2.0])


# Who it is ---------------------------------------------------------------------------------------


def test_the_older_of_two_processes_of_one_name_is_stopped(client: Client) -> None:
    session = client.create("SGD", ONE, lr=1.0, workers=sync(1))
    older, newer = Worker(client, session.id, "w3"), Worker(client, session.id, "w3")
    older.pull()
    assert older.push(ONE).version == 1
    newer.pull()
    assert (older.epoch, newer.epoch) == (1, 2)
    for _ in range(2):
        with pytest.raises(errors.Fenced):
            older.push(ONE)
    assert newer.push(ONE).version == 2
    assert newer.push(ONE).version == 3
    assert session.status()["updates"] == 3


def test_a_namesake_stops_the_one_that_waits_for_its_round(
    client: Client, server: ServerProcess, threads: ThreadPoolExecutor
) -> None:
    """Its push is in, and whoever asks for it again with the old epoch is refused."""
    session = client.create("SGD", ONE, lr=1.0, workers=sync(2))
    with Client(server.url) as other:
        other._patience_s = 0.05
        older = Worker(other, session.id, "w3")
        older.pull()
        waiting: Future[Any] = threads.submit(older.push, ONE)
        wait_until(has_pushed(session, "w3"), "the push")
        newer = Worker(client, session.id, "w3")
        newer.pull()
        with pytest.raises(errors.Fenced, match="may have been applied"):
            waiting.result(10)
    with pytest.raises(errors.Conflict, match="has pushed into round 1 already"):
        newer.push(ONE)
    assert session.step(ONE, base_version=0).version == 1
    newer.pull()
    assert newer.version == 1


def test_a_worker_that_was_removed_registers_again_by_itself(client: Client) -> None:
    session = client.create("SGD", ONE, lr=1.0, workers=sync(1))
    worker = Worker(client, session.id, "w3")
    worker.pull()
    worker.push(ONE)
    session.remove_worker("w3")
    assert session.workers()["workers"] == []
    assert worker.push(ONE).version == 2
    assert worker.epoch == 2
    worker.leave()
    assert session.workers()["workers"] == []
    with pytest.raises(errors.WorkerNotFound):
        session.remove_worker("w3")


def test_a_client_registers_under_its_own_name_and_goes_on_in_the_new_epoch(
    client: Client, server: ServerProcess
) -> None:
    session = client.create("SGD", ONE, lr=1.0, workers=sync(1))
    assert session.step(ONE, base_version=0).version == 1
    assert session.register()["epoch"] == 2
    assert session.step(ONE, base_version=1).version == 2

    async def awaited() -> None:
        async with AsyncClient(server.url) as twin:
            handle = twin.session(session.id)
            assert (await handle.register("x"))["worker"] == "x"
            assert (await handle.register())["epoch"] == 1
            assert (await handle.step(ONE, base_version=2)).version == 3
            assert [row["last_seq"] for row in (await handle.workers())["workers"]] == [1, 1, 0]
            await handle.remove_worker("x")

    asyncio.run(awaited())
    assert len(session.workers()["workers"]) == 2


# Asynchronous ------------------------------------------------------------------------------------


def test_an_asynchronous_push_is_applied_at_once_and_says_how_stale_it_was(client: Client) -> None:
    how = {"mode": "async", "max_staleness": 1, "on_stale": "reject"}
    session = client.create("SGD", {"w": np.zeros(1)}, lr=1.0, workers=how)
    one, two = Worker(client, session.id, "a"), Worker(client, session.id, "b")
    one.pull()
    two.pull()
    g = {"w": np.ones(1)}
    assert [one.push(g).staleness, two.push(g).staleness, one.push(g).staleness] == [0, 1, 1]
    assert (one.version, two.version) == (3, 2)
    one.push(g)
    with pytest.raises(errors.StaleGradient, match="max_staleness is 1") as caught:
        two.push(g)
    assert caught.value.params is not None
    assert (two.version, caught.value.params["w"].tolist()) == (4, [-4.0])
    assert two.push(g).staleness == 0


def test_stale_pushes_are_damped_where_the_session_says_so(client: Client) -> None:
    how = {"mode": "async", "max_staleness": 0, "on_stale": "damp"}
    session = client.create("SGD", {"w": np.zeros(1)}, lr=1.0, workers=how)
    one, two = Worker(client, session.id, "a"), Worker(client, session.id, "b")
    one.pull()
    two.pull()
    one.push({"w": np.ones(1)})
    result = two.push({"w": np.ones(1)})
    assert (result.staleness, result.raw["weight"]) == (1, 0.5)
    assert result.params is not None
    assert result.params["w"].tolist() == [-1.5]


# Deltas and dtypes -------------------------------------------------------------------------------


def test_deltas_are_averaged_into_the_params(client: Client, threads: ThreadPoolExecutor) -> None:
    """Federated averaging: SGD with lr 1 on minus the mean of what the workers changed."""
    start = {"w": np.arange(4, dtype=np.float32)}
    session = client.create("SGD", start, lr=1.0, workers=sync(2, push="deltas"))

    def loop(name: str, change: float) -> Worker:
        worker = Worker(client, session.id, name)
        params = worker.pull()
        for _ in range(3):
            local = {n: p + np.float32(change) for n, p in params.items()}
            result = worker.push(deltas={n: local[n] - params[n] for n in local})
            params = result.params
        return worker

    done = [threads.submit(loop, "a", 1.0), threads.submit(loop, "b", 3.0)]
    for future in done:
        assert future.result(10).params is not None
    np.testing.assert_array_equal(session.params()["w"], start["w"] + 6)
    worker = Worker(client, session.id, "a")
    worker.pull()
    with pytest.raises(errors.Invalid, match=r"grad/w"):
        worker.push({"w": np.ones(4, np.float32)})


def test_bfloat16_is_combined_in_float32(client: Client, threads: ThreadPoolExecutor) -> None:
    start = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    session = client.create("SGD", {"p": bits(start)}, lr=1.0, workers=sync(3))
    grads = [torch.randn(5, 3, generator=torch.Generator().manual_seed(k + 1)) for k in range(3)]

    def push(k: int) -> Any:
        worker = Worker(client, session.id, NAMES[k])
        worker.pull()
        return worker.push({"p": bits(grads[k].to(torch.bfloat16))}).params["p"]

    served = list(threads.map(push, range(3)))
    mean = sum(g.to(torch.bfloat16).float() for g in grads) / 3
    local = torch.nn.Parameter(start.clone())
    local.grad = mean.to(torch.bfloat16)
    torch.optim.SGD([local], lr=1.0, fused=True).step()
    for one in served:
        assert torch.equal(tensor(one), local.detach())


@pytest.mark.parametrize("push", ["gradients", "deltas"])
def test_compressed_pushes_say_in_the_end_all_that_was_to_be_said(
    client: Client, threads: ThreadPoolExecutor, push: str
) -> None:
    """What a worker left out of one push goes with a later one, so the sums come out."""
    session = client.create("SGD", {"w": np.zeros(100)}, lr=1.0, workers=sync(2, push=push))
    rng, sign = np.random.default_rng(0), -1 if push == "gradients" else 1
    parts = rng.integers(-50, 50, (2, 10, 100)).astype(np.float64)

    def loop(k: int) -> Worker:
        worker, few = Worker(client, session.id, NAMES[k]), TopK(0.02, dtype="float64")
        worker.pull()
        rest = [np.zeros(100)] * 60  # two of a hundred each time
        for part in [*parts[k], *rest]:
            pushed = {"w": part}
            given = {"deltas": pushed} if push == "deltas" else {"grads": pushed}
            worker.push(**given, compress=few)
        return worker

    for worker in threads.map(loop, range(2)):
        assert worker.version == 70
    np.testing.assert_array_equal(session.params()["w"], sign * parts.sum(axis=(0, 1)) / 2)


def bits(t: torch.Tensor) -> Bits:
    return Bits(t.view(torch.int16).numpy().view(np.uint16), "BF16")


# Pulling ahead -----------------------------------------------------------------------------------

ASYNC = {"mode": "async"}


@pytest.fixture
def counted(server: ServerProcess) -> Iterator[tuple[Proxy, Client]]:
    """A client whose requests are counted."""
    with Proxy(address(server), 0, {}) as proxy, Client(proxy.url) as client:
        yield proxy, client


def fetched(worker: Worker) -> Callable[[], bool]:
    return lambda: worker._ahead is not None and worker._ahead.ended.is_set()


def test_the_next_version_is_pulled_while_the_caller_computes(
    client: Client, counted: tuple[Proxy, Client]
) -> None:
    proxy, behind = counted
    session = client.create("SGD", ONE, lr=1.0, workers=ASYNC)
    worker = Worker(behind, session.id, "a")
    worker.pull()
    worker.prefetch()
    worker.prefetch()  # one is enough
    assert not fetched(worker)()
    session.step(ONE)
    wait_until(fetched(worker), "the next version")
    assert worker.version == 0, "the caller still computes with it"
    before = proxy.requests
    assert worker.pull().version == worker.version == 1
    assert proxy.requests == before == 3
    np.testing.assert_array_equal(worker.params["w"], np.zeros(3))  # type: ignore[index]
    assert worker.push(ONE).staleness == 0


def test_a_pull_does_not_wait_for_a_version_that_is_not_there(client: Client) -> None:
    session = client.create("SGD", ONE, lr=1.0, workers=ASYNC)
    worker = Worker(client, session.id, "a")
    first = worker.pull()
    worker.prefetch()
    assert worker.pull() is first
    ahead = worker._ahead
    assert ahead is not None
    session.step(ONE)
    session.step(ONE)
    assert worker.pull().version in (1, 2)  # the next one, or a later one
    assert worker._ahead is None
    assert worker.pull().version == 2
    worker.close()


def test_what_a_push_brought_is_not_replaced_by_what_was_pulled_before(client: Client) -> None:
    session = client.create("SGD", ONE, lr=1.0, workers=ASYNC)
    worker = Worker(client, session.id, "a")
    worker.pull()
    worker.prefetch()
    session.step(ONE)
    wait_until(fetched(worker), "the next version")
    worker.push(ONE)
    held = worker.params
    assert held is not None
    assert held.version == 2
    assert worker.pull() is held


def test_pulling_ahead_is_over_when_the_worker_is_closed(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optserve_client._member.AHEAD_S", 0.05)
    session = client.create("SGD", ONE, lr=1.0, workers=ASYNC)
    with Worker(client, session.id, "a") as worker:
        worker.pull()
        worker.prefetch()
        ahead = worker._ahead
        assert ahead is not None
    wait_until(ahead.ended.is_set, "the end of its thread")
    assert ahead.result() is None


def test_a_pull_says_why_nothing_could_be_pulled_ahead(client: Client) -> None:
    session = client.create("SGD", ONE, lr=1.0, workers=ASYNC)
    worker = Worker(client, session.id, "a")
    worker.pull()
    worker.prefetch()
    session.delete()
    wait_until(fetched(worker), "the refusal")
    with pytest.raises(errors.SessionNotFound):
        worker.pull()


def test_three_workers_that_pull_ahead_make_one_version_each_time(
    client: Client, threads: ThreadPoolExecutor
) -> None:
    session = client.create("SGD", {"w": np.zeros(1)}, lr=1.0, workers=ASYNC)

    def loop(name: str) -> int:
        staleness = 0
        with Worker(client, session.id, name) as worker:
            for _ in range(20):
                worker.pull()
                worker.prefetch()
                staleness += worker.push({"w": np.ones(1)}, returns="none").staleness or 0
        return staleness

    list(threads.map(loop, NAMES))
    assert session.status()["updates"] == 60
    assert session.params()["w"].tolist() == [-60.0]


def test_an_awaited_worker_pulls_ahead_as_well(server: ServerProcess) -> None:
    async def run() -> None:
        async with AsyncClient(server.url) as client:
            session = await client.create("SGD", ONE, lr=1.0, workers=ASYNC)
            async with AsyncWorker(client, session.id, "a") as worker:
                first = await worker.pull()
                await worker.prefetch()
                assert await worker.pull() is first
                await session.step(ONE)
                assert (await worker.pull()).version == 1
                await worker.prefetch()
                await session.delete()
                with pytest.raises(errors.SessionNotFound):
                    await worker.pull()
                await worker.prefetch()

    asyncio.run(run())


def test_a_pull_that_is_given_up_leaves_what_is_pulled_ahead_alone(server: ServerProcess) -> None:
    async def run() -> None:
        async with AsyncClient(server.url) as client:
            session = await client.create("SGD", ONE, lr=1.0, workers=ASYNC)
            async with AsyncWorker(client, session.id, "a") as worker:
                await worker.pull()
                await session.step(ONE)
                gate = asyncio.Event()

                async def late() -> Any:
                    await gate.wait()
                    return await session.params()

                worker._ahead = 1, asyncio.create_task(late())
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(worker.pull(), 0.5)
                gate.set()
                assert (await worker.pull()).version == 1

    asyncio.run(run())


# Awaited -----------------------------------------------------------------------------------------


def test_awaited_workers_share_a_client_and_train_as_one_process(server: ServerProcess) -> None:
    async def loop(client: AsyncClient, session_id: str, k: int) -> Any:
        async with AsyncWorker(client, session_id, NAMES[k]) as worker:
            await worker.pull()
            for i in range(5):
                await worker.push(arrays(i, k))
            return worker.params

    async def run() -> list[Any]:
        async with AsyncClient(server.url) as client:
            session = await client.create("AdamW", arrays(0), lr=0.01, workers=sync(3))
            loops = (loop(client, session.id, k) for k in range(3))
            return await asyncio.gather(*loops)

    local = Local(arrays(0))
    for i in range(5):
        local.step([arrays(i, k) for k in range(3)])
    for params in asyncio.run(run()):
        local.check(params)


def test_a_cancelled_push_is_settled_before_the_next_one(server: ServerProcess) -> None:
    async def run() -> None:
        async with AsyncClient(server.url) as client:
            session = await client.create("SGD", ONE, lr=1.0, workers=sync(2))
            one = AsyncWorker(client, session.id, "a")
            await one.pull()
            task = asyncio.create_task(one.push(ONE))
            while (await session.workers())["round"] is None:
                await asyncio.sleep(0.005)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            again = asyncio.create_task(one.push(ONE))
            other = AsyncWorker(client, session.id, "b")
            await other.pull()
            assert (await other.push(ONE)).version == 1
            result = await again
            assert (result.duplicate, result.version) == (True, 1)

    asyncio.run(run())


def test_threads_may_share_one_worker(client: Client, threads: ThreadPoolExecutor) -> None:
    session = client.create("SGD", {"w": np.zeros(1)}, lr=1.0, workers={"mode": "async"})
    worker, g = Worker(client, session.id, "a"), {"w": np.ones(1)}
    barrier = threading.Barrier(4)

    def push(_: int) -> int:
        barrier.wait()
        worker.pull()
        return int(worker.push(g).version)

    assert sorted(threads.map(push, range(4))) == [1, 2, 3, 4]
    assert worker.epoch == 1
