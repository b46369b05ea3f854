"""Parameter groups: set hyperparameters now, add a group."""

from __future__ import annotations

from typing import Annotated

from fastapi import Path
from starlette.requests import Request
from starlette.responses import Response

from optserve.api.decode import Claim, read_request
from optserve.api.openapi import BINARY, operation
from optserve.api.replies import encode_reply
from optserve.api.routing import Media, SessionId, router, session_of
from optserve.api.waiting import done, loaded
from optserve.sessions.operations import AddGroup, PatchGroup
from optserve_client.errors import (
    Conflict,
    LineSearchOpen,
    SessionNotFound,
    TorchRefused,
)

routes = router("groups")


@routes.patch(
    "/v1/sessions/{session_id}/groups/{index}",
    **operation(
        "Set hyperparameters of one group",
        body="GroupBody",
        reply="ChangeReply",
        binary_reply=True,
        errors=[SessionNotFound, Conflict, LineSearchOpen, TorchRefused],
    ),
)
async def patch_group(
    session_id: SessionId,
    index: Annotated[int, Path(ge=0, description="Its place in torch's param_groups.")],
    request: Request,
    media: Media,
    claim: Claim,
) -> Response:
    """As an assignment to `optimizer.param_groups[i]`: from the next step on, until changed."""
    session = session_of(request, session_id)
    incoming = await read_request(request, claim, f"groups/{index}")
    abandon = incoming.take_flag("abandon")
    change = PatchGroup(index=index, hyper=incoming.fields)
    reply = session.change(change, incoming.identity, abandon=abandon)
    return await encode_reply(media, await done(reply))


@routes.post(
    "/v1/sessions/{session_id}/groups",
    **operation(
        "Add a group with its parameters",
        body="AddGroupBody",
        binary=BINARY,
        reply="ChangeReply",
        binary_reply=True,
        errors=[SessionNotFound, Conflict, LineSearchOpen, TorchRefused],
    ),
)
async def add_group(
    session_id: SessionId, request: Request, media: Media, claim: Claim
) -> Response:
    """torch's `add_param_group`: new names at the end of the session's order."""
    session = session_of(request, session_id)
    incoming = await read_request(request, claim, "groups", ("json", "safetensors"))
    await loaded(session)
    params = await incoming.take_params(session.layout.dtype)
    abandon = incoming.take_flag("abandon")
    change = AddGroup(fields=incoming.fields, params=params or {})
    reply = session.change(change, incoming.identity, abandon=abandon)
    return await encode_reply(media, await done(reply))
