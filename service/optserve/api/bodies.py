"""Request bodies off the wire: media type, limits, deadlines. What bytes mean is decode.py's."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Literal

import numpy as np
from starlette.requests import ClientDisconnect, Request
from starlette.types import Scope

from optserve.api.codings import Decoding, request_coding
from optserve.api.connection import EXTENSION, Exchange
from optserve.api.streams import READ_BYTES, Pace, Sink, tell_loop
from optserve.api.waiting import OFF_LOOP_BYTES
from optserve.settings import Settings
from optserve_client.errors import Malformed, TooLarge, UnsupportedMediaType
from optserve_client.wire import SAFETENSORS, BytesLike

JSON = "application/json"
Kind = Literal["json", "safetensors"]

#: What is decompressed on the event loop, of a chunk.
AT_ONCE_BYTES = 2**18
#: By which a compressed body may be larger than what is in it, beside an eighth.
SLACK_BYTES = 2**16
#: What is left of a body must be more than this for the connection to be lent to it.
LENT_BYTES = 64 * 1024

_KINDS: dict[str, Kind] = {JSON: "json", SAFETENSORS: "safetensors"}


def settings_of(request: Request) -> Settings:
    settings: Settings = request.app.state.settings
    return settings


def headers_of(request: Request) -> dict[str, str]:
    """Return the headers by name, in lower case; of those that are repeated, the first."""
    return headers_in(request.scope)


def headers_in(scope: Scope) -> dict[str, str]:
    """Return what :func:`headers_of` does, of a request's scope."""
    found: dict[str, str] | None = scope.get("optserve.headers")
    if found is None:
        found = {}
        for name, value in scope["headers"]:
            found.setdefault(name.decode("latin-1"), value.decode("latin-1"))
        scope["optserve.headers"] = found
    return found


def content_length(request: Request) -> int | None:
    """Return the announced length of the body: 0 if there is none, None if it comes in chunks."""
    headers = headers_of(request)
    if "transfer-encoding" in headers:
        return None
    announced = headers.get("content-length", "0")
    if not (announced.isascii() and announced.isdigit()):
        raise Malformed(f"Content-Length must be a number, got {announced[:40]!r}")
    return int(announced)


def body_kind(
    request: Request, accepted: tuple[Kind, ...] = ("json", "safetensors")
) -> Kind | None:
    """Return which of ``accepted`` the body is, by its Content-Type; None if there is no body."""
    headers = headers_of(request)
    request_coding(headers.get("content-encoding"))
    if content_length(request) == 0:
        return None
    types = " or ".join(media for media, kind in _KINDS.items() if kind in accepted)
    given = headers.get("content-type")
    if given is None:
        raise UnsupportedMediaType(f"Content-Type is missing; it must be {types}")
    media, _, parameters = given.partition(";")
    kind = _KINDS.get(media.strip().lower())
    if kind is None or kind not in accepted:
        raise UnsupportedMediaType(f"Content-Type must be {types}, got {given[:80]!r}")
    if kind == "json":
        _check_charset(parameters)
    return kind


def _check_charset(parameters: str) -> None:
    for parameter in parameters.split(";"):
        name, _, value = parameter.partition("=")
        charset = value.strip().strip('"').lower()
        if name.strip().lower() == "charset" and charset not in ("utf-8", "utf8"):
            raise UnsupportedMediaType(f"charset must be utf-8, got {value.strip()[:40]!r}")


