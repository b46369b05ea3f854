"""Answers in a content coding, if the request likes one and they become so much smaller."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence

from starlette.requests import ClientDisconnect
from starlette.types import Scope, Send

from optserve.api.bodies import headers_in
from optserve.api.codings import Coding, answer_coding, encoding
from optserve.api.connection import EXTENSION, HEADERS_ONLY, Exchange
from optserve.api.negotiation import coded_etag
from optserve.api.streams import READ_BYTES, Part, pieces, size_of
from optserve.api.waiting import OFF_LOOP_BYTES
from optserve_client.wire import BytesLike

#: Smaller answers are sent as they are.
LEAST_BYTES = 2**13
#: To what an answer must shrink. Tensors hardly do, and gzip is slower than most networks; but many
#: programs ask for it without knowing.
WORTH: dict[Coding, float] = {"gzip": 0.75, "zstd": 0.9}
#: Of a large answer, what is compressed to see how it shrinks: so many pieces of so many bytes.
_SAMPLES, _SAMPLE_BYTES = 3, 2**14

#: What of a request decides on the form of an answer.
VARY = "accept, accept-encoding"
Headers = Sequence[tuple[bytes, bytes]]


def wanted(scope: Scope, nbytes: int) -> Coding | None:
    """Return the coding that an answer of ``nbytes`` may have; None: it is to be sent as it is."""
    accepted = headers_in(scope).get("accept-encoding")
    if accepted is None or nbytes < LEAST_BYTES:
        return None
    # Who knows only HTTP/1.0 could not tell where it ends.
    return None if scope.get("http_version") == "1.0" else answer_coding(accepted)


def shrunk(coding: Coding, parts: Sequence[Part | bytes]) -> bytes | None:
    """Return a small answer in ``coding``, if that is worth it."""
    plain = b"".join(_blocks(parts))
    made = encoding(coding, len(plain))
    coded = made.compress(plain) + made.flush()
    return coded if len(coded) <= WORTH[coding] * len(plain) else None


async def shrinks(coding: Coding, parts: Sequence[Part | bytes]) -> bool:
    """Say, from a sample, whether a large answer is worth the time."""
    largest = max(parts, key=lambda part: size_of([part]))
    # From its beginning: some parts can only be read from there.
    block = memoryview(next(_blocks([largest])))
    step = max(_SAMPLE_BYTES, len(block) // _SAMPLES)
    sample = b"".join(block[at : at + _SAMPLE_BYTES] for at in range(0, len(block), step))
    return await asyncio.to_thread(shrunk, coding, [sample]) is not None


def coded_headers(
    headers: Headers, coding: Coding, nbytes: int | None
) -> list[tuple[bytes, bytes]]:
    """Return ``headers`` of the answer in ``coding``, whose length may not be known."""
    made = []
    for name, value in headers:
        if name == b"etag":  # it is strong, of these bytes alone
            value = coded_etag(value.decode(), coding).encode()
        if name != b"content-length":
            made.append((name, value))
    length = [] if nbytes is None else [(b"content-length", b"%d" % nbytes)]
    return [*made, *length, (b"content-encoding", coding.encode())]


async def stream(
    scope: Scope,
    send: Send,
    status: int,
    headers: Headers,
    parts: Sequence[Part | bytes],
    coding: Coding,
) -> None:
    """Send a large answer in ``coding``, of which never more than a piece is in memory."""
    exchange: Exchange | None = scope.get("extensions", {}).get(EXTENSION)
    silence_s = scope["app"].state.settings.reply_timeout_s
    await send({"type": "http.response.start", "status": status, "headers": headers})
    if not scope.get(HEADERS_ONLY):
        async for piece in _compressed(coding, parts):
            if exchange is not None and exchange.gone:
                raise ClientDisconnect
            try:
                async with asyncio.timeout(silence_s):
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
            except TimeoutError as exc:
                if exchange is not None:
                    exchange.give_up(repr(exc))
                raise ClientDisconnect from exc
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _compressed(coding: Coding, parts: Sequence[Part | bytes]) -> AsyncIterator[bytes]:
    made = encoding(coding, size_of(parts))
    batch: list[BytesLike] = []
    size = 0
    for block in _blocks(parts):
        batch.append(block)
        size += len(block)
        if size >= READ_BYTES:
            if piece := await asyncio.to_thread(b"".join, map(made.compress, batch)):
                yield piece
            batch, size = [], 0
    rest = b"".join(map(made.compress, batch)) if size <= OFF_LOOP_BYTES else None
    if rest is None:
        rest = await asyncio.to_thread(b"".join, map(made.compress, batch))
    yield rest + made.flush()


def _blocks(parts: Sequence[Part | bytes]) -> Iterator[BytesLike]:
    """Yield all bytes of ``parts``, at most a piece at a time."""
    for part in parts:
        if isinstance(part, bytes):
            for at in range(0, len(part), READ_BYTES):
                yield memoryview(part)[at : at + READ_BYTES]
        else:
            yield from pieces(part)
