"""The connection under a request: uvicorn's HTTP protocol, which lends its socket to a large body.

Once a route has decided on the head of a request that it wants the body, and where its bytes go,
the kernel writes them straight there; a large reply is written from where it lies, a small one
in one write. All else is uvicorn's. What a route uses of this is in ``bodies.py`` and
``replies.py``, which do without it where an app runs behind something else.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import httptools
import structlog
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)
from uvicorn.protocols.utils import is_ssl

from optserve.api.streams import READ_BYTES, Pace, Part, Sink, Whole, pieces, size_of

log = structlog.get_logger(__name__)

#: Key of ``scope["extensions"]`` under which a route finds the :class:`Exchange`.
EXTENSION = "optserve.connection"
#: Type of the message that is a whole answer: ``status``, ``headers``, ``parts``, and ``silence_s``
#: in which nobody takes anything of it before it is given up.
REPLY = "optserve.reply"
#: Of a body that is thrown away.
WASTE_BYTES = 2**18
#: Answers up to this size are one write.
JOINED_BYTES = 2**16
#: So much of an answer is written before other requests have a look in.
UNBROKEN_BYTES = 8 * 2**20


class Connection(HttpToolsProtocol):
    """uvicorn's protocol, whose requests come with an :class:`Exchange`."""

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        super()._start_asgi_task(cycle, cast(Any, Exchange(self, cycle, app)))

    def body_was_read(self) -> None:
        """Expect the next request: the parser, which saw only the beginning of this body, knows
        nothing of its end."""
        self.parser = httptools.HttpRequestParser(self)
        with contextlib.suppress(AttributeError):  # as uvicorn's constructor
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self.cycle.more_body = False


class Exchange:
    """One request and its answer; the ASGI app that uvicorn runs for it."""

    __slots__ = ("_app", "_connection", "_cycle", "_lent")

    def __init__(self, connection: Connection, cycle: RequestResponseCycle, app: ASGIApp) -> None:
        self._connection = connection
        self._cycle = cycle
        self._app = app
        self._lent: _Lent | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["extensions"] = {EXTENSION: self}
        try:
            await self._app(scope, self.receive, self.send)
        finally:
            del scope["extensions"]  # which leads back to the scope: a collector would have to come

    # --- the body --------------------------------------------------------------------------------

    @property
    def complete(self) -> bool:
        """Whether the whole body has been handed to somebody."""
        return not self._cycle.more_body and not self._cycle.body

    def whole(self) -> bytearray | None:
        """Return the body if it came with the head, as small ones do."""
        cycle = self._cycle
        if cycle.more_body or cycle.disconnected:
            return None
        body, cycle.body = cycle.body, bytearray()
        return body

    async def read_into(self, sink: Sink, length: int, received: int, pace: Pace) -> None:
        """Read what is left of a body of ``length`` bytes straight into ``sink``.

        ``received`` bytes are the sink's already, and it has room. Raises what the sink raises,
        BodyTimeout, or ClientDisconnect if the connection ends first.
        """
        cycle = self._cycle
        early, cycle.body = cycle.body, bytearray()
        if early:
            sink.feed(early)
            received += len(early)
        if not cycle.more_body:
            return
        if cycle.disconnected:
            raise ClientDisconnect
        lent = self._lent = _Lent(self._connection, sink, length, received, pace)
        try:
            await lent.ended
        except BaseException:
            lent.waste()
            raise
        self._hand_back(lent)

    async def receive(self) -> Message:
        """uvicorn's; but what is left of a body that nobody wants any more is thrown away."""
        if self._lent is None:
            return cast(Message, await self._cycle.receive())
        lent = self._lent
        await asyncio.shield(lent.ended)  # whoever stops waiting may come again
        if self._cycle.disconnected:
            return {"type": "http.disconnect"}
        self._hand_back(lent)
        return {"type": "http.request", "body": b"", "more_body": False}

    def _hand_back(self, lent: _Lent) -> None:
        self._lent = None
        self._connection.body_was_read()
        lent.hand_back()

    # --- the answer ------------------------------------------------------------------------------

    async def send(self, message: Message) -> None:
        if message["type"] != REPLY:
            await self._cycle.send(cast(Any, message))
            return
        cycle = self._cycle
        if cycle.disconnected:
            return
        status, headers = message["status"], message["headers"]
        parts: Sequence[Part | bytes] = message["parts"]
        cycle.response_started, cycle.waiting_for_100_continue = True, False
        if (b"connection", b"close") in headers:
            cycle.keep_alive = False
        elif not cycle.keep_alive:
            headers = [*headers, (b"connection", b"close")]
        lines = [b"%b: %b\r\n" % header for header in (*cycle.default_headers, *headers)]
        head = b"".join([STATUS_LINE[status], *lines, b"\r\n"])
        if cycle.scope["method"] == "HEAD":
            parts = ()
        await self._write([head, *parts], message["silence_s"])
        if self._connection.transport.is_closing():
            return
        cycle.response_complete = True
        cycle.message_event.set()
        if not cycle.keep_alive:
            cycle.transport.close()
        cycle.on_response()

    async def _write(self, parts: Sequence[Part | bytes], silence_s: float) -> None:
        """Write ``parts``; the connection is closed if nobody takes them."""
        transport = self._connection.transport
        if size_of(parts) <= JOINED_BYTES:
            small = (part if isinstance(part, bytes) else b"".join(pieces(part)) for part in parts)
            transport.write(b"".join(small))
            return
        whole = [Whole(part) if isinstance(part, bytes) else part for part in parts]
        sock = transport.get_extra_info("socket")
        direct = not (sock is None or is_ssl(transport) or transport.get_write_buffer_size())
        try:
            async with asyncio.timeout(None) as deadline:
                if direct:
                    await _pour(whole, sock.fileno(), deadline, silence_s)
                else:
                    await self._write_copies(whole, deadline, silence_s)
        except (OSError, TimeoutError) as exc:
            log.debug("nobody took the answer", path=self._cycle.scope["path"], why=repr(exc))
            self._cycle.disconnected = True
            transport.abort()

    async def _write_copies(
        self, parts: Sequence[Part], deadline: asyncio.Timeout, silence_s: float
    ) -> None:
        """The same through the transport: encrypted, or behind what it still has to write."""
        loop = asyncio.get_running_loop()
        for part in parts:
            for piece in pieces(part):
                deadline.reschedule(loop.time() + silence_s)
                await self._cycle.flow.drain()
                if self._cycle.disconnected:
                    return
                self._connection.transport.write(piece)


