"""The outermost ASGI layer: exceptions end here, HEAD is answered, connections stay usable."""

from __future__ import annotations

import asyncio

import structlog
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from optserve.api.connection import EXTENSION, HEADERS_ONLY, REPLY, Exchange
from optserve.api.draining import Drain
from optserve.api.problems import problem_response
from optserve.sessions.turn import forget_frames
from optserve_client.errors import Unavailable

log = structlog.get_logger(__name__)

#: A refused request whose body is at most this large is read to its end, to keep the connection.
DRAIN_BYTES = 64 * 1024
DRAIN_S = 1.0
#: How long the rest of a larger body is thrown away after the refusal was sent. Closing at once
#: would reset the connection, and a client that is still sending would never see why.
LINGER_S = 5.0
STOPPING = "the server stops before this was answered; repeat the request to learn what it did"


class Edge:
    """Run ``app``; answer what it raises; never leave half a request body on a kept connection."""

    def __init__(self, app: ASGIApp, drain: Drain | None = None) -> None:
        self.app = app
        self.drain = drain or Drain()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange = _Exchange(scope, receive, send)
        if scope["method"] == "HEAD":
            scope = {**scope, "method": "GET", HEADERS_ONLY: True}
        try:
            with self.drain.change(scope["method"]):
                await self.app(scope, exchange.receive, exchange.send)
        except ClientDisconnect:
            log.debug("client went away", path=scope["path"])
        except asyncio.CancelledError:  # the server stops and waited long enough
            if exchange.started:
                raise
            await exchange.refuse(Unavailable(STOPPING, retry_after=1))
        except Exception as exc:
            if exchange.started:
                raise  # half an answer is out: only closing the connection tells the client
            await exchange.refuse(exc)
            forget_frames(exc)


class _Exchange:
    """One request and its answer, as seen from outside the app."""

    __slots__ = ("_complete", "_connection", "_receive", "_send", "received", "scope", "started")

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope = scope
        self._receive = receive
        self._send = send
        self._connection: Exchange | None = scope.get("extensions", {}).get(EXTENSION)
        self._complete = False
        #: Whether any of the request body was handed to the app.
        self.received = False
        #: Whether the answer's status line is out.
        self.started = False

    @property
    def complete(self) -> bool:
        """Whether the whole request body was handed to the app."""
        return self._complete or (self._connection is not None and self._connection.complete)

    async def receive(self) -> Message:
        message = await self._receive()
        self.received = True
        if message["type"] != "http.request" or not message.get("more_body"):
            self._complete = True
        return message

    async def send(self, message: Message) -> None:
        if message["type"] in ("http.response.start", REPLY):
            self.started = True
            if not self.complete and self.unread_bytes() != 0:
                headers = [*message.get("headers", ()), (b"connection", b"close")]
                message = {**message, "headers": headers}
        elif self.scope["method"] == "HEAD":
            message = {**message, "body": b""}
        await self._send(message)

    async def refuse(self, exc: Exception) -> None:
        """Answer ``exc``, and read what is left of the body so that the answer arrives."""
        response = problem_response(self.scope, exc)
        unread = 0 if self.complete else self.unread_bytes()
        # Who waits for a 100 that never came may or may not send its body: close, read nothing.
        coming = unread != 0 and (self.received or not self.expects_continue())
        if coming and unread is not None and unread <= DRAIN_BYTES:
            await self.drain(DRAIN_S)
        if self.complete or not coming:
            await response(self.scope, self._receive, self.send)
            return
        await self.send(
            {
                "type": "http.response.start",
                "status": response.status_code,
                "headers": response.raw_headers,
            }
        )
        await self.send({"type": "http.response.body", "body": response.body, "more_body": True})
        await self.drain(LINGER_S)
        await self.send({"type": "http.response.body", "body": b"", "more_body": False})

    async def drain(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                while not self.complete:
                    await self.receive()
        except TimeoutError:
            log.debug("gave up reading a refused body", path=self.scope["path"])

    def unread_bytes(self) -> int | None:
        """Return the announced length of the body; None if it is chunked."""
        length: int | None = 0
        for name, value in self.scope["headers"]:
            if name == b"content-length":
                length = int(value) if value.isdigit() else None
            elif name == b"transfer-encoding":
                return None
        return length

    def expects_continue(self) -> bool:
        """Say whether the client announced to wait for a 100 before it sends its body."""
        return any(
            name == b"expect" and value.lower() == b"100-continue"
            for name, value in self.scope["headers"]
        )
