"""One request and its answer over a plain socket, for both clients.

Sockets do not block. What has to wait is a generator: it yields a socket and what it waits for, is
told what came of it (or gets a TimeoutError thrown in), and goes on. ``_transport.py`` waits, with
poll or with asyncio.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import threading
import time
from collections.abc import Generator, Iterable, Iterator
from typing import Any, TypeAlias, TypeVar

from optserve_client import errors
from optserve_client._http import HEAD_LIMIT, Incoming
from optserve_client._memory import Take
from optserve_client._messages import Request

T = TypeVar("T")

#: What is waited for; anything else that happens to a socket counts as READ, which finds out.
READ = getattr(select, "POLLIN", 1)
WRITE = getattr(select, "POLLOUT", 4)
#: Whether this system can wait in this way; else the clients use httpx.
SUPPORTED = hasattr(select, "poll")

Waits: TypeAlias = Generator[tuple[socket.socket, int], int, T]
#: As getaddrinfo returns it.
Address: TypeAlias = tuple[Any, Any, int, str, Any]

#: Idle connections that are kept, and for how long: less than the server does, which is 75 s.
MOST_IDLE = 100
LONGEST_IDLE_S = 60.0
#: Bodies up to this are joined with their head.
_SMALL_BYTES = 2**16
_NO_SIGNAL = getattr(socket, "MSG_NOSIGNAL", 0)


class Connection:
    """A socket, and room for the head of an answer."""

    __slots__ = ("idle_since", "room", "sock")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.room = memoryview(bytearray(HEAD_LIMIT))
        self.idle_since = 0.0

    def stale(self) -> bool:
        """Whether the server has closed it, or said what nobody asked for, or soon will."""
        if time.monotonic() - self.idle_since > LONGEST_IDLE_S:
            return True
        poller = select.poll()
        poller.register(self.sock, READ)
        return bool(poller.poll(0))

    def close(self) -> None:
        self.sock.close()


class Pool:
    """Idle connections to one server; the last one that was used is the first to be used again."""

    def __init__(self) -> None:
        self._idle: list[Connection] = []
        self._lock = threading.Lock()
        self._closed = False
        self._pid = os.getpid()

    def take(self) -> Connection | None:
        """Return a connection that the server has not closed so far; None: make one."""
        if self._closed:
            raise RuntimeError("Cannot send a request, as the client has been closed.")
        if self._pid != os.getpid():  # after a fork these sockets are the parent's
            self._empty()
            self._pid = os.getpid()
        while True:
            with self._lock:
                if not self._idle:
                    return None
                connection = self._idle.pop()
            if not connection.stale():
                return connection
            connection.close()

    def give(self, connection: Connection) -> None:
        """Keep ``connection`` for the next request."""
        connection.idle_since = time.monotonic()
        surplus: Connection | None = connection
        with self._lock:
            if not self._closed:
                self._idle.append(connection)
                surplus = self._idle.pop(0) if len(self._idle) > MOST_IDLE else None
        if surplus is not None:
            surplus.close()

    def close(self) -> None:
        self._closed = True
        self._empty()

    def _empty(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()


def unix_address(path: str) -> list[Address]:
    return [(socket.AF_UNIX, socket.SOCK_STREAM, 0, "", path)]


def connected(addresses: Iterable[Address]) -> Waits[Connection]:
    """Return a connection to the first of ``addresses`` that takes one."""
    failure: OSError = OSError("the name of the server has no address")
    for family, kind, protocol, _, address in addresses:
        try:
            sock = socket.socket(family, kind, protocol)
        except OSError as exc:  # a family that this system lacks
            failure = exc
            continue
        try:
            yield from _connect(sock, family, address)
        except OSError as exc:
            sock.close()
            failure = exc
        except BaseException:
            sock.close()
            raise
        else:
            return Connection(sock)
    raise failure


def _connect(sock: socket.socket, family: int, address: Any) -> Waits[None]:
    sock.setblocking(False)
    code = sock.connect_ex(address)
    if code == errno.EINPROGRESS:
        yield sock, WRITE
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if not code and family != getattr(socket, "AF_UNIX", None):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if sock.getsockname() == sock.getpeername():  # it was given the port that it knocked at
            code = errno.ECONNREFUSED
    if code:
        raise OSError(code, os.strerror(code))


def exchanged(connection: Connection, head: bytes, request: Request, take: Take) -> Waits[Incoming]:
    """Send ``request``, whose head is ``head``, and return the whole answer, in memory of ``take``.

    A server may answer, and close, before it has read all: then that is the answer, and the
    connection is of no more use. A socket that fails while sending may hold one, too.
    """
    sock, lost = connection.sock, None
    incoming = Incoming(request.method, connection.room, take)
    if request.length <= _SMALL_BYTES:
        parts: Iterator[bytes | memoryview] = iter((b"".join((head, *request.pieces)),))
    else:
        parts = request.parts(head)
    try:
        sent = yield from _sent(sock, parts, incoming)
    except ConnectionError as exc:
        sent, lost = False, exc
    try:
        while not incoming.done:
            yield sock, READ
            _receive(sock, incoming)
    except (OSError, errors.TransportError):
        if lost is not None:
            raise lost from None
        raise
    incoming.keep = incoming.keep and sent
    return incoming


def _sent(
    sock: socket.socket, parts: Iterator[bytes | memoryview], incoming: Incoming
) -> Waits[bool]:
    """Send ``parts``; return False if the answer began before their end."""
    for part in parts:
        view = memoryview(part)
        while True:
            try:
                count = sock.send(view, _NO_SIGNAL)
            except BlockingIOError:
                count = 0
            if count == len(view):
                break
            view = view[count:]
            if (yield sock, READ | WRITE) & ~WRITE:
                _receive(sock, incoming)
                if incoming.status:
                    return False
    return True


def _receive(sock: socket.socket, incoming: Incoming) -> None:
    try:
        count = sock.recv_into(incoming.buffer())
    except BlockingIOError:
        return
    incoming.received(count)