async def _pour(
    parts: Sequence[Part], fd: int, deadline: asyncio.Timeout, silence_s: float
) -> None:
    """Write ``parts`` to a socket without a copy: each piece is the kernel's, or still ours, but
    never a transport's, which would look at it later."""
    loop = asyncio.get_running_loop()
    own = os.dup(fd)  # stays this connection's when the transport closes
    try:
        for part in parts:
            at = unbroken = 0
            while at < part.nbytes:
                try:
                    taken = part.use(at, partial(os.write, own))
                except BlockingIOError:
                    deadline.reschedule(loop.time() + silence_s)
                    await _writable(loop, own)
                    deadline.reschedule(None)
                    unbroken = 0
                    continue
                at, unbroken = at + taken, unbroken + taken
                if unbroken > UNBROKEN_BYTES:
                    await asyncio.sleep(0)
                    unbroken = 0
    finally:
        os.close(own)


async def _writable(loop: asyncio.AbstractEventLoop, fd: int) -> None:
    ready = asyncio.Event()
    loop.add_writer(fd, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_writer(fd)


class _Lent(asyncio.BufferedProtocol):
    """The connection while a body goes into a sink; from its constructor to :meth:`hand_back`."""

    def __init__(
        self, connection: Connection, sink: Sink, length: int, received: int, pace: Pace
    ) -> None:
        self._connection = connection
        self._sink: Sink | None = sink
        self._length, self._received = length, received
        self._pace = pace
        self._loop = asyncio.get_running_loop()
        #: Done when the body has ended, for better or worse.
        self.ended: asyncio.Future[None] = self._loop.create_future()
        self._begun = self._last = self._loop.time()
        self._look_again: asyncio.TimerHandle | None = None
        self._room: memoryview | None = None
        if self._find_room():
            self._take_over(self)
            self._look()

    def _take_over(self, protocol: asyncio.BaseProtocol) -> None:
        """Let ``protocol`` have what arrives."""
        flow, transport = self._connection.flow, self._connection.transport
        # How bytes are read is settled when reading starts.
        flow.pause_reading()
        transport.set_protocol(protocol)
        if not transport.is_closing():
            flow.resume_reading()

    def hand_back(self) -> None:
        self._take_over(self._connection)

    def waste(self) -> None:
        """Throw away what is left: ``ended`` is another future, of that."""
        self._sink = None
        self._stop_looking()
        self.ended = self._loop.create_future()
        if self._received == self._length or self._connection.cycle.disconnected:
            self.ended.set_result(None)
            return
        self._room = memoryview(bytearray(WASTE_BYTES))
        self._take_over(self)

    # --- what the transport calls ----------------------------------------------------------------

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._sink is not None:
            # Asked again, just before the read: the sink may have lost its place to another one.
            try:
                self._room = self._sink.room()
            except Exception:
                # It says so again when it gets the bytes; in here uvloop cannot stop reading.
                self._room = memoryview(bytearray(WASTE_BYTES))
        assert self._room is not None
        return self._room[: min(READ_BYTES, self._length - self._received)]

    def buffer_updated(self, nbytes: int) -> None:
        self._received += nbytes
        self._last = self._loop.time()
        if self._sink is not None:
            try:
                self._sink.filled(nbytes)
                self._pace.check(self._received, self._last - self._begun)
            except BaseException as exc:
                self._end(exc)
                return
        if self._received == self._length:
            self._end()
        elif self._sink is not None:
            self._find_room()

    def eof_received(self) -> None:
        """The transport closes itself."""

    def connection_lost(self, exc: Exception | None) -> None:
        self._connection.connection_lost(exc)
        self._end(ClientDisconnect() if self._sink is not None else None)

    def pause_writing(self) -> None:
        self._connection.pause_writing()

    def resume_writing(self) -> None:
        self._connection.resume_writing()

    # --- its end ---------------------------------------------------------------------------------

    def _find_room(self) -> bool:
        assert self._sink is not None
        try:
            self._room = self._sink.room()
        except BaseException as exc:
            self._end(exc)
            return False
        return True

    def _look(self) -> None:
        """Give up after a silence."""
        idle_s = self._loop.time() - self._last
        if idle_s < self._pace.silence_s:
            self._look_again = self._loop.call_later(self._pace.silence_s - idle_s, self._look)
        else:
            self._end(self._pace.silent(self._received, self._length))

    def _stop_looking(self) -> None:
        if self._look_again is not None:
            self._look_again.cancel()

    def _end(self, exc: BaseException | None = None) -> None:
        self._stop_looking()
        self._connection.flow.pause_reading()
        if self.ended.done():
            return
        if exc is None:
            self.ended.set_result(None)
        else:
            self.ended.set_exception(exc)
