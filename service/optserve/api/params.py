"""A session's params: pull them, overwrite them."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import Header, Query
from starlette.requests import Request
from starlette.responses import Response

from optserve.api.coded import VARY
from optserve.api.decode import Claim, read_request
from optserve.api.negotiation import matching
from optserve.api.openapi import BINARY, operation
from optserve.api.pulling import Version, in_memory, pull
from optserve.api.replies import Encoding, encode_params, encode_reply
from optserve.api.routing import Media, SessionId, router, session_of
from optserve.api.waiting import done, loaded
from optserve.optim.layout import Layout
from optserve.sessions.operations import SetParams
from optserve.sessions.published import etag_at
from optserve_client import wire
from optserve_client.errors import (
    Conflict,
    Invalid,
    LineSearchOpen,
    Nonfinite,
    PreconditionFailed,
    SessionNotFound,
    Unavailable,
    VersionConflict,
)

routes = router("params")

Weights = Literal["live", "eval", "ema", "best"]
DtypeName = Literal["float64", "float32", "float16", "bfloat16"]


@routes.get(
    "/v1/sessions/{session_id}/params",
    **operation(
        "Pull parameters",
        reply="ParamsReply",
        binary_reply=True,
        also={304: None},
        etag=True,
        errors=[SessionNotFound, VersionConflict, Unavailable],
    ),
)
async def get_params(
    session_id: SessionId,
    request: Request,
    media: Media,
    at: Version,
    weights: Annotated[
        Weights,
        Query(description="`eval`: as ScheduleFree has them; `ema`, `best`: if kept."),
    ] = "live",
    names: Annotated[
        list[str] | None, Query(description="Only these; repeat it or separate with commas.")
    ] = None,
    encoding: Annotated[Encoding, Query(description="Of tensors inside JSON.")] = "list",
    dtype: Annotated[
        DtypeName | None, Query(description="Round to this; default: the session's own.")
    ] = None,
    if_none_match: Annotated[
        str | None, Header(description="An ETag from before; 304 if nothing has changed.")
    ] = None,
) -> Response:
    """The params of the current version, in the session's order. 304 also says that the version is
    still below `min_version`."""
    session = session_of(request, session_id)
    await in_memory(session, request)
    layout = session.layout if names is None else chosen(names, session.layout)
    form = encoding if media == "application/json" else "binary"
    published = await pull(session, weights, at, request)
    if published is None:
        name = dtype or wire.dtype_name(layout.dtype)
        return not_modified(etag_at(session.row, weights, layout, form, name))
    if names is not None:
        published = published.subset(layout.names)
    tag = wire.dtype_tag(dtype) if dtype else published.layout.dtype
    etag = published.etag(form, wire.dtype_name(tag))
    if if_none_match is not None and (known := matching(etag, if_none_match)):
        return not_modified(known)
    return await encode_params(media, session.id, published, encoding, tag, etag)


def not_modified(etag: str) -> Response:
    return Response(status_code=304, headers={"etag": etag, "vary": VARY})


def chosen(given: list[str], layout: Layout) -> Layout:
    """Return the part of ``layout`` that is asked for; a comma separates names, unless it belongs
    to one that exists."""
    names: list[str] = []
    for text in given:
        names += [text] if text in layout.by_name else text.split(",")
    if missing := [name for name in names if name not in layout.by_name]:
        raise Invalid(f"names: the session has no parameter {missing[0]!r:.80}", field="names")
    return layout.subset(names)


@routes.put(
    "/v1/sessions/{session_id}/params",
    **operation(
        "Overwrite the parameters, keeping the optimizer's state",
        body="PutParamsBody",
        binary=BINARY,
        reply="ChangeReply",
        binary_reply=True,
        errors=[SessionNotFound, Conflict, LineSearchOpen, PreconditionFailed, Nonfinite],
    ),
)
async def put_params(
    session_id: SessionId,
    request: Request,
    media: Media,
    claim: Claim,
    if_match: Annotated[
        str | None, Header(description="The ETag that the session must still have; else 412.")
    ] = None,
) -> Response:
    """All of them, in the session's shapes; a dtype that would be rounded is refused."""
    session = session_of(request, session_id)
    await loaded(session)
    incoming = await read_request(request, claim, "params", ("json", "safetensors"))
    params = await incoming.take_params(session.layout.dtype, session.layout)
    abandon = incoming.take_flag("abandon")
    incoming.check_empty("params", "abandon")
    change = SetParams(params=params or {})
    reply = session.change(change, incoming.identity, if_match=if_match, abandon=abandon)
    return await encode_reply(media, await done(reply))
