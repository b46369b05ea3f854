"""How a client reaches its server: over plain sockets if it can, else over httpx.

Sockets are for ``http://`` and ``unix:``. Whatever takes more than that (TLS, a proxy, a login in
the URL, a transport of the caller) is for httpx, which adds about a
millisecond to each request.
"""

from __future__ import annotations

import asyncio
import select
import socket
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol, TypeVar
from urllib.parse import SplitResult, quote, urlsplit

from optserve_client import _faults as faults
from optserve_client import errors
from optserve_client._http import Heads, Incoming
from optserve_client._memory import Memory
from optserve_client._messages import Answer, Request
from optserve_client._sockets import (
    READ,
    SUPPORTED,
    WRITE,
    Address,
    Connection,
    Pool,
    Waits,
    connected,
    exchanged,
    unix_address,
)

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")

#: Nothing is compressed unless the caller wants it: tensors hardly shrink, and what has a known
#: length is read into one buffer.
_HEADERS = {"Accept-Encoding": "identity", "User-Agent": "optserve-client"}
#: The longest that poll and event loops can wait; three weeks.
_LONGEST_S = 2e6


class Transport(Protocol):
    """Moves the bytes of a :class:`optserve_client.Client`. Threads may share it."""

    def send(self, request: Request) -> Answer:
        """Return the answer; raise TransportError if none came, ConnectFailed if nothing left."""

    def close(self) -> None: ...


class AsyncTransport(Protocol):
    """Moves the bytes of a :class:`optserve_client.AsyncClient`."""

    async def send(self, request: Request) -> Answer:
        """Do what :meth:`Transport.send` does. A cancelled one closes its connection."""

    async def close(self) -> None: ...


def blocking(
    url: str,
    timeout_s: float,
    headers: Mapping[str, str] | None,
    transport: httpx.BaseTransport | None,
    encoding: str | None = None,
) -> Transport:
    """Return what moves the bytes of a client with these arguments. Nothing is sent yet."""
    check_url(url, transport)
    if encoding is not None:
        from optserve_client._codings import Coded, Coding

        coding, asked = Coding(encoding), {"Accept-Encoding": encoding, **(headers or {})}
        return Coded(blocking(url, timeout_s, asked, transport), coding)
    sent = {**_HEADERS, **(headers or {})}
    if transport is None and _plain(url):
        return Blocking(url, timeout_s, sent)
    from optserve_client._over_httpx import OverHttpx

    named = place(url, transport)
    return OverHttpx(named, timeout_s, base_url=url, headers=sent, transport=transport)


def awaited(
    url: str,
    timeout_s: float,
    headers: Mapping[str, str] | None,
    transport: httpx.AsyncBaseTransport | None,
    encoding: str | None = None,
) -> AsyncTransport:
    """Return what :func:`blocking` does, to be awaited."""
    check_url(url, transport)
    if encoding is not None:
        from optserve_client._codings import AwaitedCoded, Coding

        coding, asked = Coding(encoding), {"Accept-Encoding": encoding, **(headers or {})}
        return AwaitedCoded(awaited(url, timeout_s, asked, transport), coding)
    sent = {**_HEADERS, **(headers or {})}
    if transport is None and _plain(url):
        return Awaited(url, timeout_s, sent)
    from optserve_client._over_httpx import AwaitedOverHttpx

    named = place(url, transport)
    return AwaitedOverHttpx(named, timeout_s, base_url=url, headers=sent, transport=transport)


def check_url(url: Any, transport: object) -> None:
    if not isinstance(url, str):
        example = "http://127.0.0.1:8000"
        raise TypeError(f"url must be a string such as {example!r}, got {url!r:.80}")
    if url.startswith("unix:") and url != "unix:":
        if transport is not None or not (SUPPORTED and hasattr(socket, "AF_UNIX")):
            why = "this system has none" if transport is None else "not with a transport"
            raise errors.Invalid(f"url {url!r} names a Unix domain socket: {why}")
    elif urlsplit(url).scheme not in {"http", "https"}:
        raise errors.Invalid(f"url must begin with http:// or https://, got {url!r}")


def place(url: str, transport: object = None) -> str:
    """Return where the server is, for messages: scheme, host and port, and the socket's path."""
    if url.startswith("unix:"):
        return url
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    if parts.port is None:
        host = f"{host.rstrip(':')}:{443 if parts.scheme == 'https' else 80}"
    uds = getattr(getattr(transport, "_pool", None), "_uds", None)  # httpx has no public name
    return f"{parts.scheme}://{host}" + (f" at {uds}" if uds else "")


def _plain(url: str) -> bool:
    """Return whether plain sockets reach ``url``."""
    if url.startswith("unix:"):
        return True
    parts = urlsplit(url)
    with suppress(ValueError):  # the port; httpx says what is wrong
        simple = parts.scheme == "http" and parts.hostname and parts.port != 0 and url.isascii()
        more = "@" in parts.netloc or parts.query or parts.fragment
        return bool(SUPPORTED and simple and not more) and not _proxied(parts)
    return False


def _proxied(parts: SplitResult) -> bool:
    from urllib.request import getproxies, proxy_bypass

    proxies = getproxies()
    if not (proxies.get("http") or proxies.get("all")):
        return False
    return not (proxy_bypass(parts.netloc) or proxy_bypass(parts.hostname or ""))


