"""The plain sockets of both clients against a real server."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvloop

from optserve_client import AsyncClient, Client, errors
from optserve_client._transport import Blocking
from tests.serving import ServerProcess

LIMIT = 3_000_000


@pytest.fixture(scope="module", params=["tcp", "unix"])
def small(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """A server that takes bodies up to LIMIT."""
    path: Path = tmp_path_factory.mktemp("sockets") / "o.sock"
    flags = ("--uds", str(path)) if request.param == "unix" else ()
    with ServerProcess(*flags, env={"OPTSERVE_MAX_BODY_BYTES": str(LIMIT)}) as server:
        yield server


@pytest.fixture(params=["blocking", "asyncio", "uvloop"])
def steps(request: pytest.FixtureRequest) -> Callable[..., list[Any]]:
    """Creates a session of SGD and sends steps; returns the results, or what they raised."""

    def blocking(url: str, w: Any, grads: list[Any]) -> list[Any]:
        found: list[Any] = []
        with Client(url, retries=0) as client:
            session = client.create("SGD", {"w": w}, lr=1.0)
            for grad in grads:
                try:
                    found.append(session.step({"w": grad}))
                except errors.OptserveError as exc:
                    found.append(exc)
        return found

    async def awaited(url: str, w: Any, grads: list[Any]) -> list[Any]:
        found: list[Any] = []
        async with AsyncClient(url, retries=0) as client:
            session = await client.create("SGD", {"w": w}, lr=1.0)
            for grad in grads:
                try:
                    found.append(await session.step({"w": grad}))
                except errors.OptserveError as exc:
                    found.append(exc)
        return found

    if request.param == "blocking":
        return blocking
    run = uvloop.run if request.param == "uvloop" else asyncio.run
    return lambda url, w, grads: run(awaited(url, w, grads))


def test_steps_over_plain_sockets_are_whole(
    small: ServerProcess, steps: Callable[..., list[Any]]
) -> None:
    w = np.zeros(700_000, np.float32)
    grads = [np.full_like(w, i) for i in range(1, 6)]
    results = steps(small.url, w, grads)
    for i, result in enumerate(results):
        np.testing.assert_array_equal(result.params["w"], np.full_like(w, -sum(range(i + 2))))
        assert result.params["w"].flags.aligned


def test_the_memory_of_a_result_is_used_again_once_nobody_has_it(small: ServerProcess) -> None:
    w = np.zeros(500_000, np.float32)

    with Client(small.url) as client:
        session = client.create("SGD", {"w": w}, lr=1.0)
        memory = client._transport._memory  # type: ignore[attr-defined]

        def step() -> Any:
            return session.step({"w": w + 1}).params["w"]  # type: ignore[index]

        step()
        (block,) = memory._spare
        kept = step()[7:9]
        assert np.shares_memory(kept, block)
        assert list(memory._spare) == []
        del block
        assert [float(step()[0]), float(step()[0]), *kept] == [-3, -4, -2, -2]
        assert len(memory._spare) == 1
    assert list(memory._spare) == []


async def _in_turn(url: str, w: Any) -> None:
    async with AsyncClient(url) as client:
        sessions = [await client.create("SGD", {"w": w + i}, lr=1.0) for i in range(4)]
        memory = client._transport._memory  # type: ignore[attr-defined]
        for turn in range(1, 4):
            results = await asyncio.gather(*(one.step({"w": w + 1}) for one in sessions))
            kept = [result.params["w"][5:7] for result in results]  # type: ignore[index]
            del results
            assert [list(part) for part in kept] == [[i - turn] * 2 for i in range(4)]
            assert len(memory._spare) <= 1
        del kept
        assert len(memory._spare) == 1
    assert list(memory._spare) == []


def test_results_that_arrive_at_once_have_memory_of_their_own(small: ServerProcess) -> None:
    asyncio.run(_in_turn(small.url, np.zeros(500_000, np.float32)))


def test_a_body_that_is_too_large_is_refused_by_its_name_and_the_next_step_works(
    small: ServerProcess, steps: Callable[..., list[Any]]
) -> None:
    w = np.zeros(10, np.float32)
    refused, taken = steps(small.url, w, [np.zeros(20_000_000, np.float32), w + 1])
    assert type(refused) is errors.TooLarge, refused
    assert taken.version == 1


def test_threads_that_share_a_client_train_apart(small: ServerProcess) -> None:
    def train(index: int) -> None:
        session = client.create("SGD", {"w": np.zeros(50, np.float32)}, lr=1.0)
        for _ in range(20):
            result = session.step({"w": np.full(50, index, np.float32)})
        assert result.params is not None
        got[index] = float(result.params["w"][0])  # type: ignore[index]

    got: dict[int, float] = {}
    with Client(small.url, retries=0) as client:
        assert isinstance(client._transport, Blocking)
        threads = [threading.Thread(target=train, args=(i,)) for i in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(client._transport._pool._idle) <= 5
    assert got == {i: -20.0 * i for i in range(5)}
