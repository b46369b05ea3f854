"""A step that names its session in the body, and may bring what it takes to create it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import orjson
import xxhash
from starlette.requests import Request

from optserve.api.bodies import Body, body_kind, settings_of
from optserve.api.decode import (
    digest_of,
    frame_fields,
    list_dtype,
    params_of_frame,
    tensors_from_json,
)
from optserve.api.long_lists import loads_tensors
from optserve.api.routing import TENANT, registry_of
from optserve.api.waiting import done, loaded, off_loop
from optserve.sessions import config as configs
from optserve.sessions.fields import StepFields
from optserve.sessions.identity import Identity
from optserve.sessions.registry import Registry
from optserve.sessions.session import Session
from optserve.sessions.step import Step
from optserve_client import wire
from optserve_client.errors import Invalid, Malformed, RequestError, SessionNotFound
from optserve_client.wire import META_KEY, Tensor

Chunks: TypeAlias = AsyncIterator[bytes | bytearray]

_CREATE_FIELDS = frozenset(configs.CreateFields.model_fields)


@dataclass(frozen=True, kw_only=True, slots=True)
class FirstUse:
    """A step, its session, and whether the same request created that."""

    session: Session
    step: Step
    created: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class _Call:
    """The fields of a body, told apart."""

    session_id: str
    #: None: the body does not say how to create a session. With it, ``groups`` is create's.
    create: dict[str, Any] | None
    step: dict[str, Any]

    @classmethod
    def of(cls, body: dict[str, Any]) -> _Call:
        session_id = body.pop("id", None)
        if session_id is None:
            raise Invalid(
                "id is missing: this address takes the session's id in the body", field="id"
            )
        if not isinstance(session_id, str):
            raise Invalid(f"id must be a string, got {session_id!r:.80}", field="id")
        if "optimizer" not in body:
            return cls(session_id=session_id, create=None, step=body)
        create = {key: body.pop(key) for key in list(body) if key in _CREATE_FIELDS}
        return cls(session_id=session_id, create=create, step=body)

    async def find(self, registry: Registry) -> Session | None:
        """Return the session if it is there and is what the create fields say."""
        try:
            session = registry.get(TENANT, self.session_id)
        except SessionNotFound as exc:
            if self.create is None:
                raise SessionNotFound(
                    f"{exc.detail}; with optimizer and params it is created"
                ) from exc
            return None
        try:
            await loaded(session)
        except SessionNotFound:  # deleted just now
            return await self.find(registry)
        session.shared = True
        if self.create is not None:
            registry.check_same(session, self.create)
        return session

    async def make(
        self, registry: Registry, params: dict[str, Tensor], order: list[str], made: list[Session]
    ) -> Session:
        """Create the session, unless somebody else just did; ``order`` if the fields have none.

        A session that this creates is appended to ``made``.
        """
        assert self.create is not None
        tensors = ("grads", "deltas", "params")
        rest = {key: value for key, value in self.step.items() if key not in tensors}
        StepFields.parse(rest)  # what is wrong with the step should not leave a session behind
        named = None if "order" in self.create else order
        future = registry.create(
            TENANT, self.session_id, self.create, params, named, Identity(), exist_ok=True
        )
        created = (await done(future)).scalars["created"]
        session = registry.get(TENANT, self.session_id)
        if created:
            made.append(session)
        return session


@asynccontextmanager
async def first_use(request: Request) -> AsyncIterator[FirstUse]:
    """Yield the step in the body; its session exists by then, but goes if the step is refused."""
    kind = body_kind(request)
    if kind is None:
        raise Malformed("the body is empty, expected a step")
    made: list[Session] = []
    try:
        yield await (_from_json if kind == "json" else _from_frame)(request, made)
    except RequestError:
        for session in made:
            await done(registry_of(request).withdraw(session))
        raise


async def _from_json(request: Request, made: list[Session]) -> FirstUse:
    raw = await Body(request, settings_of(request).max_json_bytes).read()
    body = await off_loop(len(raw), loads_tensors, raw, "grads", "deltas", "params")
    digest = await off_loop(len(raw), digest_of, request, "step", raw)
    call, registry = _Call.of(body), registry_of(request)
    session = await call.find(registry)
    if session is None:
        given, create = call.step.get("params"), call.create or {}
        tag = list_dtype(create)
        params = await off_loop(len(raw), tensors_from_json, given or {}, "params", tag, None)
        session = await call.make(registry, params, list(params), made)
    if made:
        del call.step["params"]
    step = await off_loop(len(raw), session.step_from_json, call.step, digest)
    return FirstUse(session=session, step=step, created=bool(made))


async def _from_frame(request: Request, made: list[Session]) -> FirstUse:
    limit = settings_of(request).max_body_bytes
    hasher = xxhash.xxh3_128(b"POST step\n")
    chunks = _hashed(Body(request, limit).chunks(), hasher)
    header, begun = await _read_header(chunks)
    call, registry = _Call.of(frame_fields(header.metadata)), registry_of(request)
    metadata = {META_KEY: orjson.dumps(call.step).decode()}
    session = await call.find(registry)
    feed: AsyncIterator[bytes | bytearray | memoryview]
    if session is not None:
        infos = ((info.name, info.dtype, info.shape) for info in header.tensors)
        feed = _chain([wire.encode_header(infos, metadata), begun], chunks)
    else:
        tensors = await _read_tensors(header, begun, chunks)
        params = params_of_frame({n: t for n, t in tensors.items() if n.startswith("param/")})
        session = await call.make(registry, params, sorted(params, key=str.encode), made)
        rest = {n: t for n, t in tensors.items() if not (made and n.startswith("param/"))}
        feed = _chain(wire.encode(rest, metadata), chunks)
    intake = session.intake(limit)
    try:
        async for piece in feed:
            intake.feed(piece)
    except BaseException:
        intake.abort()
        raise
    step = await off_loop(intake.frame_bytes or 0, intake.finish)
    # Of the body as it came: the first call and its repeat feed the intake differently.
    step = replace(step, digest=hasher.digest())
    return FirstUse(session=session, step=step, created=bool(made))


async def _hashed(chunks: Chunks, hasher: xxhash.xxh3_128) -> Chunks:
    async for chunk in chunks:
        hasher.update(chunk)
        yield chunk


async def _chain(
    begun: list[bytes | memoryview], chunks: Chunks
) -> AsyncIterator[bytes | bytearray | memoryview]:
    for piece in begun:
        yield piece
    async for chunk in chunks:
        yield chunk


async def _read_header(chunks: Chunks) -> tuple[wire.Header, bytes]:
    """Return the header of a frame, and what arrived with it of the tensors."""
    begun, need = bytearray(), 8
    async for chunk in chunks:
        begun += chunk
        if len(begun) >= 8:
            need = 8 + wire.header_length(begun)
        if len(begun) >= need > 8:
            return wire.parse_header(memoryview(begun)[8:need]), bytes(begun[need:])
    raise Malformed(f"the body ended after {len(begun)} bytes, inside its header")


async def _read_tensors(header: wire.Header, begun: bytes, chunks: Chunks) -> dict[str, Tensor]:
    data = bytearray(begun)
    async for chunk in chunks:
        data += chunk
        if len(data) > header.data_bytes:
            break
    if len(data) != header.data_bytes:
        raise Malformed(f"the tensors have {header.data_bytes} bytes, the body brings {len(data)}")
    view = memoryview(data)
    return {
        info.name: wire.from_bytes(info.dtype, info.shape, view[info.begin : info.end])
        for info in header.tensors
    }
