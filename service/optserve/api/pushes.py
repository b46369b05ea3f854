"""One step sent tensor by tensor: opened, filled by as many requests as there are gradients, over
as many connections as its sender likes, and committed as one."""

from __future__ import annotations

import time
from typing import Annotated, Any

from fastapi import Path
from starlette.requests import Request
from starlette.responses import Response

from optserve.api.bodies import Body, body_kind, settings_of
from optserve.api.decode import digest_of, header_key
from optserve.api.json_text import loads_object
from optserve.api.long_lists import loads_tensor
from optserve.api.openapi import BINARY, KEY_PARAMETER, operation
from optserve.api.replies import encode_reply, json_response
from optserve.api.routing import Direct, SessionId, any_media, json_media, router, session_of
from optserve.api.step import ERRORS, identity_of, stepped
from optserve.api.waiting import done, loaded, off_loop
from optserve.sessions.arriving import Arrival, Gradient
from optserve.sessions.fields import StepFields
from optserve.sessions.ledger import Identity, check_identity
from optserve.sessions.push import Push
from optserve.sessions.session import Session
from optserve.sessions.step import Step
from optserve_client.errors import (
    BodyTimeout,
    Conflict,
    KeyReused,
    Malformed,
    MissingGradient,
    OptserveError,
    PushNotFound,
    SessionNotFound,
    Unavailable,
)
from optserve_client.wire import BytesLike

routes = router("pushes", Direct)

PushId = Annotated[str, Path(description="What opening the push answered as `push`.")]
Name = Annotated[
    str, Path(description="Of a parameter, percent-encoded; a slash in it may stay as it is.")
]


@routes.post(
    "/v1/sessions/{session_id}/pushes",
    **operation(
        "Open a push: a step that comes tensor by tensor",
        body="PushBody",
        body_required=False,
        status=201,
        reply="PushOpened",
        also={200: "PushOpened"},
        parameters=[KEY_PARAMETER],
        errors=[SessionNotFound, KeyReused, Unavailable],
    ),
)
async def open_push(session_id: SessionId, request: Request) -> Response:
    """Takes all fields of a step; they may come with the commit as well. A repeat with the same
    Idempotency-Key answers with the push that the first one opened, as long as that is open."""
    json_media(request)
    session = session_of(request, session_id)
    push, new = await decode_opening(request, session)
    opened = {"id": session.id, **push.progress()}
    location = f"/v1/sessions/{session.id}/pushes/{push.id}"
    return json_response(opened, 201 if new else 200, {"location": location})


@routes.get(
    "/v1/sessions/{session_id}/pushes/{push_id}",
    **operation(
        "See what has arrived of a push",
        reply="PushStatus",
        errors=[SessionNotFound, PushNotFound],
    ),
)
async def get_push(session_id: SessionId, push_id: PushId, request: Request) -> Response:
    """Which gradients are there, which are on their way, and which are missing."""
    json_media(request)
    session = session_of(request, session_id)
    return json_response({"id": session.id, **session.pushes.get(push_id).told()})


@routes.delete(
    "/v1/sessions/{session_id}/pushes/{push_id}",
    **operation(
        "Give up a push",
        reply="PushDeleted",
        errors=[SessionNotFound, PushNotFound, Conflict],
    ),
)
async def delete_push(session_id: SessionId, push_id: PushId, request: Request) -> Response:
    """Nothing of it is left. Who does not ask for this, and commits nothing, holds memory until the
    push expires."""
    json_media(request)
    session = session_of(request, session_id)
    session.pushes.give_up(push_id)
    return json_response({"id": session.id, "push": push_id, "deleted": True})


@routes.post(
    "/v1/sessions/{session_id}/pushes/{push_id}/commit",
    **operation(
        "Take the step whose gradients have arrived",
        body="PushBody",
        body_required=False,
        reply="StepReply",
        binary_reply=True,
        parameters=[KEY_PARAMETER],
        errors=[*ERRORS, PushNotFound],
    ),
)
async def commit_push(session_id: SessionId, push_id: PushId, request: Request) -> Response:
    """Answers like a step. The body may bring fields that the opening did not. If it is refused for
    one of them, or for a gradient that is missing or on its way, the push stays; any other refusal
    ends it."""
    media, key, session = any_media(request), header_key(request), session_of(request, session_id)
    step, key = await decode_commit(request, session, push_id, key)
    return await encode_reply(media, await stepped(session, step, key))


