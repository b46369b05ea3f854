"""until(): a request waits for a job or a happening, and what ends that early."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message

from optserve.api.draining import Drain
from optserve.api.waiting import until

LONG_S = 3600.0


class Asked:
    """A request behind a server that is not ours, whose client goes away when told to."""

    def __init__(self) -> None:
        self.drain = Drain()
        self._gone = asyncio.Event()
        self._said = False
        app = SimpleNamespace(state=SimpleNamespace(drain=self.drain))
        self.request = Request({"type": "http", "app": app}, self._receive)

    async def _receive(self) -> Message:
        if not self._said:
            self._said = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    def leave(self) -> None:
        self._gone.set()


def run(test: Callable[[Asked], Coroutine[Any, Any, None]]) -> None:
    """Run ``test``; nothing of the waiting is left afterwards."""

    async def whole() -> None:
        asked = Asked()
        await test(asked)
        await asyncio.sleep(0)
        assert not asked.drain.busy
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(whole())


async def started(waiting: Coroutine[Any, Any, bool], asked: Asked) -> asyncio.Task[bool]:
    """Return the task that waits; it does so by now."""
    task = asyncio.create_task(waiting)
    while not asked.drain.busy:
        await asyncio.sleep(0)
    return task


def test_a_job_that_has_ended_is_not_waited_for() -> None:
    async def test(asked: Asked) -> None:
        job: Future[int] = Future()
        job.set_result(1)
        asked.drain.begin()
        assert await until(job, 0, asked.request)

    run(test)


def test_the_end_of_a_job_on_another_thread_ends_the_waiting() -> None:
    async def test(asked: Asked) -> None:
        job: Future[int] = Future()
        task = await started(until(job, LONG_S, asked.request), asked)
        await asyncio.to_thread(job.set_result, 7)
        assert await task

    run(test)


def test_a_job_that_fails_has_ended_too() -> None:
    async def test(asked: Asked) -> None:
        job: Future[int] = Future()
        task = await started(until(job, LONG_S, asked.request), asked)
        await asyncio.to_thread(job.set_exception, ValueError("no"))
        assert await task

    run(test)


@pytest.mark.parametrize("seconds", [0.01, 0.0, -1.0])
def test_after_the_seconds_the_job_goes_on_without_us(seconds: float) -> None:
    async def test(asked: Asked) -> None:
        job: Future[int] = Future()
        assert not await until(job, seconds, asked.request)
        assert not job.cancelled()
        await asyncio.to_thread(job.set_result, 7)  # who is told too late does not mind

    run(test)


def test_a_job_that_ends_after_the_loop_did_does_not_mind() -> None:
    job: Future[int] = Future()

    async def test(asked: Asked) -> None:
        assert not await until(job, 0.01, asked.request)

    run(test)
    job.set_result(7)


def test_a_stop_of_the_server_ends_the_waiting() -> None:
    async def test(asked: Asked) -> None:
        job: Future[int] = Future()
        task = await started(until(job, LONG_S, asked.request), asked)
        asked.drain.begin()
        assert not await task
        assert not await until(job, LONG_S, asked.request)

    run(test)


def test_a_client_that_goes_away_ends_the_waiting() -> None:
    async def test(asked: Asked) -> None:
        job: Future[int] = Future()
        task = await started(until(job, LONG_S, asked.request), asked)
        asked.leave()
        with pytest.raises(ClientDisconnect):
            await task
        assert not job.cancelled()

    run(test)


def test_what_happens_is_told_and_taken_back_once() -> None:
    async def test(asked: Asked) -> None:
        told: list[Callable[[], object]] = []
        ended: list[int] = []

        def happens(tell: Callable[[], object]) -> Callable[[], object]:
            told.append(tell)
            return lambda: ended.append(1)

        task = await started(until(happens, LONG_S, asked.request), asked)
        told[0]()
        told[0]()
        assert await task
        assert ended == [1]

    run(test)


def test_what_has_happened_when_it_is_asked_for_is_not_waited_for() -> None:
    async def test(asked: Asked) -> None:
        def happens(tell: Callable[[], object]) -> Callable[[], object]:
            tell()
            return lambda: None

        asked.drain.begin()
        assert await until(happens, LONG_S, asked.request)

    run(test)


def test_a_cancelled_wait_leaves_nothing() -> None:
    async def test(asked: Asked) -> None:
        job: Future[int] = Future()
        task = await started(until(job, LONG_S, asked.request), asked)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not job.cancelled()

    run(test)
