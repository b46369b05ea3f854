"""A session's past: list what can be reached, go back to it, keep a version for good."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import Header, Path, Query
from pydantic import AfterValidator, Field
from starlette.requests import Request
from starlette.responses import Response

from optserve.api.decode import Claim, read_request
from optserve.api.openapi import operation
from optserve.api.replies import encode_reply, json_response
from optserve.api.routing import JsonMedia, Media, SessionId, router, session_of
from optserve.api.waiting import done
from optserve.sentences import shown
from optserve.sessions.fields import MAX_INT, Fields
from optserve.sessions.operations import Pin, Rollback, Unpin
from optserve_client.errors import (
    Conflict,
    Invalid,
    LineSearchOpen,
    PreconditionFailed,
    SessionNotFound,
)

routes = router("versions")

Version = Annotated[int, Path(ge=0, le=MAX_INT, description="A version of the session.")]


@routes.get(
    "/v1/sessions/{session_id}/versions",
    **operation("List the versions to go back to", reply="Versions", errors=[SessionNotFound]),
)
async def list_versions(
    session_id: SessionId,
    request: Request,
    media: JsonMedia,
    after: Annotated[
        int | None, Query(ge=0, le=MAX_INT, description="Only versions above this one.")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=100_000, description="Rows at most.")] = 1000,
) -> Response:
    """Those that a rollback or a fork can go to, oldest first, and which of them are pinned. To go
    on, send the last row's version as `after`."""
    session = session_of(request, session_id)
    rows = await asyncio.to_thread(session.versions, -1 if after is None else after, limit)
    last = rows[-1]["version"] if len(rows) == limit else None
    return json_response({"id": session_id, "rows": rows, "next_after": last})


class RollbackBody(Fields):
    """Where to go back to."""

    version: Annotated[int, Field(ge=0, le=MAX_INT)]
    #: Give up an open LBFGS line search.
    abandon: bool = False


@routes.post(
    "/v1/sessions/{session_id}/rollback",
    **operation(
        "Go back to an earlier version",
        body="RollbackBody",
        reply="ChangeReply",
        binary_reply=True,
        errors=[SessionNotFound, Conflict, LineSearchOpen, PreconditionFailed, Invalid],
    ),
)
async def roll_back(
    session_id: SessionId,
    request: Request,
    media: Media,
    claim: Claim,
    if_match: Annotated[
        str | None, Header(description="The ETag that the session must still have; else 412.")
    ] = None,
) -> Response:
    """Makes a new version whose whole state is the old one's. Nothing is forgotten: the versions
    between can be reached as before."""
    session = session_of(request, session_id)
    incoming = await read_request(request, claim, "rollback")
    body = RollbackBody.parse(incoming.fields)
    change = Rollback(version=body.version)
    reply = session.change(change, incoming.identity, if_match=if_match, abandon=body.abandon)
    return await encode_reply(media, await done(reply))


def _one_line(name: str) -> str:
    if not name.isprintable():  # PostgreSQL, for one, stores no NUL
        raise ValueError(f"must not hold control characters, got {shown(name)}")
    return name


class PinBody(Fields):
    """What a pinned version is called."""

    #: ``v<version>`` if left out.
    name: Annotated[str, Field(min_length=1, max_length=128), AfterValidator(_one_line)] | None = (
        None
    )


@routes.post(
    "/v1/sessions/{session_id}/versions/{version}/pin",
    **operation(
        "Keep a version",
        body="PinBody",
        body_required=False,
        reply="ChangeReply",
        binary_reply=True,
        errors=[SessionNotFound, Conflict, Invalid],
    ),
)
async def pin_version(
    session_id: SessionId, version: Version, request: Request, media: Media, claim: Claim
) -> Response:
    """Writes a snapshot of it that stays until it is unpinned. Again: gives it another name."""
    session = session_of(request, session_id)
    incoming = await read_request(request, claim, "pin", needs=None)
    body = PinBody.parse(incoming.fields)
    change = Pin(version=version, name=f"v{version}" if body.name is None else body.name)
    return await encode_reply(media, await done(session.change(change, incoming.identity)))


@routes.delete(
    "/v1/sessions/{session_id}/versions/{version}/pin",
    **operation(
        "Let a kept version go",
        reply="ChangeReply",
        binary_reply=True,
        errors=[SessionNotFound, Conflict, Invalid],
    ),
)
async def unpin_version(
    session_id: SessionId, version: Version, request: Request, media: Media, claim: Claim
) -> Response:
    """From now on it can be reached as long as any other version of its age. What is not pinned
    stays as it is."""
    session = session_of(request, session_id)
    incoming = await read_request(request, claim, "pin", needs=None)
    incoming.check_empty()
    reply = session.change(Unpin(version=version), incoming.identity)
    return await encode_reply(media, await done(reply))
