"""Where work is done that the event loop must not do, and how its end is waited for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from typing import ParamSpec, TypeVar

from optserve.sessions.session import Session

P = ParamSpec("P")
T = TypeVar("T")

#: What is smaller than this is parsed or encoded on the event loop; a thread costs more.
OFF_LOOP_BYTES = 64 * 1024


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
