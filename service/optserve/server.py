"""The process around the app: its socket, its signals, and the line that says that it is ready."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import ipaddress
import os
import signal
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import structlog
import uvicorn

from optserve.settings import Settings

log = structlog.get_logger(__name__)

BACKLOG = 2048
SIGNALS = (signal.SIGINT, signal.SIGTERM)

#: mallopt's parameters, from glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
#: Blocks of at least this size go back to the system as soon as they are freed.
MMAP_BYTES = 8 << 20
#: The heap is trimmed when this much is free at its end.
TRIM_BYTES = 4 << 20
#: Files, sockets among them, that the process may have open.
OPEN_FILES = 65_536
#: Objects made and not freed before the collector looks at the young ones; Python's own is 700.
COLLECT_AFTER = 10_000


class CannotListen(Exception):
    """The socket that the settings ask for cannot be had."""


def end_at_a_signal() -> None:
    """Have a signal end the process while it starts: it would not, as the first of a container."""
    for number in SIGNALS:
        signal.signal(number, lambda sig, _: os._exit(128 + sig))


def listen(settings: Settings) -> socket.socket:
    """Return the listening socket that ``settings`` ask for.

    It is bound before anything slow is imported: a port in use is known at once, and who connects
    while torch is still loading waits instead of being refused.
    """
    try:
        if settings.fd is not None:
            where = f"the inherited descriptor {settings.fd}"
            sock = socket.socket(fileno=settings.fd)
        elif settings.uds is not None:
            where = settings.uds
            _remove_dead_socket(settings.uds)
            sock = socket.socket(socket.AF_UNIX)
            sock.bind(settings.uds)
        else:
            where = f"{settings.host}:{settings.port}"
            family, kind, proto, _, address = socket.getaddrinfo(
                settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            sock = socket.socket(family, kind, proto)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
        sock.listen(BACKLOG)
    except OSError as exc:
        raise CannotListen(f"cannot listen on {where}: {exc.strerror or exc}") from exc
    sock.setblocking(False)
    return sock


def _remove_dead_socket(path: str) -> None:
    """Unlink the socket file that a killed server left behind, but not one that somebody serves."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)


def address_of(sock: socket.socket) -> str:
    """Return ``http://host:port`` or ``unix:/path``, with the port that was really bound."""
    name = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        return f"unix:{name.decode() if isinstance(name, bytes) else name}"
    host = f"[{name[0]}]" if sock.family == socket.AF_INET6 else name[0]
    return f"http://{host}:{name[1]}"


def close(sock: socket.socket, settings: Settings) -> None:
    """Stop listening, and remove the socket file that :func:`listen` made."""
    sock.close()
    if settings.uds is not None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(settings.uds)


def is_private(sock: socket.socket) -> bool:
    """Return whether only this machine can reach ``sock``."""
    return sock.family == socket.AF_UNIX or ipaddress.ip_address(sock.getsockname()[0]).is_loopback


#: How often a stopping server looks whether its last change is answered.
DRAIN_LOOK_S = 0.02


class Server(uvicorn.Server):
    """uvicorn, except that it warms up after binding and that a signal is an orderly exit.

    After the first SIGTERM or SIGINT new changes are refused with 503, those under way finish
    within ``drain_s``, and the process exits with 0; the second one exits at once.
    """

    def __init__(self, app: Any, settings: Settings, warm: Callable[[], str]) -> None:
        from optserve.api.connection import Connection  # not before the socket is bound

        super().__init__(
            uvicorn.Config(
                app,
                http=Connection,
                loop="uvloop",
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                backlog=BACKLOG,
                timeout_keep_alive=settings.keep_alive_s,
                # What is still open after the drain are pulls, and bodies that stopped coming.
                timeout_graceful_shutdown=1,
            )
        )
        self._app = app
        self._drain_s = settings.drain_s
        self._loop: asyncio.AbstractEventLoop | None = None
        #: When the stop should be over, on the monotonic clock; None: nobody asked for it.
        self.stop_by: float | None = None
        self._draining: asyncio.Task[None] | None = None
        #: Blocks until the first request would be as fast as the hundredth; returns the ready line.
        self._warm = warm
        self._warming: asyncio.Task[None] | None = None
        self.failure: BaseException | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        self._warming = asyncio.create_task(self._announce())

    async def _announce(self) -> None:
        try:
            line = await asyncio.to_thread(self._warm)
            spare_the_collector()
        except Exception as exc:
            log.exception("the server could not warm up")
            self.failure = exc
            self.should_exit = True
        else:
            print(line, flush=True)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, self.handle_exit) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.stop_by is not None:
            # Nothing that was acknowledged depends on an orderly exit.
            os._exit(128 + sig)
        self.stop_by = time.monotonic() + self._drain_s
        if self._loop is None:
            self.should_exit = True
        else:
            self._loop.call_soon_threadsafe(self._begin_drain)

    def _begin_drain(self) -> None:
        self._app.state.drain.begin()
        self._app.state.registry.draining = True
        self._draining = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        """Leave once every change that had begun is answered, and everybody who waited for one, or
        when time is over."""
        assert self.stop_by is not None
        while self._app.state.drain.busy and time.monotonic() < self.stop_by:
            await asyncio.sleep(DRAIN_LOOK_S)
        self.should_exit = True


def return_freed_memory() -> None:
    """Have glibc give large freed blocks back to the system; does nothing elsewhere.

    Left alone, glibc raises its mmap threshold to the size of the first large block that is freed,
    and keeps the next ones: a step then peaks one copy of the parameters higher.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, MMAP_BYTES)
        mallopt(M_TRIM_THRESHOLD, TRIM_BYTES)


def allow_connections() -> None:
    """Raise the number of files that may be open, as far as one may: each client that waits holds a
    socket, and 1024 is the limit that many systems begin with."""
    with contextlib.suppress(ImportError, OSError, ValueError):  # none elsewhere, or less than said
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
        if resource.RLIM_INFINITY != soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def spare_the_collector() -> None:
    """Have Python's garbage collector pass over what is there now, modules for the most part: it
    would look at half a million objects again and again, for a third of a second each time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(COLLECT_AFTER)


def serve(
    app: Any,
    sock: socket.socket,
    settings: Settings,
    warm: Callable[[], str],
    finish: Callable[[float], None],
) -> int:
    """Serve ``app`` on ``sock`` until a signal comes; return the exit status.

    At the end ``finish`` is called with the seconds that are left of ``drain_s``, at least one.
    """
    if not is_private(sock):
        log.warning(
            "this address can be reached from other machines and there is no authentication yet",
            address=address_of(sock),
        )
    return_freed_memory()
    allow_connections()
    server = Server(app, settings, warm)
    try:
        server.run(sockets=[sock])
    finally:
        close(sock, settings)
        left_s = server.stop_by - time.monotonic() if server.stop_by else settings.drain_s
        finish(max(left_s, 1.0))
    sys.stdout.flush()
    return 0 if server.failure is None else 1
