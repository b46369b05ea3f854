"""Sessions themselves: create, list, read, change, copy, delete."""

from __future__ import annotations

from typing import Annotated

from fastapi import Query
from starlette.requests import Request
from starlette.responses import Response

from optserve.api.decode import Claim, Incoming, list_dtype, read_request
from optserve.api.openapi import BINARY, operation
from optserve.api.replies import encode_reply, json_response
from optserve.api.routing import (
    TENANT,
    JsonMedia,
    Media,
    SessionId,
    registry_of,
    router,
    session_of,
)
from optserve.api.waiting import done
from optserve.sessions.operations import Patch
from optserve.sessions.registry import Registry
from optserve.sessions.reply import Reply
from optserve_client.errors import (
    Conflict,
    Invalid,
    SessionExists,
    SessionNotFound,
    TorchRefused,
)

routes = router("sessions")


@routes.post(
    "/v1/sessions",
    **operation(
        "Create a session under an id of the server's choice",
        body="CreateBody",
        binary=BINARY,
        status=201,
        reply="CreateReply",
        also={200: "CreateReply"},
        binary_reply=True,
        errors=[TorchRefused],
    ),
)
async def create_session(request: Request, media: Media, claim: Claim) -> Response:
    """A repeat with the same Idempotency-Key answers with the session that the first one made."""
    incoming = await read_request(request, claim, "sessions", ("json", "safetensors"))
    return await encode_reply(media, await create(registry_of(request), None, incoming))


@routes.put(
    "/v1/sessions/{session_id}",
    **operation(
        "Create a session under an id of your choice, or find that it is there",
        body="CreateBody",
        binary=BINARY,
        reply="CreateReply",
        binary_reply=True,
        also={201: "CreateReply"},
        errors=[SessionExists, TorchRefused],
    ),
)
async def put_session(
    session_id: SessionId, request: Request, media: Media, claim: Claim
) -> Response:
    """201 if it is new; 200 with `created: false` if a session with the same normalised config,
    names, shapes and dtypes is there, whatever its values; 409 if it has another."""
    incoming = await read_request(request, claim, "session", ("json", "safetensors"))
    reply = await create(registry_of(request), session_id, incoming, exist_ok=True)
    return await encode_reply(media, reply)


async def create(
    registry: Registry, session_id: str | None, incoming: Incoming, *, exist_ok: bool = False
) -> Reply:
    """Have a session made of a create body."""
    fields = incoming.fields
    if "id" in fields:
        raise Invalid("id is no field of this body; PUT /v1/sessions/{id} takes it", field="id")
    params = await incoming.take_params(list_dtype(fields))
    order = None
    if params is not None and "order" not in fields:
        # The caller chose the order of a JSON object's members; a frame's tensors have none.
        order = list(params) if incoming.tensors is None else sorted(params, key=str.encode)
    return await done(
        registry.create(
            TENANT, session_id, fields, params or {}, order, incoming.identity, exist_ok=exist_ok
        )
    )


@routes.get("/v1/sessions", **operation("List sessions", reply="SessionPage"))
async def list_sessions(
    request: Request,
    media: JsonMedia,
    cursor: Annotated[
        str | None, Query(max_length=1024, description="`next_cursor` of the page before.")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=1000, description="Rows on a page.")] = 100,
    tag: Annotated[
        list[str] | None,
        Query(description="`key:value`; repeat it for sessions that have all of them."),
    ] = None,
    order_by: Annotated[
        str, Query(pattern=r"^-?(created|updated|name)$", description="`-` for descending.")
    ] = "created",
) -> Response:
    """One page of the sessions, each with its name, tags, optimizer and counters."""
    page = registry_of(request).page(
        TENANT, cursor=cursor, limit=limit, tags=parse_tags(tag or []), order_by=order_by
    )
    return json_response(page)


def parse_tags(pairs: list[str]) -> dict[str, str]:
    tags: dict[str, str] = {}
    for pair in pairs:
        key, colon, value = pair.partition(":")
        if not colon or not key:
            raise Invalid(f"tag must be key:value, got {pair!r:.80}", field="tag")
        if tags.setdefault(key, value) != value:
            raise Invalid(f"tag {key!r:.80} is asked for with two values", field="tag")
    return tags


@routes.get(
    "/v1/sessions/{session_id}",
    **operation("Read a session's status", reply="Session", errors=[SessionNotFound]),
)
async def get_session(session_id: SessionId, request: Request, media: JsonMedia) -> Response:
    """The full config, effective hyperparameters, counters, and the same in a line of torch."""
    return json_response(await done(session_of(request, session_id).status()))


@routes.patch(
    "/v1/sessions/{session_id}",
    **operation(
        "Change clipping, accumulation, name, notes or tags",
        body="PatchBody",
        reply="ChangeReply",
        binary_reply=True,
        errors=[SessionNotFound, Conflict],
    ),
)
async def patch_session(
    session_id: SessionId, request: Request, media: Media, claim: Claim
) -> Response:
    """Fields that are left out stay as they are."""
    session = session_of(request, session_id)
    incoming = await read_request(request, claim, "session")
    abandon = incoming.take_flag("abandon")
    change = Patch.of_body(incoming.fields)
    reply = session.change(change, incoming.identity, abandon=abandon)
    return await encode_reply(media, await done(reply))


@routes.delete(
    "/v1/sessions/{session_id}",
    **operation(
        "Delete a session",
        reply="DeleteReply",
        binary_reply=True,
        errors=[SessionNotFound, Conflict],
    ),
)
async def delete_session(
    session_id: SessionId,
    request: Request,
    media: Media,
    claim: Claim,
) -> Response:
    """Forget the session, its journal and its snapshots. A repeat answers 404."""
    incoming = await read_request(request, claim, "session", needs=None)
    incoming.check_empty()
    registry = registry_of(request)
    reply = await done(registry.delete(TENANT, session_id, incoming.identity))
    return await encode_reply(media, reply)


@routes.post(
    "/v1/sessions/{session_id}/fork",
    **operation(
        "Copy a session",
        body="ForkBody",
        body_required=False,
        status=201,
        reply="CreateReply",
        also={200: "CreateReply"},
        binary_reply=True,
        errors=[SessionNotFound, SessionExists],
    ),
)
async def fork_session(
    session_id: SessionId, request: Request, media: Media, claim: Claim
) -> Response:
    """The copy has everything of the original, a generation of its own, and goes its own way."""
    incoming = await read_request(request, claim, f"fork {session_id}", needs=None)
    registry = registry_of(request)
    reply = await done(registry.fork(TENANT, session_id, incoming.fields, incoming.identity))
    return await encode_reply(media, reply)
