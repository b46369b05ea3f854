"""A bad network: a TCP proxy that drops, delays, cuts and duplicates requests and replies.

It knows HTTP/1.1 as far as to tell one message from the next. What becomes of each request is drawn
from a seed; :attr:`Proxy.faults` counts what was drawn.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Coroutine, Mapping
from types import TracebackType
from typing import Any

from tests.waiting import wait_until

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]

#: What happens to how many of 1,000 requests; the others pass.
FAULTS: Mapping[str, int] = {
    #: The connection ends before the server has seen anything.
    "drop_request": 25,
    #: The server gets the first bytes only, then the connection ends.
    "cut_request": 25,
    #: The server answers, nobody hears it.
    "drop_reply": 40,
    #: The client gets the first bytes of the reply only.
    "cut_reply": 40,
    #: The server answers, and the client hears nothing, not even that the connection ended.
    "silence": 2,
    "delay_request": 20,
    "delay_reply": 20,
    #: The server gets the same bytes twice, on two connections at once.
    "duplicate": 40,
    #: The same, and the client gets no answer: its own repeat is the third.
    "duplicate_and_drop_reply": 20,
    #: The server gets the same bytes again some time later, when others came after.
    "duplicate_later": 40,
}
LIMIT_BYTES = 2**20


class Proxy:
    """Listens on a port of its own and forwards to ``target``; a context manager."""

    def __init__(self, target: tuple[str, int], seed: int, faults: Mapping[str, int] = FAULTS):
        self.faults: Counter[str] = Counter()
        #: Statuses that duplicated requests were answered with.
        self.replayed: Counter[int] = Counter()
        self.requests = 0
        #: Set to let everything pass from now on.
        self.quiet = False
        self.url = ""
        self._target, self._rng, self._rates = target, random.Random(seed), faults
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._replays: set[asyncio.Task[None]] = set()
        self._started = threading.Event()

    # --- the loop's thread -----------------------------------------------------------------------

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._listen())
        self._loop.run_forever()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._handle, "127.0.0.1", 0, limit=LIMIT_BYTES)
        port = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._started.set()

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Forward one connection of a client, until it ends or is made to."""
        upstream: Streams | None = None
        try:
            while (request := await _read_message(reader)) is not None:
                if upstream is None:
                    upstream = await self._connect()
                if not await self._exchange(request, (reader, writer), upstream):
                    break
        except (OSError, EOFError, asyncio.CancelledError):
            pass
        finally:
            for one in (writer, *((upstream[1],) if upstream else ())):
                _close(one, reset=self._rng.random() < 0.5)

    async def _connect(self) -> Streams:
        return await asyncio.open_connection(*self._target, limit=LIMIT_BYTES)

    async def _exchange(self, request: bytes, downstream: Streams, upstream: Streams) -> bool:
        """Deliver one request and its reply, or not; return whether the connection goes on."""
        fault = self._draw(request)
        (patient, client), (reader, writer) = downstream, upstream
        if fault == "drop_request":
            return False
        if fault == "cut_request":
            writer.write(request[: self._rng.randrange(1, len(request))])
            await writer.drain()
            return False
        if fault == "delay_request":
            await asyncio.sleep(self._rng.uniform(0, 0.05))
        if fault.startswith("duplicate"):
            pause_s = self._rng.uniform(0.01, 0.5) if fault == "duplicate_later" else 0.0
            self._spawn(self._replay(request, pause_s))
        writer.write(request)
        await writer.drain()
        reply = await _read_message(reader)
        if reply is None or fault in ("drop_reply", "duplicate_and_drop_reply"):
            return False
        if fault == "silence":
            await patient.read(1)  # until the client gives up
            return False
        if fault == "cut_reply":
            client.write(reply[: self._rng.randrange(1, len(reply))])
            await client.drain()
            return False
        if fault == "delay_reply":
            await asyncio.sleep(self._rng.uniform(0, 0.05))
        client.write(reply)
        await client.drain()
        return b"connection: close" not in reply[:2000].lower()

    def _draw(self, request: bytes) -> str:
        self.requests += 1
        draw = self._rng.randrange(1000)
        if self.quiet:
            return ""
        for fault, rate in self._rates.items():
            draw -= rate
            if draw < 0:
                self.faults[fault] += 1
                return fault
        return ""

    def _spawn(self, replay: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(replay)
        self._replays.add(task)
        task.add_done_callback(self._replays.discard)

    async def _replay(self, request: bytes, pause_s: float) -> None:
        """Send recorded bytes on a connection of their own and note how they are answered."""
        await asyncio.sleep(pause_s)
        with contextlib.suppress(OSError, EOFError):  # the server may die meanwhile
            reader, writer = await self._connect()
            try:
                writer.write(request)
                reply = await _read_message(reader)
                if reply is not None:
                    self.replayed[int(reply.split(b" ", 2)[1])] += 1
            finally:
                _close(writer)

    # --- other threads ---------------------------------------------------------------------------

    def settle(self) -> None:
        """Let everything pass from now on, and return when all duplicates were answered."""
        self.quiet = True
        wait_until(lambda: not self._replays, "the answer to a duplicate", 30)

    def __enter__(self) -> Proxy:
        self._thread.start()
        assert self._started.wait(10), "the proxy did not start"
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._loop.call_soon_threadsafe(self._server.close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)


async def _read_message(reader: asyncio.StreamReader) -> bytes | None:
    """Return the bytes of one request or reply with its body; None where the connection ends."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as exc:
        if exc.partial:
            raise
        return None
    assert b"transfer-encoding: chunked" not in head.lower()
    found = re.search(rb"\r\ncontent-length: *(\d+)", head, re.IGNORECASE)
    if found is None or re.match(rb"HTTP/1\.1 (204|304)", head):
        return head
    return head + await reader.readexactly(int(found[1]))


def _close(writer: asyncio.StreamWriter, *, reset: bool = False) -> None:
    """End a connection, by FIN or by RST."""
    sock = writer.get_extra_info("socket")
    if reset and sock is not None:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.close()
