"""Requests and answers over httpx: for https, proxies, and what the caller brings along."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import httpx
import numpy as np

from optserve_client import _faults as faults
from optserve_client import errors
from optserve_client._messages import CHUNK_BYTES, Answer, Request


class OverHttpx:
    """What ``_transport.Blocking`` does, by an ``httpx.Client`` with ``options``."""

    def __init__(self, server: str, timeout_s: float, **options: Any) -> None:
        self._http = httpx.Client(timeout=timeout_s, limits=_limits(), **options)
        self._server, self._timeout_s = server, timeout_s

    def send(self, request: Request) -> Answer:
        with (
            translated(request, self._server, self._timeout_s),
            self._http.stream(
                request.method,
                request.target,
                headers=request.headers,
                content=body_of(request),
                timeout=_timeout(request, self._timeout_s),
            ) as response,
        ):
            incoming = incoming_of(response)
            if not response.is_stream_consumed:
                for chunk in response.iter_raw():
                    incoming.take(chunk)
            return incoming.answer()

    def close(self) -> None:
        self._http.close()


class AwaitedOverHttpx:
    """What ``_transport.Awaited`` does, by an ``httpx.AsyncClient`` with ``options``."""

    def __init__(self, server: str, timeout_s: float, **options: Any) -> None:
        self._http = httpx.AsyncClient(timeout=timeout_s, limits=_limits(), **options)
        self._server, self._timeout_s = server, timeout_s

    async def send(self, request: Request) -> Answer:
        with translated(request, self._server, self._timeout_s):
            async with self._http.stream(
                request.method,
                request.target,
                headers=request.headers,
                content=async_body_of(request),
                timeout=_timeout(request, self._timeout_s),
            ) as response:
                incoming = incoming_of(response)
                if not response.is_stream_consumed:
                    async for chunk in response.aiter_raw():
                        incoming.take(chunk)
                return incoming.answer()

    async def close(self) -> None:
        await self._http.aclose()


def _limits() -> httpx.Limits:
    return httpx.Limits(max_connections=None, max_keepalive_connections=100)


def _timeout(request: Request, timeout_s: float) -> httpx.Timeout:
    return httpx.Timeout(timeout_s, read=timeout_s + request.wait_s)


def body_of(request: Request) -> Any:
    """Return the body for httpx: small ones as bytes, large ones as an iterator of pieces."""
    if not request.pieces:
        return None
    return b"".join(request.pieces) if request.length <= CHUNK_BYTES else request.chunks()


def async_body_of(request: Request) -> Any:
    """Return the body for httpx's asynchronous client."""
    body = body_of(request)
    return body if body is None or isinstance(body, bytes) else _each(body)


async def _each(chunks: Iterator[bytes | memoryview]) -> AsyncIterator[bytes | memoryview]:
    for chunk in chunks:
        yield chunk


class Incoming:
    """An answer whose body arrives in pieces, into one buffer if its length was announced."""

    def __init__(self, status: int, headers: Mapping[str, str]) -> None:
        self._status, self._headers = status, headers
        length = headers.get("content-length", "")
        self._whole = np.empty(int(length), np.uint8) if length.isdigit() else None
        self._parts: list[bytes] = []
        self._received = 0

    def take(self, chunk: bytes) -> None:
        end = self._received + len(chunk)
        if self._whole is None:
            self._parts.append(chunk)
        else:
            self._whole[self._received : end] = np.frombuffer(chunk, np.uint8)
        self._received = end

    def answer(self) -> Answer:
        if self._whole is None:
            body = memoryview(bytearray(b"".join(self._parts)))
        else:
            body = self._whole[: self._received].data
        return Answer(status=self._status, headers=self._headers, body=body)


def incoming_of(response: httpx.Response) -> Incoming:
    """Return the answer that ``response`` begins; it is whole if a transport has read it all."""
    incoming = Incoming(response.status_code, dict(response.headers))
    if response.is_stream_consumed:
        incoming.take(response.content)
    return incoming


@contextmanager
def translated(request: Request, server: str, timeout_s: float) -> Iterator[None]:
    """Turn httpx's exceptions into ours, once, keeping the cause."""
    try:
        yield
    except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as exc:
        raise errors.ConnectFailed(faults.not_connected(request, server, exc)) from exc
    except httpx.TimeoutException as exc:
        raise errors.Timeout(faults.late(request, server, timeout_s, exc)) from exc
    except httpx.HTTPError as exc:
        raise errors.TransportError(faults.broken(request, server, exc)) from exc
