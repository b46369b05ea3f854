"""Content codings of a client that was asked for one: large bodies go out, and come in, compressed.

A transport around another: whatever the request is repeated for, its bytes are the same.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Protocol

from optserve_client import errors
from optserve_client._messages import CHUNK_BYTES, Answer, Request
from optserve_client._transport import AsyncTransport, Transport
from optserve_client.wire import BytesLike

#: Smaller bodies are sent as they are.
LEAST_BYTES = 2**14
#: The fastest of both: what is left to gain costs more time than it saves.
_LEVEL = 1
#: zlib's number for a gzip header and trailer.
_GZIP = 31


class _Compressor(Protocol):
    def compress(self, data: BytesLike, /) -> bytes: ...
    def flush(self) -> bytes: ...


class Coding:
    """gzip or zstd: what is sent in it, and what came in it."""

    def __init__(self, name: str) -> None:
        """Raises ModuleNotFoundError, with the cure, where zstd is not installed."""
        self.name = name
        self._compressor: Callable[[], _Compressor]
        #: zlib's or zstd's decompressor, of one stream of several.
        self._member: Callable[[], Any]
        if name == "gzip":
            self._compressor = lambda: zlib.compressobj(_LEVEL, wbits=_GZIP)
            self._member = lambda: zlib.decompressobj(_GZIP)
            self._failure: type[Exception] = zlib.error
        elif name == "zstd":
            from optserve_client._zstd import zstd

            checked = {
                int(zstd.CompressionParameter.compression_level): _LEVEL,
                int(zstd.CompressionParameter.checksum_flag): 1,
            }
            self._compressor = lambda: zstd.ZstdCompressor(options=checked)
            self._member = zstd.ZstdDecompressor
            self._failure = zstd.ZstdError
        else:
            raise errors.Invalid(f"encoding must be 'gzip', 'zstd' or None, got {name!r:.80}")

    def coded(self, request: Request) -> Request:
        """Return ``request`` with a large body compressed, unless that makes it no smaller."""
        length = request.length
        if length < LEAST_BYTES:
            return request
        compressor = self._compressor()
        pieces = [piece for chunk in request.chunks() if (piece := compressor.compress(chunk))]
        pieces.append(compressor.flush())
        size = sum(map(len, pieces))
        if size >= length:
            return request
        said = {"Content-Encoding": self.name, "Content-Length": str(size)}
        return replace(request, pieces=tuple(pieces), headers={**request.headers, **said})

    def applies(self, answer: Answer) -> bool:
        """Say whether ``answer`` is compressed."""
        return answer.headers.get("content-encoding") == self.name

    def plain(self, answer: Answer) -> Answer:
        """Return ``answer`` as it was before the server compressed it."""
        if not self.applies(answer):
            return answer
        whole = bytearray()
        try:
            for piece in self._pieces(answer.body):
                whole += piece
        except (self._failure, EOFError) as exc:
            raise errors.TransportError(f"the answer is no {self.name} stream: {exc}") from exc
        return replace(answer, body=memoryview(whole))

    def _pieces(self, body: memoryview) -> Iterator[bytes]:
        left: BytesLike = body
        while left:
            member = self._member()
            for at in range(0, len(left), CHUNK_BYTES):
                yield member.decompress(left[at : at + CHUNK_BYTES])
                if member.eof:
                    left = b"".join((member.unused_data, left[at + CHUNK_BYTES :]))
                    break
            else:
                raise EOFError("it ends too soon")


class Coded:
    """A transport whose large bodies are compressed, both ways."""

    def __init__(self, inner: Transport, coding: Coding) -> None:
        self._inner = inner
        self._coding = coding

    def send(self, request: Request) -> Answer:
        return self._coding.plain(self._inner.send(self._coding.coded(request)))

    def close(self) -> None:
        self._inner.close()


class AwaitedCoded:
    """The same for an event loop, which it does not keep waiting."""

    def __init__(self, inner: AsyncTransport, coding: Coding) -> None:
        self._inner = inner
        self._coding = coding

    async def send(self, request: Request) -> Answer:
        if request.length >= LEAST_BYTES:
            request = await asyncio.to_thread(self._coding.coded, request)
        answer = await self._inner.send(request)
        if len(answer.body) < LEAST_BYTES or not self._coding.applies(answer):
            return self._coding.plain(answer)
        return await asyncio.to_thread(self._coding.plain, answer)

    async def close(self) -> None:
        await self._inner.close()
