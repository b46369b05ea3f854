"""What is said when no answer comes back, in the same words whatever moves the bytes."""

from __future__ import annotations

import os

from optserve_client._messages import Request


def not_connected(request: Request, server: str, exc: BaseException) -> str:
    return f"{_what(request)}: cannot connect to {server}: {_why(exc)}"


def late(request: Request, server: str, timeout_s: float, exc: BaseException) -> str:
    limit_s = timeout_s + request.wait_s
    return f"{_what(request)}: no complete answer from {server} in time, {limit_s:g} s: {_why(exc)}"


def broken(request: Request, server: str, exc: BaseException) -> str:
    return f"{_what(request)}: the connection to {server} failed: {_why(exc)}"


def _what(request: Request) -> str:
    return f"{request.method} {request.target.partition('?')[0]}"


def _why(exc: BaseException) -> str:
    """Return the reason that the system gave, in the same words for both clients."""
    inner: BaseException | None = exc
    while inner is not None:
        if isinstance(inner, BaseExceptionGroup):  # one address each
            inner = inner.exceptions[0]
        if isinstance(inner, OSError) and inner.errno:
            return os.strerror(inner.errno) if inner.errno > 0 else str(inner.strerror)
        inner = inner.__cause__ or inner.__context__
    return str(exc) or type(exc).__name__
