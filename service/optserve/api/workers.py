"""The workers of a session: register, list, remove."""

from __future__ import annotations

from typing import Annotated

from fastapi import Path
from starlette.requests import Request
from starlette.responses import Response

from optserve.api.decode import Claim, read_request
from optserve.api.openapi import operation
from optserve.api.replies import encode_reply, json_response
from optserve.api.routing import JsonMedia, Media, SessionId, router, session_of
from optserve.api.waiting import done
from optserve.sessions.fields import Fields, Worker
from optserve.sessions.membership import Register, Remove
from optserve_client.errors import Invalid, SessionNotFound, WorkerNotFound

routes = router("workers")

#: Not validated, as an id of a session.
WorkerName = Annotated[str, Path(description="The worker's name.")]


class RegisterBody(Fields):
    """Who registers."""

    name: Worker


@routes.post(
    "/v1/sessions/{session_id}/workers",
    **operation(
        "Register a worker",
        body="RegisterBody",
        reply="WorkerReply",
        binary_reply=True,
        errors=[SessionNotFound, Invalid],
    ),
)
async def register_worker(
    session_id: SessionId, request: Request, media: Media, claim: Claim
) -> Response:
    """Gives the worker a new epoch, in which its seq begins at 1. An older process of the same name
    is refused from now on. Send an Idempotency-Key, so that a repeat gets the same epoch."""
    session = session_of(request, session_id)
    incoming = await read_request(request, claim, "workers")
    if incoming.identity.worker is not None:  # whose numbers would begin anew
        raise Invalid("a registration takes an Idempotency-Key, not worker and seq", field="worker")
    body = RegisterBody.parse(incoming.fields)
    reply = session.change(Register(worker=body.name), incoming.identity)
    return await encode_reply(media, await done(reply))


@routes.get(
    "/v1/sessions/{session_id}/workers",
    **operation("List the workers", reply="Workers", errors=[SessionNotFound]),
)
async def list_workers(session_id: SessionId, request: Request, media: JsonMedia) -> Response:
    """Each with its epoch, its last seq, the version that its last push was computed on and how far
    the session is ahead of it; and the round that is open, if one is."""
    session = session_of(request, session_id)
    listed = await done(session.workers())
    return json_response({"id": session_id, **listed})


@routes.delete(
    "/v1/sessions/{session_id}/workers/{name}",
    **operation(
        "Remove a worker",
        reply="WorkerReply",
        binary_reply=True,
        errors=[SessionNotFound, WorkerNotFound],
    ),
)
async def remove_worker(
    session_id: SessionId, name: WorkerName, request: Request, media: Media, claim: Claim
) -> Response:
    """What it still sends is refused until it registers again. Its push stays in the open round."""
    session = session_of(request, session_id)
    incoming = await read_request(request, claim, "workers", needs=None)
    incoming.check_empty()
    reply = session.change(Remove(worker=name), incoming.identity)
    return await encode_reply(media, await done(reply))
