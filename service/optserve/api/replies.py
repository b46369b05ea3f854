"""Answers as bytes: JSON that loses no value, binary without a copy."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from optserve.api import coded
from optserve.api.connection import EXTENSION, REPLY
from optserve.api.streams import Part, pieces, size_of
from optserve.api.waiting import OFF_LOOP_BYTES, off_loop
from optserve.sessions.published import Published
from optserve.sessions.reply import Reply
from optserve_client import wire
from optserve_client.wire import META_KEY, SAFETENSORS

_STRICT = json.JSONEncoder(allow_nan=False)

JSON = "application/json"
PROBLEM = "application/problem+json"
Encoding = Literal["list", "base64"]
#: Of an array whose numbers become text at once.
LISTED_BYTES = 2**18
_DUMP = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS
#: A document ends its line, so that a shell's prompt begins the next one.
_DOCUMENT = _DUMP | orjson.OPT_APPEND_NEWLINE


# --- JSON ----------------------------------------------------------------------------------------


def finite(value: Any) -> Any:
    """Return ``value`` with NaN and infinities as strings, which orjson would write as null."""
    try:  # as a rule there are none, which the standard library finds out much sooner
        _STRICT.encode(value)
    except (TypeError, ValueError):
        return _spelled(value)
    return value


def _spelled(value: Any) -> Any:
    if isinstance(value, float | np.floating):
        if math.isfinite(value):
            return value
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: _spelled(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_spelled(v) for v in value]
    return value


def dump(value: Any) -> bytes:
    """Return the JSON text of ``value``, whose arrays are finite."""
    return orjson.dumps(value, option=_DUMP)


def json_response(
    value: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Answer a JSON document without tensors."""
    return PartsResponse([orjson.dumps(finite(value), option=_DOCUMENT)], status, headers, JSON)


def json_tensors(params: Published, encoding: Encoding, dtype: str | None) -> dict[str, Any]:
    """Return the tensors by name in a form that :func:`dump` writes without loss."""
    tensors = converted(params, dtype)
    if encoding == "base64":
        return {name: wire.tensor_to_json(t, "base64") for name, t in tensors.items()}
    known = _all_finite(params) and dtype in (None, params.layout.dtype)
    return {name: _listed(t, known) for name, t in tensors.items()}


def _all_finite(params: Published) -> bool:
    """Say whether no element is NaN or infinite, in one go where the buffer allows it."""
    if params.layout.dtype not in ("F32", "F64"):
        return False
    return bool(np.isfinite(params.data.view(wire.numpy_dtype(params.layout.dtype))).all())


def _listed(tensor: wire.Tensor, known_finite: bool) -> Any:
    array = tensor.to_float32() if isinstance(tensor, wire.Bits) else tensor
    if not known_finite and not np.isfinite(array).all():
        return wire.tensor_to_json(tensor, "list")
    return array if array.ndim else array[()]  # orjson writes scalars, but no 0-d arrays


def converted(params: Published, dtype: str | None) -> dict[str, wire.Tensor]:
    """Return the tensors in ``dtype`` (a wire tag), rounded if it is narrower."""
    tensors = params.arrays()
    if dtype is None or dtype == params.layout.dtype:
        return tensors
    return {name: wire.narrow(tensor, dtype) for name, tensor in tensors.items()}


# --- binary --------------------------------------------------------------------------------------