class Body:
    """The bytes of one request body, decompressed, under a limit and under deadlines."""

    def __init__(self, request: Request, limit_bytes: int) -> None:
        self._request = request
        coding = request_coding(headers_of(request).get("content-encoding"))
        self._decoding = None if coding is None else Decoding(coding, limit_bytes)
        # What does not shrink grows a little; but a stream of empty blocks must end somewhere.
        self._limit = limit_bytes if coding is None else limit_bytes * 9 // 8 + SLACK_BYTES
        #: As announced; None for a chunked body.
        self.length = content_length(request)
        if self.length is not None and self.length > self._limit:
            what = "the body" if coding is None else "the compressed body"
            raise TooLarge(
                f"{what} has {self.length} bytes, the limit is {self._limit}",
                length=self.length,
                limit=self._limit,
            )
        settings = settings_of(request)
        self._pace = Pace(settings.body_timeout_s, settings.body_min_rate_bytes_s)
        self._connection: Exchange | None = request.scope.get("extensions", {}).get(EXTENSION)
        self._received, self._waited_s = 0, 0.0
        self._ended = False

    async def chunks(self) -> AsyncIterator[bytes | bytearray]:
        """Yield the body as it arrives; raise what it deserves when it is too long or too slow."""
        while (chunk := await self._more()) is not None:
            if not chunk:
                continue
            if self._decoding is None:
                yield chunk
                continue
            async for piece in _decoded(self._decoding, chunk):
                yield piece
        if self._decoding is not None:
            self._decoding.finish()

    async def into(self, sink: Sink) -> None:
        """Have the body written into ``sink``, without a copy where the connection can do that."""
        if self._decoding is not None:
            async for piece in self.chunks():
                sink.feed(piece)
                await _caught_up(sink)
            return
        while (chunk := await self._more()) is not None:
            sink.feed(chunk)
            await _caught_up(sink)
            if self.length is None or self._connection is None:
                continue
            if self.length - self._received > LENT_BYTES and sink.room() is not None:
                self._ended = True
                await self._connection.read_into(sink, self.length, self._received, self._pace)

    async def _more(self) -> bytes | bytearray | None:
        """Return the next bytes; None at the end."""
        if self._ended:
            return None
        if self._connection is not None and (whole := self._connection.whole()) is not None:
            self._ended = True
            return self._counted(whole)
        begun = time.monotonic()
        try:
            async with asyncio.timeout(self._pace.silence_s):
                message = await self._request.receive()
        except TimeoutError:
            raise self._pace.silent(self._received, self.length) from None
        self._waited_s += time.monotonic() - begun
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        self._ended = not message.get("more_body", False)
        chunk = self._counted(message.get("body", b""))
        if not self._ended:
            self._pace.check(self._received, self._waited_s)
        return chunk

    def _counted(self, chunk: bytes | bytearray) -> bytes | bytearray:
        self._received += len(chunk)
        if self._received > self._limit:
            what = "the body" if self._decoding is None else "the compressed body"
            raise TooLarge(
                f"{what} has more than {self._limit} bytes, which is the limit",
                limit=self._limit,
            )
        return chunk

    async def read(self) -> BytesLike:
        """Return the whole body.

        Memory is set aside for what arrives: an announced length costs its sender nothing.
        """
        if self.length is None or self._decoding is not None:
            growing = Growing()
            await self.into(growing)
            return growing.whole
        sink = Announced(self.length)
        await self.into(sink)
        if sink.nbytes != self.length:
            beyond = sink.nbytes > self.length
            how = "goes on after the announced" if beyond else f"ends after {sink.nbytes} of"
            raise Malformed(f"the body {how} {self.length} bytes")
        return sink.whole


async def _caught_up(sink: Sink) -> None:
    """Wait until the sink may have more."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    while sink.behind(lambda: tell_loop(loop, ready.set)):
        await ready.wait()
        ready.clear()


async def _decoded(decoding: Decoding, chunk: bytes | bytearray) -> AsyncIterator[bytes]:
    """Yield what ``chunk`` brings: a small beginning of it at once, the rest from a thread."""
    decoding.give(chunk)
    if len(chunk) <= OFF_LOOP_BYTES and (piece := decoding.step(AT_ONCE_BYTES)):
        yield piece
    while not decoding.idle:
        if piece := await asyncio.to_thread(decoding.take, READ_BYTES):
            yield piece


class Announced:
    """A sink of ``length`` bytes in one block, of which only those that arrive take up memory."""

    def __init__(self, length: int) -> None:
        self._length = length
        #: What has arrived, at the end.
        self.whole: BytesLike = b""
        self._block: memoryview | None = None
        self.nbytes = 0

    def feed(self, chunk: BytesLike) -> None:
        begin, self.nbytes = self.nbytes, self.nbytes + len(chunk)
        if len(chunk) == self._length:
            self.whole = chunk
        elif chunk and self.nbytes <= self._length:
            self._made()[begin : self.nbytes] = chunk

    def room(self) -> memoryview:
        return self._made()[self.nbytes :]

    def filled(self, nbytes: int) -> None:
        self.nbytes += nbytes

    def behind(self, tell: Callable[[], object]) -> bool:
        return False

    def _made(self) -> memoryview:
        if self._block is None:
            # Neither zeroed nor touched, and in large pages, which are soon there.
            self.whole = self._block = np.empty(self._length, np.uint8).data
        return self._block


class Growing:
    """A sink of any length."""

    def __init__(self) -> None:
        #: What has arrived.
        self.whole = bytearray()

    def feed(self, chunk: BytesLike) -> None:
        self.whole += chunk

    def room(self) -> None:
        """There is none set aside."""

    def filled(self, nbytes: int) -> None:
        raise AssertionError("there was no room")

    def behind(self, tell: Callable[[], object]) -> bool:
        return False