class _Sockets:
    """What both kinds over plain sockets share: where the server is, idle connections, memory."""

    def __init__(self, url: str, timeout_s: float, headers: Mapping[str, str]) -> None:
        self._server, self._timeout_s = place(url), timeout_s
        self._pool, self._memory = Pool(), Memory()
        self._host, self._port, self._path = "", 0, ""
        if url.startswith("unix:"):
            self._path = url.removeprefix("unix:")
            self._heads = Heads("localhost", "", headers)
            return
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "", parts.port or 80
        named = parts.netloc.removesuffix(":").removesuffix(":80")
        prefix = quote(parts.path.rstrip("/"), safe="/%:@!$&'()*+,;=~")
        self._heads = Heads(named, prefix, headers)

    def _known_addresses(self) -> list[Address] | None:
        """Return the addresses of the server if nobody has to be asked for them."""
        if self._path:
            return unix_address(self._path)
        try:
            return socket.getaddrinfo(
                self._host, self._port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST
            )
        except (socket.gaierror, UnicodeError):
            return None

    def _ended(self, connection: Connection, incoming: Incoming) -> Answer:
        if incoming.keep:
            self._pool.give(connection)
        else:
            connection.close()
        return incoming.answer()

    def _limit_s(self, events: int, more_s: float) -> float:
        """Return how long to wait for ``events``: ``more_s`` longer for an answer."""
        return min(self._timeout_s + (more_s if events == READ else 0.0), _LONGEST_S)

    def _close(self) -> None:
        self._pool.close()
        self._memory.close()

    def _unreachable(self, request: Request, exc: Exception) -> errors.ConnectFailed:
        return errors.ConnectFailed(faults.not_connected(request, self._server, exc))

    def _broken(self, request: Request, exc: Exception) -> errors.TransportError:
        if isinstance(exc, TimeoutError):
            return errors.Timeout(faults.late(request, self._server, self._timeout_s, exc))
        return errors.TransportError(faults.broken(request, self._server, exc))


class Blocking(_Sockets):
    """Plain sockets that a thread waits for."""

    def send(self, request: Request) -> Answer:
        head = self._heads.head(request)
        connection = self._pool.take()
        if connection is None:
            try:
                connection = self._run(connected(self._addresses()))
            except (OSError, UnicodeError) as exc:  # the latter: a name that cannot be looked up
                raise self._unreachable(request, exc) from exc
        try:
            steps = exchanged(connection, head, request, self._memory.take)
            return self._ended(connection, self._run(steps, request.wait_s))
        except (OSError, errors.TransportError) as exc:
            connection.close()
            raise self._broken(request, exc) from exc
        except BaseException:  # interrupted: what comes next on this socket is nobody's
            connection.close()
            raise

    def close(self) -> None:
        self._close()

    def _addresses(self) -> list[Address]:
        known = self._known_addresses()
        if known is None:
            known = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        return known

    def _run(self, steps: Waits[T], more_s: float = 0.0) -> T:
        try:
            sock, events = next(steps)
            while True:
                poller = select.poll()
                poller.register(sock, events)
                ready = poller.poll(self._limit_s(events, more_s) * 1000)
                if ready:
                    sock, events = steps.send(ready[0][1])
                else:
                    sock, events = steps.throw(TimeoutError("timed out"))
        except StopIteration as done:
            result: T = done.value
            return result
        finally:
            steps.close()


class Awaited(_Sockets):
    """Plain sockets that an event loop waits for."""

    async def send(self, request: Request) -> Answer:
        head = self._heads.head(request)
        connection = self._pool.take()
        if connection is None:
            try:
                connection = await self._run(connected(await self._addresses()))
            except (OSError, UnicodeError) as exc:  # the latter: a name that cannot be looked up
                raise self._unreachable(request, exc) from exc
        try:
            steps = exchanged(connection, head, request, self._memory.take)
            return self._ended(connection, await self._run(steps, request.wait_s))
        except (OSError, errors.TransportError) as exc:
            connection.close()
            raise self._broken(request, exc) from exc
        except BaseException:  # cancelled: what comes next on this socket is nobody's
            connection.close()
            raise

    async def close(self) -> None:
        self._close()

    async def _addresses(self) -> list[Address]:
        known = self._known_addresses()
        if known is None:
            loop = asyncio.get_running_loop()
            known = await loop.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        return known

    async def _run(self, steps: Waits[T], more_s: float = 0.0) -> T:
        try:
            sock, events = next(steps)
            while True:
                try:
                    happened = await _happens(sock, events, self._limit_s(events, more_s))
                except TimeoutError as exc:
                    sock, events = steps.throw(exc)
                else:
                    sock, events = steps.send(happened)
        except StopIteration as done:
            result: T = done.value
            return result
        finally:
            steps.close()


async def _happens(sock: socket.socket, events: int, timeout_s: float) -> int:
    """Wait for READ or WRITE and return which it was."""
    loop, number = asyncio.get_running_loop(), sock.fileno()
    happened: asyncio.Future[int] = loop.create_future()
    timer = loop.call_later(timeout_s, _fail, happened)
    try:
        if events & READ:
            loop.add_reader(number, _tell, happened, READ)
        if events & WRITE:
            loop.add_writer(number, _tell, happened, WRITE)
        return await happened
    finally:
        timer.cancel()
        if events & READ:
            loop.remove_reader(number)
        if events & WRITE:
            loop.remove_writer(number)


def _tell(happened: asyncio.Future[int], event: int) -> None:
    if not happened.done():
        happened.set_result(event)


def _fail(happened: asyncio.Future[int]) -> None:
    if not happened.done():
        happened.set_exception(TimeoutError("timed out"))
