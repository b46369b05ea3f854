"""Requests and answers of both clients over httpx: bodies in pieces, failures in our words."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np

from optserve_client import errors
from optserve_client._messages import CHUNK_BYTES, Answer, Request


def options(url: Any, timeout: float, headers: Mapping[str, str] | None) -> dict[str, Any]:
    """Return what both httpx clients are made with."""
    if not isinstance(url, str):
        example = "http://127.0.0.1:8000"
        raise TypeError(f"url must be a string such as {example!r}, got {url!r:.80}")
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


def place(url: str, transport: object) -> str:
    """Return where the server is, for messages: scheme, host and port, and the socket's path."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    if parts.port is None:
        host = f"{host.rstrip(':')}:{443 if parts.scheme == 'https' else 80}"
    uds = getattr(getattr(transport, "_pool", None), "_uds", None)  # httpx has no public name
    return f"{parts.scheme}://{host}" + (f" at {uds}" if uds else "")


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
    """Turn httpx's exceptions into ours, once, keeping the cause; ``server`` as of `place`."""
    what = f"{request.method} {request.target.partition('?')[0]}"
    try:
        yield
    except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as exc:
        raise errors.ConnectFailed(f"{what}: cannot connect to {server}: {_why(exc)}") from exc
    except httpx.TimeoutException as exc:
        raise errors.Timeout(
            f"{what}: no complete answer from {server} in time, {timeout_s:g} s: {_why(exc)}"
        ) from exc
    except httpx.HTTPError as exc:
        raise errors.TransportError(
            f"{what}: the connection to {server} failed: {_why(exc)}"
        ) from exc


def _why(exc: Exception) -> str:
    """Return the reason that the system gave, in the same words for both clients."""
    inner: BaseException | None = exc
    while inner is not None:
        if isinstance(inner, BaseExceptionGroup):  # one address each
            inner = inner.exceptions[0]
        if isinstance(inner, OSError) and inner.errno:
            return os.strerror(inner.errno) if inner.errno > 0 else str(inner.strerror)
        inner = inner.__cause__ or inner.__context__
    return str(exc) or type(exc).__name__
