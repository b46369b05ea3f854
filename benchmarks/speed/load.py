"""A load generator: requests that lie ready, written over raw sockets, one at a time on each.

The same for every server, and leaner than any: it reads an answer only to see where it ends.
"""

from __future__ import annotations

import asyncio
import base64
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import uvloop

from benchmarks.speed.worker import Worker, run

#: Where this stands in a request, the number of the request is written, right-aligned.
SLOT = b"9999999999"
_END = b"\r\n\r\n"
_LENGTH = b"content-length:"


@dataclass
class Prepared:
    """One request, and which one comes next."""

    text: bytearray
    #: Where its number stands; -1: nowhere.
    at: int
    number: int = 0

    def next(self) -> bytes:
        self.number += 1
        if self.at >= 0:
            self.text[self.at : self.at + len(SLOT)] = b"%10d" % self.number
        return bytes(self.text)


class Connection(asyncio.Protocol):
    """Sends the next request when the last one is answered, until time is over."""

    def __init__(self, prepared: Prepared, until: float, taken: list[float]) -> None:
        self._prepared = prepared
        self._until = until
        self._taken = taken
        self._got = bytearray()
        self._began = 0.0
        self.done = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are no subclasses
        self._send()

    def data_received(self, data: bytes) -> None:
        self._got += data
        end = self._got.find(_END)
        if end < 0:
            return
        head = bytes(self._got[:end]).lower()
        if not head.startswith(b"http/1.1 200"):
            self.done.set_exception(RuntimeError(bytes(self._got[:600]).decode(errors="replace")))
            self._transport.close()
            return
        at = head.index(_LENGTH) + len(_LENGTH)
        length = int(head[at:].split(b"\r", 1)[0])
        if len(self._got) < end + len(_END) + length:
            return
        now = time.perf_counter()
        self._taken.append(now - self._began)
        self._got.clear()
        if now < self._until:
            self._send()
        else:
            self._transport.close()
            self.done.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(exc or RuntimeError("the server closed the connection"))

    def _send(self) -> None:
        self._began = time.perf_counter()
        self._transport.write(self._prepared.next())


class Load(Worker):
    def __init__(self) -> None:
        self._targets: dict[str, tuple[str, int, list[Prepared]]] = {}

    def server_pids(self) -> list[int]:
        return []

    def prepare(self, name: str, host: str, port: int, requests: Sequence[str]) -> None:
        """Keep ``requests``, in base64, one for each connection to come."""
        texts = [bytearray(base64.b64decode(request)) for request in requests]
        self._targets[name] = host, port, [Prepared(text, text.find(SLOT)) for text in texts]

    def load(self, name: str, connections: int, seconds: float) -> dict[str, Any]:
        """Return answers per second, and the median and 99th percentile in seconds."""
        began = time.perf_counter()
        taken = uvloop.run(self._load(name, connections, began + seconds))
        passed = time.perf_counter() - began
        p99 = statistics.quantiles(taken, n=100)[-1] if len(taken) > 1 else taken[0]
        return {"per_s": len(taken) / passed, "p50_s": statistics.median(taken), "p99_s": p99}

    async def _load(self, name: str, connections: int, until: float) -> list[float]:
        host, port, prepared = self._targets[name]
        taken: list[float] = []
        loop = asyncio.get_running_loop()
        made = [
            loop.create_connection(partial(Connection, one, until, taken), host, port)
            for one in prepared[:connections]
        ]
        protocols = [protocol for _, protocol in await asyncio.gather(*made)]
        await asyncio.wait_for(asyncio.gather(*(one.done for one in protocols)), 60)
        return taken


if __name__ == "__main__":
    run(Load())
