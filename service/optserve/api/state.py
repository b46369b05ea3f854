"""A session as one file: export and import."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from fastapi import Header, Query
from starlette.requests import Request
from starlette.responses import Response

from optserve.api.bodies import Body, body_kind, settings_of
from optserve.api.decode import Claim, digest_of
from optserve.api.negotiation import negotiate
from optserve.api.openapi import BINARY, operation
from optserve.api.replies import PartsResponse, encode_reply
from optserve.api.routing import TENANT, Media, SessionId, registry_of, router, session_of
from optserve.api.waiting import done, off_loop
from optserve.sessions.identity import Identity, check_identity
from optserve_client.errors import (
    Conflict,
    LineSearchOpen,
    Malformed,
    PreconditionFailed,
    SessionNotFound,
)
from optserve_client.wire import SAFETENSORS

routes = router("state")


@routes.get(
    "/v1/sessions/{session_id}/state",
    **operation(
        "Export everything as one safetensors file",
        binary_reply=True,
        errors=[SessionNotFound],
    ),
)
async def get_state(session_id: SessionId, request: Request) -> Response:
    """`param/<name>`, `state/<name>/<torch's key>`, `ema/`, `best/`; the rest is JSON with a
    `format` number in `__metadata__["optserve"]`. The safetensors package alone can load it."""
    negotiate(request.headers.get("accept"), (SAFETENSORS, "application/octet-stream"))
    session = session_of(request, session_id)
    frame = await done(session.export())
    name = f'attachment; filename="{session.id}.safetensors"'
    return PartsResponse(frame, headers={"content-disposition": name})


@routes.put(
    "/v1/sessions/{session_id}/state",
    **operation(
        "Import a state file",
        binary=BINARY,
        reply="ChangeReply",
        binary_reply=True,
        also={201: "CreateReply"},
        errors=[Conflict, LineSearchOpen, PreconditionFailed],
    ),
)
async def put_state(
    session_id: SessionId,
    request: Request,
    media: Media,
    claim: Claim,
    abandon: Annotated[bool, Query(description="Even while an LBFGS line search is open.")] = False,
    if_match: Annotated[
        str | None, Header(description="The ETag that the session must still have; else 412.")
    ] = None,
) -> Response:
    """Replaces everything but the session's identity and counters; creates it if the id is new."""
    data, identity = await _read_file(request, claim)
    reply = registry_of(request).import_session(
        TENANT, session_id, data, identity, abandon=abandon, if_match=if_match
    )
    return await encode_reply(media, await done(reply))


async def _read_file(request: Request, claim: Identity) -> tuple[memoryview, Identity]:
    if body_kind(request, ("safetensors",)) is None:
        raise Malformed("the body is empty, expected a state file")
    raw = await Body(request, settings_of(request).max_body_bytes).read()
    digest = await off_loop(len(raw), digest_of, request, "state", raw)
    identity = replace(claim, digest=digest)
    check_identity(identity)
    return memoryview(raw), identity