@routes.put(
    "/v1/sessions/{session_id}/pushes/{push_id}/{name:path}",
    **operation(
        "Send one gradient of a push",
        body="GradientBody",
        binary=BINARY,
        reply="PushProgress",
        errors=[SessionNotFound, PushNotFound, Conflict, MissingGradient, Unavailable],
    ),
)
async def put_gradient(
    session_id: SessionId, push_id: PushId, name: Name, request: Request
) -> Response:
    """Binary: a frame with `grad/<name>` alone, or with the two halves of a sparse gradient. Once
    more replaces it, also while an earlier body of it is still arriving."""
    json_media(request)
    session = session_of(request, session_id)
    push = await decode_gradient(request, session, push_id, name)
    return json_response({"id": session.id, "name": name, **push.progress()})


# --- what they say -------------------------------------------------------------------------------


async def decode_opening(request: Request, session: Session) -> tuple[Push, bool]:
    """Open the push that the body describes; return it and whether it is a new one."""
    fields, raw = await read_fields(request)
    await loaded(session)
    shape, _ = session.stage()
    return session.pushes.open(
        shape,
        fields,
        ttl_s=settings_of(request).push_ttl_s,
        key=header_key(request),
        digest=digest_of(request, "push", raw),
    )


async def read_fields(request: Request) -> tuple[dict[str, Any], BytesLike]:
    """Return the fields in a JSON body, which may be missing, and the body."""
    if body_kind(request, ("json",)) is None:
        return {}, b""
    raw = await Body(request, settings_of(request).max_json_bytes).read()
    return await off_loop(len(raw), loads_object, raw), raw


async def decode_gradient(request: Request, session: Session, push_id: str, name: str) -> Push:
    """Put the gradient in the body into its push, which is returned."""
    kind, settings = body_kind(request), settings_of(request)
    if kind is None:
        raise Malformed("the body is empty, expected a gradient")
    push, (shape, _) = session.pushes.get(push_id), session.stage()
    arrival = session.pushes.arrival(push, name, shape.expected, settings.max_body_bytes)
    try:
        if kind == "json":
            raw = await Body(request, settings.max_json_bytes).read()
            gradient = await off_loop(len(raw), _from_text, arrival, raw)
        else:
            await Body(request, settings.max_body_bytes).into(arrival)
            arrival.finishing = True
            gradient = await off_loop(arrival.later_bytes, arrival.whole)
        arrival.settle(gradient)
    except BaseException as exc:
        refused = isinstance(exc, OptserveError) and not isinstance(exc, BodyTimeout)
        arrival.abort(broken=not refused)
        raise
    return push


def _from_text(arrival: Arrival, raw: BytesLike) -> Gradient:
    return arrival.read(loads_tensor(raw, "grad"))


async def decode_commit(
    request: Request, session: Session, push_id: str, key: str | None
) -> tuple[Step, str | None]:
    """Return the step that a push has become, and the key to go by; the step of one that was
    committed before has no tensors, and the ledger knows it."""
    more, _ = await read_fields(request)
    push = session.pushes.get(push_id)
    fields = push.joined(more)
    identity = Identity(worker=fields.worker, epoch=fields.epoch, seq=fields.seq, key=key)
    if identity == Identity():
        key = push.id  # so that a repeat is known at least as long as the push is
    check_identity(identity)
    if push.made is None:
        return await _made(session, push, fields), key
    if push.said != fields:
        raise KeyReused(f"push {push.id!r} was committed before with other fields")
    await done(push.made)
    step = push.spent_step()
    identity = identity_of(step, key)
    if await done(session.run(lambda state: state.check_identity(identity, time.time()))) is None:
        raise PushNotFound(f"push {push.id!r} was committed, and nothing came of it; begin again")
    return step, key


async def _made(session: Session, push: Push, fields: StepFields) -> Step:
    push.close(fields)
    _, writer = session.stage()
    try:
        step = await off_loop(push.frame_bytes, push.step, writer)
    except Exception as exc:
        push.reopen(exc)
        raise
    session.pushes.spend(push)
    return step
