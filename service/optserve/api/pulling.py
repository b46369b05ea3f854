"""Pulls that wait for a version, and those that come together, for whom one copy is made."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Query
from starlette.requests import Request

from optserve.api.waiting import drain_of, until
from optserve.sessions.published import Published
from optserve.sessions.session import Session
from optserve_client.errors import Invalid, Unavailable, VersionConflict

T = TypeVar("T")

LONGEST_WAIT_S = 3600


class Shared:
    """Jobs of sessions that only read, each for all who ask while it is under way.

    As the jobs of a session run one after the other, one that has not ended misses nothing that was
    answered before. Used on the event loop only.
    """

    def __init__(self) -> None:
        self._under_way: dict[tuple[Session, str], tuple[Future[Any], asyncio.Future[Any]]] = {}

    async def job(self, session: Session, name: str, begin: Callable[[], Future[T]]) -> T:
        """Return the result of the session's job ``name``, which ``begin`` begins."""
        key = (session, name)
        job, ended = self._under_way.get(key, (None, None))
        if job is None or ended is None or job.done():
            job = begin()
            if job.done():
                return job.result()
            self._under_way[key] = job, ended = job, asyncio.wrap_future(job)
            ended.add_done_callback(partial(self._forget, key))
        return await asyncio.shield(ended)

    def _forget(self, key: tuple[Session, str], ended: asyncio.Future[Any]) -> None:
        if self._under_way.get(key, (None, None))[1] is ended:
            del self._under_way[key]


def _shared(request: Request) -> Shared:
    shared: Shared = request.app.state.shared
    return shared


async def in_memory(session: Session, request: Request) -> None:
    """Wait until the session is in memory: one that waits for workers has deadlines to keep."""
    if session.cold:
        await _shared(request).job(session, "load", session.load)


@dataclass(frozen=True, kw_only=True, slots=True)
class At:
    """Which version is asked for."""

    #: Or a later one; None: the current one.
    min_version: int | None
    #: How long to wait for it.
    wait_s: float
    #: The only one that will do; None: any.
    version: int | None


async def read_at(
    min_version: Annotated[
        int | None, Query(ge=0, description="Answer once there is this version or a later one.")
    ] = None,
    wait_s: Annotated[
        float | None,
        Query(ge=0, le=LONGEST_WAIT_S, description="Seconds to wait for `min_version`; then 304."),
    ] = None,
    version: Annotated[
        int | None, Query(ge=0, description="This version; 409 if the current one is another.")
    ] = None,
) -> At:
    """Return what the query of a pull says about the version."""
    if wait_s is not None and min_version is None:
        raise Invalid("wait_s needs min_version, the version to wait for", field="wait_s")
    return At(min_version=min_version, wait_s=wait_s or 0.0, version=version)


Version = Annotated[At, Depends(read_at)]


async def pull(session: Session, weights: str, at: At, request: Request) -> Published | None:
    """Return the weights at the current version; None: it is still below ``at.min_version``, when
    the wait for it is over or the server begins to stop.

    Raises SessionNotFound if the session is deleted meanwhile, VersionConflict for another version
    than ``at.version``.
    """
    job = partial(_shared(request).job, session, weights, partial(session.published, weights))
    if at.min_version is None:
        published = await job()
    else:
        if weights != "live":
            await job()  # what will be refused is refused now
        made = await _pull_later(session, at.min_version, at.wait_s, job, request)
        if made is None:
            return None
        published = made
    if at.version not in (None, published.version):
        raise VersionConflict(
            f"version {at.version} is asked for, the session's version is {published.version}",
            version=published.version,
        )
    return published


async def _pull_later(
    session: Session,
    version: int,
    wait_s: float,
    job: Callable[[], Awaitable[Published]],
    request: Request,
) -> Published | None:
    """Return what ``job`` makes once the session has ``version`` or a later one."""
    loop = asyncio.get_running_loop()
    end, in_vain = loop.time() + wait_s, False
    while True:
        if session.version >= version or session.closed:
            published = await job()
            if published.version >= version:  # it goes back where history was lost
                return published
        left_s = end - loop.time()
        if in_vain or left_s <= 0:
            return None
        if drain_of(request).begun:
            raise Unavailable("the server is stopping, so nobody can wait", retry_after=1)
        in_vain = not await until(partial(_made, session, version), left_s, request)


def _made(session: Session, version: int, tell: Callable[[], object]) -> Callable[[], None]:
    """Have ``tell`` called when the session has that version, or is deleted."""
    back = asyncio.get_running_loop().call_soon_threadsafe
    leave = session.watching.add(version, tell, back)
    if session.version >= version or session.closed:
        tell()
    return leave
