"""A session's learning-rate schedule: read, replace, advance, look ahead."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import Query
from starlette.requests import Request
from starlette.responses import Response

from optserve.api.decode import Claim, read_request
from optserve.api.openapi import operation
from optserve.api.replies import encode_reply, json_response
from optserve.api.routing import JsonMedia, Media, SessionId, router, session_of
from optserve.api.waiting import done
from optserve.optim import catalogue
from optserve.optim.preview import preview
from optserve.sessions import describe
from optserve.sessions.fields import Fields
from optserve.sessions.identity import Identity
from optserve.sessions.operations import AdvanceScheduler, SetScheduler
from optserve_client.errors import (
    Conflict,
    SchedulerFailed,
    SessionNotFound,
    TorchRefused,
)

routes = router("scheduler")


@routes.get(
    "/v1/sessions/{session_id}/scheduler",
    **operation("Read the scheduler", reply="Scheduler", errors=[SessionNotFound]),
)
async def get_scheduler(session_id: SessionId, request: Request, media: JsonMedia) -> Response:
    """Its normalised specification, where it stands, and the learning rates that come next."""
    return json_response(await done(session_of(request, session_id).run(describe.scheduler)))


@routes.put(
    "/v1/sessions/{session_id}/scheduler",
    **operation(
        "Replace the scheduler",
        body="SchedulerOrNull",
        reply="ChangeReply",
        binary_reply=True,
        errors=[SessionNotFound, Conflict, TorchRefused],
    ),
)
async def put_scheduler(
    session_id: SessionId,
    request: Request,
    media: Media,
    claim: Claim,
    abandon: Annotated[bool, Query(description="Give up an open LBFGS line search.")] = False,
) -> Response:
    """Attaches it as torch does, which may change the lr at once. A list is a ChainedScheduler;
    null takes the scheduler away."""
    session = session_of(request, session_id)
    incoming = await read_request(request, claim, "scheduler", needs="a value")
    change = SetScheduler(spec=incoming.value)
    reply = session.change(change, incoming.identity, abandon=abandon)
    return await encode_reply(media, await done(reply))


class AdvanceBody(Fields):
    """What advances a scheduler by one step."""

    #: What ReduceLROnPlateau follows; no other scheduler takes it.
    metrics: float | None = None
    #: Give up an open LBFGS line search.
    abandon: bool = False


@routes.post(
    "/v1/sessions/{session_id}/scheduler/step",
    **operation(
        "Advance the scheduler by one step",
        body="AdvanceBody",
        body_required=False,
        reply="ChangeReply",
        binary_reply=True,
        errors=[SessionNotFound, Conflict, SchedulerFailed],
    ),
)
async def step_scheduler(
    session_id: SessionId, request: Request, media: Media, claim: Claim
) -> Response:
    """torch's `scheduler.step()`; refused where each update advances the scheduler by itself."""
    session = session_of(request, session_id)
    incoming = await read_request(request, claim, "scheduler/step", needs=None)
    body = AdvanceBody.parse(incoming.fields)
    change = AdvanceScheduler(metrics=body.metrics)
    reply = session.change(change, incoming.identity, abandon=body.abandon)
    return await encode_reply(media, await done(reply))


@routes.get(
    "/v1/sessions/{session_id}/scheduler/preview",
    **operation(
        "Look ahead without touching state",
        reply="Preview",
        errors=[SessionNotFound, Conflict, SchedulerFailed],
    ),
)
async def preview_scheduler(
    session_id: SessionId,
    request: Request,
    media: JsonMedia,
    steps: Annotated[int, Query(ge=1, le=10_000, description="Rows to compute.")] = 100,
    metrics: Annotated[
        list[float] | None,
        Query(description="For ReduceLROnPlateau, one per step; the last one holds."),
    ] = None,
) -> Response:
    """Row `i` is what the `i`-th update from now uses, if the scheduler advances after each one."""
    outlook = await done(session_of(request, session_id).run(describe.Outlook.of))
    return json_response(await asyncio.to_thread(outlook.ahead, steps, metrics))


class PreviewBody(Fields):
    """An optimizer, a scheduler, and how far to look."""

    optimizer: dict[str, Any] | str
    #: Differences of each group from the optimizer's hyperparameters; one group if left out.
    groups: list[dict[str, Any]] | None = None
    scheduler: dict[str, Any] | list[Any]
    steps: int = 100
    #: For ReduceLROnPlateau, one per step; the last one holds.
    metrics: list[float] | None = None


@routes.post(
    "/v1/schedulers/preview",
    **operation(
        "Look at a schedule without a session",
        body="PreviewBody",
        reply="Preview",
        errors=[SchedulerFailed, TorchRefused],
    ),
)
async def preview_schedule(request: Request, media: JsonMedia) -> Response:
    """The curves of any optimizer's learning rate, and of its momentum or betas where they move."""
    incoming = await read_request(request, Identity(), "schedulers/preview")
    body = PreviewBody.parse(incoming.fields)
    rows = await asyncio.to_thread(
        preview, body.scheduler, hyperparameters(body), body.steps, metrics=body.metrics
    )
    return json_response({"steps": rows})


def hyperparameters(body: PreviewBody) -> list[dict[str, Any]]:
    """Return each group's hyperparameters, complete."""
    entry, given = catalogue.parse(body.optimizer)
    defaults = {key: one.default for key, one in entry.hyperparameters.items() if not one.required}
    hyper = {**defaults, **entry.fixed, **given}
    overrides = [{}] if body.groups is None else body.groups
    return [
        {**hyper, **entry.normalise_group(group, f"groups[{i}]")}
        for i, group in enumerate(overrides)
    ]