class PartsResponse(Response):
    """Parts one after the other, none of them copied where the connection can do without; in a
    content coding, if the request likes one and they shrink."""

    def __init__(
        self,
        parts: Sequence[Part | bytes],
        status_code: int = 200,
        headers: Mapping[str, str] | None = None,
        media_type: str = SAFETENSORS,
    ) -> None:
        # Not Response's own constructor, which takes longer than a small reply does.
        self.parts = parts
        self.nbytes = size_of(parts)
        self.status_code = status_code
        self.background = None
        self.raw_headers = [
            *((k.encode("latin-1"), v.encode("latin-1")) for k, v in (headers or {}).items()),
            (b"content-type", media_type.encode("latin-1")),
            (b"content-length", b"%d" % self.nbytes),
        ]
        if self.nbytes >= coded.LEAST_BYTES:
            self.raw_headers.append((b"vary", coded.VARY.encode()))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        coding = coded.wanted(scope, self.nbytes)
        if coding is not None and self.nbytes <= OFF_LOOP_BYTES:
            # gzip is slow enough to be noticed sooner.
            small = await off_loop(4 * self.nbytes, coded.shrunk, coding, self.parts)
            if small is not None:
                self.raw_headers = coded.coded_headers(self.raw_headers, coding, len(small))
                self.parts = [small]
        elif coding is not None and await coded.shrinks(coding, self.parts):
            headers = coded.coded_headers(self.raw_headers, coding, None)
            await coded.stream(scope, send, self.status_code, headers, self.parts, coding)
            return
        if EXTENSION in scope.get("extensions", ()):
            silence_s = scope["app"].state.settings.reply_timeout_s
            await send(
                {
                    "type": REPLY,
                    "status": self.status_code,
                    "headers": self.raw_headers,
                    "parts": self.parts,
                    "silence_s": silence_s,
                }
            )
            return
        await send(
            {
                "type": "http.response.start",
                "status": self.status_code,
                "headers": self.raw_headers,
            }
        )
        for part in self.parts:
            for piece in [part] if isinstance(part, bytes) else pieces(part):
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def tensor_frame(
    params: Published | None, dtype: str | None, fields: Mapping[str, Any]
) -> list[Part | bytes]:
    """Return a safetensors frame: ``param/<name>`` and all ``fields`` as one strict JSON string."""
    metadata = {META_KEY: dump(fields).decode()}
    if params is None:
        return [wire.encode_header((), metadata)]
    tag = dtype or params.layout.dtype
    infos = ((name, tag, shape) for name, shape in params.layout.params)
    return [wire.encode_header(infos, metadata), params.part(tag)]


# --- the reply of a session ----------------------------------------------------------------------


async def encode_reply(media: str, reply: Reply, *, created: bool = False) -> Response:
    """Answer what a session said, with the params it brought, as ``media``.

    ``created``: the request created the session, although the reply is about something else.
    """
    fields = {**reply.scalars, "created": True} if created else reply.scalars
    status, headers = 200 if reply.pending is None else 202, {}
    if reply.refusal is not None:
        fields, status = reply.refusal.problem(), reply.refusal.status
    elif fields.get("created"):
        status, headers = 201, {"location": f"/v1/sessions/{fields['id']}"}
    dtype = wire.dtype_tag(reply.dtype) if reply.dtype else None
    encoding: Encoding = "base64" if reply.encoding == "base64" else "list"
    return await _encode(media, fields, reply.params, encoding, dtype, status, headers)


async def encode_params(
    media: str, session_id: str, params: Published, encoding: Encoding, dtype: str, etag: str
) -> Response:
    """Answer a pull; ``dtype`` is a wire tag."""
    fields = {
        "id": session_id,
        "generation": params.generation,
        "version": params.version,
        "weights": params.weights,
    }
    return await _encode(media, fields, params, encoding, dtype, 200, {"etag": etag})


async def _encode(
    media: str,
    fields: Mapping[str, Any],
    params: Published | None,
    encoding: Encoding,
    dtype: str | None,
    status: int,
    headers: Mapping[str, str],
) -> Response:
    if media == SAFETENSORS:
        return PartsResponse(tensor_frame(params, dtype, fields), status, headers)
    nbytes = params.layout.nbytes if params else 0
    parts = await off_loop(nbytes, _json_parts, fields, params, encoding, dtype)
    return PartsResponse(parts, status, headers, JSON if status < 400 else PROBLEM)


def _json_parts(
    fields: Mapping[str, Any], params: Published | None, encoding: Encoding, dtype: str | None
) -> list[bytes]:
    if params is None:
        return [orjson.dumps(fields, option=_DOCUMENT)]
    tensors = json_tensors(params, encoding, dtype)
    if params.layout.nbytes <= LISTED_BYTES:
        return [orjson.dumps({**fields, "params": tensors}, option=_DOCUMENT)]
    parts, before = [dump({**fields, "params": {}})[:-2]], b""
    for name, tensor in tensors.items():
        parts.append(b"%b%b:" % (before, dump(name)))
        parts += _listed_parts(tensor)
        before = b","
    return [*parts, b"}}\n"]


def _listed_parts(tensor: Any) -> Iterator[bytes]:
    """Yield the JSON text of ``tensor`` a piece at a time: no other thread runs during one."""
    if not isinstance(tensor, np.ndarray) or tensor.nbytes <= LISTED_BYTES:
        yield dump(tensor)
        return
    rows = max(1, LISTED_BYTES * len(tensor) // tensor.nbytes)
    for at in range(0, len(tensor), rows):
        text = dump(tensor[at : at + rows])
        yield b"%b%b" % (b"," if at else b"[", text[1:-1])
    yield b"]"
