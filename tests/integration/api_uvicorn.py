"""An ASGI app behind a real uvicorn in a thread, and a socket to talk to it byte by byte."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from optserve.api.connection import Connection
from tests.waiting import wait_until


@contextmanager
def served(app: Any, **told: Any) -> Iterator[tuple[str, int]]:
    """Serve ``app`` on a free loopback port; yield its address. ``told``: of uvicorn's Config."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        told = {"http": Connection, **told}
        config = uvicorn.Config(
            app, log_config=None, access_log=False, timeout_graceful_shutdown=1, **told
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        wait_until(lambda: server.started, "the start of uvicorn")
        yield listener.getsockname()
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


class Wire:
    """One connection, written and read as bytes."""

    def __init__(self, address: tuple[str, int], timeout_s: float = 10) -> None:
        self.socket = socket.create_connection(address, timeout_s)
        self._left = b""

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def request(self, head: str, body: bytes = b"") -> tuple[int, dict[str, str], bytes]:
        """Send one request (its lines, without the blank one) and read one answer."""
        self.send(head.replace("\n", "\r\n").encode() + b"\r\nHost: x\r\n\r\n" + body)
        return self.answer()

    def answer(self) -> tuple[int, dict[str, str], bytes]:
        """Read one answer: status, headers with names in lower case, body."""
        while b"\r\n\r\n" not in self._left:
            self._more()
        head, _, self._left = self._left.partition(b"\r\n\r\n")
        status, *lines = head.decode("latin-1").split("\r\n")
        headers = {}
        for line in lines:
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        length = int(headers.get("content-length", 0))
        while len(self._left) < length:
            self._more()
        body, self._left = self._left[:length], self._left[length:]
        return int(status.split()[1]), headers, body

    def _more(self) -> None:
        data = self.socket.recv(65536)
        assert data, f"closed in the middle of an answer, after {self._left!r}"
        self._left += data

    def closed(self, within_s: float = 10) -> bool:
        """Whether the server closes the connection without sending anything more."""
        self.socket.settimeout(within_s)
        try:
            return self.socket.recv(1) == b""
        except TimeoutError:
            return False

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *exc: object) -> None:
        self.socket.close()
