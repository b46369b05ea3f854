"""Requests and answers of both clients over httpx: bodies in pieces, failures in our words."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np

from optserve_client import errors
from optserve_client._messages import CHUNK_BYTES, Answer, Request


def options(url: str, timeout: float, headers: Mapping[str, str] | None) -> dict[str, Any]:
    """Return what both httpx clients are made with."""
    if urlsplit(url).scheme not in {"http", "https"}:
        raise errors.Invalid(f"url must begin with http:// or https://, got {url!r}")
    # Nothing is compressed: tensors hardly shrink, and a known length is read into one buffer.
    default = {"Accept-Encoding": "identity", "User-Agent": "optserve-client"}
    return {
        "base_url": url,
        "timeout": timeout,
        "headers": default | dict(headers or {}),
        "limits": httpx.Limits(max_connections=None, max_keepalive_connections=100),
    }


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
def translated(request: Request) -> Iterator[None]:
    """Turn httpx's exceptions into ours, once, keeping the cause."""
    what = f"{request.method} {request.target.partition('?')[0]}"
    try:
        yield
    except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as exc:
        raise errors.ConnectFailed(f"{what}: cannot connect: {_why(exc)}") from exc
    except httpx.TimeoutException as exc:
        raise errors.Timeout(f"{what}: no complete answer in time: {_why(exc)}") from exc
    except httpx.HTTPError as exc:
        raise errors.TransportError(f"{what}: the connection failed: {_why(exc)}") from exc


def _why(exc: Exception) -> str:
    return str(exc) or type(exc).__name__
