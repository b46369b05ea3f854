"""Where work is done that the event loop must not do, and how its end is waited for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any, ParamSpec, TypeAlias, TypeVar

from starlette.requests import ClientDisconnect, Request

from optserve.api.connection import EXTENSION, Exchange
from optserve.api.draining import Drain
from optserve.sessions.session import Session

P = ParamSpec("P")
T = TypeVar("T")

#: What is smaller than this is parsed or encoded on the event loop; a thread costs more.
OFF_LOOP_BYTES = 64 * 1024

#: Has a function called on the event loop once something has happened; returns what takes that
#: back.
Happening: TypeAlias = Callable[[Callable[[], object]], Callable[[], object]]


async def off_loop(nbytes: int, fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call ``fn``, in a thread if it has so much to do that other requests would notice."""
    if nbytes <= OFF_LOOP_BYTES:
        return fn(*args, **kwargs)
    return await asyncio.to_thread(fn, *args, **kwargs)


async def loaded(session: Session) -> None:
    """Wait until what a body must look like is known."""
    if session.cold:
        await done(session.load())


async def done(future: Future[T]) -> T:
    """Wait for a job of a session. Who stops waiting does not cancel it: it was received whole."""
    if future.done():
        return future.result()
    return await asyncio.shield(asyncio.wrap_future(future))


def drain_of(request: Request) -> Drain:
    drain: Drain = request.app.state.drain
    return drain


async def until(happens: Future[Any] | Happening, seconds: float, request: Request) -> bool:
    """Wait until a job has ended, or something happens; return whether it has.

    It has not if ``seconds`` are over, or if the server begins to stop, which who waits must not
    hold up. Raises ClientDisconnect when the client goes away; the job goes on in any case. Until
    one of these there is nothing but one future and a timer: no thread, and nobody polls.
    """
    if isinstance(happens, Future):
        if happens.done():
            return True
        happens = partial(_when_done, happens)
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[bool] = loop.create_future()

    def end(happened: bool = False) -> None:
        if not ended.done():
            ended.set_result(happened)

    def gone() -> None:
        if not ended.done():
            ended.set_exception(ClientDisconnect())

    take_back = [happens(partial(end, True))]
    try:
        drain = drain_of(request)
        if drain.begun or seconds <= 0:
            end()
        take_back.append(drain.when_begun(end))
        take_back.append(_when_gone(request, gone))
        take_back.append(loop.call_later(seconds, end).cancel)
        return await ended
    finally:
        for undo in take_back:
            undo()


def _when_done(job: Future[Any], tell: Callable[[], object]) -> Callable[[], object]:
    loop = asyncio.get_running_loop()

    def ended(_: Future[Any]) -> None:
        with suppress(RuntimeError):  # the loop has ended, and whoever waited there with it
            loop.call_soon_threadsafe(tell)

    job.add_done_callback(ended)
    return lambda: None  # a job does not forget; who is told too late does not mind


def _when_gone(request: Request, tell: Callable[[], object]) -> Callable[[], object]:
    """Have ``tell`` called when the client goes away: by our connection, or by ASGI's message."""
    connection: Exchange | None = request.scope.get("extensions", {}).get(EXTENSION)
    if connection is not None:
        return connection.when_gone(tell)

    async def listen() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        tell()

    return asyncio.create_task(listen()).cancel
