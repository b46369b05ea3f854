"""The step: by far the most frequent request, under three addresses."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import Response

from optserve.api.bodies import Body, body_kind, settings_of
from optserve.api.decode import digest_of, header_key
from optserve.api.long_lists import loads_tensors
from optserve.api.one_call import first_use
from optserve.api.openapi import BINARY, KEY_PARAMETER, operation
from optserve.api.replies import encode_reply
from optserve.api.routing import Direct, SessionId, any_media, router, session_of
from optserve.api.waiting import done, loaded, off_loop
from optserve.sessions.ledger import Identity
from optserve.sessions.reply import Reply
from optserve.sessions.session import Session
from optserve.sessions.step import Step
from optserve_client.errors import (
    Conflict,
    Fenced,
    KeyReused,
    LineSearchOpen,
    Malformed,
    MissingGradient,
    Nonfinite,
    OutOfSequence,
    SchedulerFailed,
    SessionExists,
    SessionNotFound,
    SessionRewound,
    TorchRefused,
    VersionConflict,
)
from optserve_client.wire import BytesLike

routes = router("step", Direct)

ERRORS = [
    SessionNotFound,
    Conflict,
    Fenced,
    KeyReused,
    LineSearchOpen,
    MissingGradient,
    Nonfinite,
    OutOfSequence,
    SchedulerFailed,
    SessionRewound,
    TorchRefused,
    VersionConflict,
]


@routes.post(
    "/v1/sessions/{session_id}/step",
    **operation(
        "Apply gradients and get the updated parameters",
        body="StepBody",
        binary=BINARY,
        reply="StepReply",
        binary_reply=True,
        parameters=[KEY_PARAMETER],
        errors=ERRORS,
    ),
)
async def post_step(session_id: SessionId, request: Request) -> Response:
    """One request is one gradient. It is answered when the change is as durable as the session
    promises."""
    media, key, session = any_media(request), header_key(request), session_of(request, session_id)
    step = await decode_step(request, session)
    return await encode_reply(media, await stepped(session, step, key))


_ANY_STEP = operation(
    "Step the session that the body names, and create it if need be",
    body="OneCallBody",
    binary=BINARY,
    reply="StepReply",
    binary_reply=True,
    also={201: "StepReply"},
    parameters=[KEY_PARAMETER],
    errors=[*ERRORS, SessionExists],
)


@routes.post("/v1/step", **_ANY_STEP)
@routes.post("/step", name="post_any_step_short", **_ANY_STEP)
async def post_any_step(request: Request) -> Response:
    """Like `/v1/sessions/{id}/step` with `id` in the body (in the metadata of a binary one). With
    `optimizer` in it, the session is created on first use from the create fields and `params` of
    the same body; later calls with the same create fields only step."""
    media, key = any_media(request), header_key(request)
    async with first_use(request) as call:
        reply = await stepped(call.session, call.step, key)
    return await encode_reply(media, reply, created=call.created)


async def stepped(session: Session, step: Step, key: str | None) -> Reply:
    """Take the step: a small one at once, all others on a thread that computes."""
    back = asyncio.get_running_loop().call_soon_threadsafe
    return await done(session.step(step, identity_of(step, key), back))


async def decode_step(request: Request, session: Session) -> Step:
    """Return the step in the body: JSON at once, binary as it arrives."""
    kind, settings = body_kind(request), settings_of(request)
    if kind is None:
        raise Malformed("the body is empty, expected a step")
    await loaded(session)
    if kind == "json":
        raw = await Body(request, settings.max_json_bytes).read()
        return await off_loop(len(raw), step_from_text, request, session, raw)
    body = Body(request, settings.max_body_bytes)
    intake = session.intake(settings.max_body_bytes)
    try:
        await body.into(intake)
    except BaseException:
        intake.abort()
        raise
    return await off_loop(0 if intake.prompt else intake.frame_bytes or 0, intake.finish)


def step_from_text(request: Request, session: Session, raw: BytesLike) -> Step:
    body = loads_tensors(raw, "grads", "params")
    return session.step_from_json(body, digest_of(request, "step", raw))


def identity_of(step: Step, key: str | None) -> Identity:
    """Return who sent ``step``: its fields say so, or the Idempotency-Key header."""
    fields = step.fields
    return Identity(
        worker=fields.worker, epoch=fields.epoch, seq=fields.seq, key=key, digest=step.digest
    )
