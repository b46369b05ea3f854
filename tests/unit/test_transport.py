"""Both clients over plain sockets, against servers on the loopback that misbehave on purpose."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvloop

from optserve_client import AsyncClient, Client, errors, wire
from optserve_client._sockets import LONGEST_IDLE_S, MOST_IDLE
from optserve_client._transport import Awaited, Blocking

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n"
CHUNKED = b"HTTP/1.1 200\r\ntransfer-encoding:chunked\r\n\r\n"
BIG = np.zeros(8_000_000, np.float32)

Script = Callable[["Peer"], None]


class Peer:
    """The server's end of one connection."""

    def __init__(self, sock: socket.socket, number: int) -> None:
        self.sock = sock
        #: Of the connection, counted from 0.
        self.number = number
        self._got = bytearray()

    def head(self) -> bytes:
        """Read a request's head; empty at the end of the connection."""
        while b"\r\n\r\n" not in self._got:
            more = self.sock.recv(65536)
            if not more:
                return b""
            self._got += more
        head, _, rest = bytes(self._got).partition(b"\r\n\r\n")
        self._got = bytearray(rest)
        return head

    def request(self) -> tuple[bytes, bytes]:
        """Read a whole request."""
        head = self.head()
        length = 0
        for line in head.lower().split(b"\r\n"):
            if line.startswith(b"content-length:"):
                length = int(line.partition(b":")[2])
        while len(self._got) < length:
            self._got += self.sock.recv(2**20)
        body, self._got = bytes(self._got[:length]), self._got[length:]
        return head, body

    def say(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.sock.sendall(piece)


class Server:
    """Runs ``script`` for each connection, in a thread; closes the connection behind it."""

    def __init__(self, script: Script, path: str = "", family: int = socket.AF_INET) -> None:
        self._script = script
        if path:
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(path)
            self._listener.listen()
            self.url = f"unix:{path}"
        else:
            host = "::1" if family == socket.AF_INET6 else "127.0.0.1"
            self._listener = socket.create_server((host, 0), family=family)
            port = self._listener.getsockname()[1]
            self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        self.peers: list[Peer] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            peer = Peer(sock, len(self.peers))
            self.peers.append(peer)
            thread = threading.Thread(target=self._serve, args=(peer,))
            self._threads.append(thread)
            thread.start()

    def _serve(self, peer: Peer) -> None:
        with contextlib.suppress(OSError):
            self._script(peer)
        peer.sock.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for peer in self.peers:
            with contextlib.suppress(OSError):
                peer.sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()


def answering(*pieces: bytes) -> Script:
    """Return a script that answers every request of a connection with ``pieces``."""

    def script(peer: Peer) -> None:
        while peer.request()[0]:
            peer.say(*pieces)

    return script


class Kind:
    """One of the clients, called the same way."""

    def __init__(self, name: str) -> None:
        self.name = name

    def run(self, url: str, *calls: Callable[[Any], Any], **options: Any) -> list[Any]:
        """Return what ``calls`` return, one after the other, in one client without retries."""
        options = {"retries": 0, "timeout": 10.0} | options
        if self.name == "blocking":
            with Client(url, **options) as c:
                return [call(c) for call in calls]

        async def awaited() -> list[Any]:
            async with AsyncClient(url, **options) as c:
                return [await call(c) for call in calls]

        return (uvloop.run if self.name == "uvloop" else asyncio.run)(awaited())

    def fails(self, url: str, call: Callable[[Any], Any], **options: Any) -> errors.OptserveError:
        with pytest.raises(errors.OptserveError) as caught:
            self.run(url, call, **options)
        return caught.value


@pytest.fixture(params=["blocking", "asyncio", "uvloop"])
def kind(request: pytest.FixtureRequest) -> Kind:
    return Kind(request.param)


def health(client: Any) -> Any:
    return client.healthz()


def big_step(client: Any) -> Any:
    return client.session("s").step({"w": BIG})


# Answers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pieces",
    [
        [OK + b'{"a":1}'],
        [OK, b'{"a"', b":1}"],
        [b"HTTP/1.1 100 Continue\r\n\r\n" + OK + b'{"a":1}'],
        [b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n", OK, b'{"a":1}'],
        [CHUNKED, b'3;x=y\r\n{"a\r\n', b'4\r\n":1}\r\n0\r\nT: x\r\n\r\n'],
        [bytes([c]) for c in OK + b'{"a":1}'],
        [bytes([c]) for c in CHUNKED + b'7\r\n{"a":1}\r\n0\r\n\r\n'],
    ],
    ids=["whole", "parts", "100", "103", "chunked", "bytes", "chunked bytes"],
)
def test_an_answer_is_read_however_it_is_framed_and_the_connection_is_used_again(
    kind: Kind, pieces: list[bytes]
) -> None:
    with Server(answering(*pieces)) as server:
        assert kind.run(server.url, *[health] * 3) == [{"a": 1}] * 3
        assert len(server.peers) == 1


@pytest.mark.parametrize(
    "answer",
    [
        b'HTTP/1.1 200 OK\r\n\r\n{"a":1}',
        b'HTTP/1.0 200 OK\r\nContent-Length: 7\r\n\r\n{"a":1}',
        b'HTTP/1.1 200 OK\r\nConnection: Close\r\nContent-Length: 7\r\n\r\n{"a":1}',
        OK + b'{"a":1}HTTP/1.1',
    ],
    ids=["until the end", "HTTP/1.0", "close", "more than asked for"],
)
def test_a_connection_that_is_of_no_more_use_is_not_used_again(kind: Kind, answer: bytes) -> None:
    def script(peer: Peer) -> None:
        peer.request()
        peer.say(answer)
        if b"Length" in answer:
            peer.head()  # until the client closes it

    with Server(script) as server:
        assert kind.run(server.url, health, health) == [{"a": 1}] * 2
        assert len(server.peers) == 2


def test_an_answer_without_a_body_is_read(kind: Kind) -> None:
    with Server(answering(b"HTTP/1.1 204 No Content\r\n\r\n")) as server:
        assert kind.run(server.url, health, health) == [{}, {}]
        assert len(server.peers) == 1


@pytest.mark.parametrize(
    "answer, why",
    [
        (b"", "closed the connection without an answer"),
        (b"HTTP/1.1 200 OK\r\nConte", "cut short after its head"),
        (OK + b'{"a"', "cut short after 4 of 7 bytes"),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\n{}  \r\n",
            "cut short after 4",
        ),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "no HTTP answer: b'SSH-2.0-OpenSSH"),
        (b"HTTP/2 200\r\n\r\n", "no HTTP answer"),
        (b"HTTP/1.1 20 OK\r\n\r\n", "no HTTP answer"),
        (b"HTTP/1.1 101 Switching\r\n\r\n", "switched protocols"),
        (b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n", "no header of an answer: 'no colon'"),
        (b"HTTP/1.1 200 OK\r\na: b\r\n folded\r\n\r\n", "no header of an answer"),
        (b"HTTP/1.1 200 OK\r\na: b\nc: d\r\n\r\n", "control character"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", "Content-Length is '-1'"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", "is '1, 2'"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", "transfer coding"),
        (CHUNKED + b"xyz\r\n", "no length of a chunk"),
        (CHUNKED + b"1\r\nab\r\n", "a chunk is longer"),
        (CHUNKED + b"1" * 5000, "between chunks"),
        (b"HTTP/1.1 200 OK\r\nx: " + b"y" * 70_000, "the head has more than 65536 bytes"),
    ],
)
def test_what_is_no_whole_answer_is_a_failure_of_the_connection(
    kind: Kind, answer: bytes, why: str
) -> None:
    def script(peer: Peer) -> None:
        peer.request()
        peer.say(answer)

    with Server(script) as server:
        caught = kind.fails(server.url, health)
    assert type(caught) is errors.TransportError
    assert caught.detail.startswith(f"GET /healthz: the connection to {server.url} failed: ")
    assert why in caught.detail


def test_a_large_body_and_a_large_answer_arrive_as_they_are(kind: Kind) -> None:
    grads = {"a": np.random.default_rng(0).standard_normal(700_001), "b": np.ones(3)}
    scalars = b'{"id":"s","generation":"g","version":1,"updates":1,"applied":true}'

    def script(peer: Peer) -> None:
        sent = wire.decode(peer.request()[1])[0]
        frame = wire.encode(
            {name.replace("grad", "param"): value for name, value in sent.items()},
            {wire.META_KEY: scalars.decode()},
        )
        peer.say(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/vnd.safetensors\r\n"
            b"Content-Length: %d\r\n\r\n" % sum(map(len, frame)),
            *map(bytes, frame),
        )

    with Server(script) as server:
        (result,) = kind.run(server.url, lambda c: c.session("s").step(grads))
    assert result.params is not None
    for name, grad in grads.items():
        np.testing.assert_array_equal(result.params[name], grad)
        assert result.params[name].flags.writeable
        assert result.params[name].flags.aligned


# A server that answers before it has read all ----------------------------------------------------

REFUSED = errors.TooLarge("the body has more bytes than there may be").problem()


@pytest.mark.parametrize("pieces", [1, 3])
def test_an_answer_that_comes_while_the_body_is_sent_is_the_answer(kind: Kind, pieces: int) -> None:
    body = json.dumps(REFUSED).encode()
    answer = b"HTTP/1.1 413 Too Large\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    size = -(-len(answer) // pieces)

    def script(peer: Peer) -> None:
        peer.head()
        peer.say(*(answer[at : at + size] for at in range(0, len(answer), size)))
        if pieces > 1:
            peer.head()  # reads on until the client closes

    with Server(script) as server:
        caught = kind.fails(server.url, big_step)
    assert type(caught) is errors.TooLarge
    assert caught.detail == REFUSED["detail"]


def test_an_interim_answer_does_not_end_the_body(kind: Kind) -> None:
    def script(peer: Peer) -> None:
        while head := peer.head():
            peer.say(b"HTTP/1.1 100 Continue\r\n\r\n")
            peer._got[:0] = head + b"\r\n\r\n"
            assert len(peer.request()[1]) > BIG.nbytes
            peer.say(b"HTTP/1.1 422 No\r\nContent-Length: 0\r\n\r\n")

    with Server(script) as server:
        caught = kind.fails(server.url, big_step)
    assert isinstance(caught, errors.RequestError)
    assert caught.detail == "HTTP 422"


def test_a_server_that_goes_away_while_the_body_is_sent_is_a_failure(kind: Kind) -> None:
    with Server(lambda peer: [peer.head(), None][1]) as server:  # type: ignore[func-returns-value]
        caught = kind.fails(server.url, big_step)
    assert type(caught) is errors.TransportError


# Connections -------------------------------------------------------------------------------------


def test_a_connection_that_the_server_closed_is_replaced_without_an_error(kind: Kind) -> None:
    closed = threading.Semaphore(0)

    def script(peer: Peer) -> None:
        peer.request()
        peer.say(OK + b'{"a":1}')
        peer.sock.shutdown(socket.SHUT_RDWR)
        closed.release()

    def call(client: Any) -> Any:
        if server.peers:
            assert closed.acquire(timeout=10)
        return client.healthz()

    with Server(script) as server:
        assert kind.run(server.url, call, call, call) == [{"a": 1}] * 3
        assert len(server.peers) == 3


def test_a_connection_that_was_idle_for_long_is_replaced(
    kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optserve_client._sockets.LONGEST_IDLE_S", -1.0)
    assert LONGEST_IDLE_S == 60
    with Server(answering(OK + b'{"a":1}')) as server:
        kind.run(server.url, health, health)
        assert len(server.peers) == 2


def test_a_server_that_does_not_answer_in_time_is_told_with_the_limit(kind: Kind) -> None:
    def script(peer: Peer) -> None:
        peer.head()
        peer.say(OK)
        peer.head()

    with Server(script) as server:
        for call, what in ((health, "GET /healthz"), (big_step, "POST /v1/sessions/s/step")):
            caught = kind.fails(server.url, call, timeout=0.2)
            assert type(caught) is errors.Timeout
            assert caught.detail == (
                f"{what}: no complete answer from {server.url} in time, 0.2 s: timed out "
                "(tried once, limit 60 s)"
            )


def test_a_timeout_may_be_as_long_as_one_likes(kind: Kind) -> None:
    with Server(answering(OK + b'{"a":1}')) as server:
        assert kind.run(server.url, health, timeout=float("inf")) == [{"a": 1}]


def test_a_body_that_nobody_reads_is_given_up_in_time(kind: Kind) -> None:
    done = threading.Event()
    with Server(lambda peer: [peer.head(), done.wait(10), None][2]) as server:  # type: ignore[func-returns-value]
        caught = kind.fails(server.url, big_step, timeout=0.2)
        done.set()
    assert type(caught) is errors.Timeout


def test_a_server_that_takes_no_connections_is_given_up_in_time(kind: Kind) -> None:
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.socket())
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(4):  # until its queue is full, further ones are not answered
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        url = "http://{}:{}".format(*full.getsockname())
        caught = kind.fails(url, health, timeout=0.2)
    assert type(caught) is errors.ConnectFailed
    assert f"cannot connect to {url}: timed out" in caught.detail


def test_all_addresses_of_a_name_are_tried(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    def both(self: Any) -> Any:
        port = int(server.url.rpartition(":")[2])
        one = (socket.AF_INET6, socket.SOCK_STREAM, 0, "", ("::1", port, 0, 0))
        return [one, (socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", port))]

    monkeypatch.setattr("optserve_client._transport._Sockets._known_addresses", both)
    with Server(answering(OK + b'{"a":1}')) as server:
        assert kind.run(server.url, health) == [{"a": 1}]


def test_a_name_is_looked_up(kind: Kind) -> None:
    with Server(answering(OK + b'{"a":1}')) as server:
        assert kind.run(server.url.replace("127.0.0.1", "localhost"), health) == [{"a": 1}]
    for name in ("nowhere.invalid", 64 * "x"):
        caught = kind.fails(f"http://{name}", health)
        assert type(caught) is errors.ConnectFailed
        assert f"cannot connect to http://{name}:80: " in caught.detail


def test_a_unix_socket_and_ipv6_are_reached(kind: Kind, tmp_path: Path) -> None:
    with Server(answering(OK + b'{"a":1}'), path=str(tmp_path / "o.sock")) as server:
        assert kind.run(server.url, health, health) == [{"a": 1}] * 2
        assert len(server.peers) == 1
    caught = kind.fails(f"unix:{tmp_path}/none.sock", health)
    assert f"cannot connect to unix:{tmp_path}/none.sock: No such file" in caught.detail
    with Server(answering(OK + b'{"a":1}'), family=socket.AF_INET6) as server:
        assert kind.run(server.url, health) == [{"a": 1}]


def test_the_head_of_a_request_has_what_it_should(kind: Kind) -> None:
    seen: list[tuple[bytes, bytes]] = []

    def script(peer: Peer) -> None:
        while (request := peer.request())[0]:
            seen.append(request)
            peer.say(OK + b'{"a":1}')

    with Server(script) as server:
        kind.run(
            f"{server.url}/behind/a proxy/",
            health,
            lambda c: c.session("s").patch(name="x"),
            headers={"X-Key": "k", "accept": "never", "User-Agent": "me"},
        )
    host = server.url.removeprefix("http://")
    assert seen[0][0].decode().split("\r\n") == [
        "GET /behind/a%20proxy/healthz HTTP/1.1",
        "Accept: application/json",
        f"Host: {host}",
        "Accept-Encoding: identity",
        "User-Agent: me",
        "X-Key: k",
    ]
    head, body = seen[1]
    assert b"\r\nContent-Type: application/json\r\nContent-Length: %d\r\n" % len(body) in head


@pytest.mark.parametrize("headers", [{"a b": "x"}, {"X": "a\r\nb: c"}, {"X": "\u00e9"}])
def test_headers_that_would_not_arrive_as_they_are_are_refused(
    headers: dict[str, str],
) -> None:
    for cls in (Client, AsyncClient):
        with pytest.raises(errors.Invalid, match="header"):
            cls("http://x", headers=headers)  # type: ignore[operator]


# Sharing, interrupting, closing ------------------------------------------------------------------


def test_threads_share_a_client_and_its_connections() -> None:
    def script(peer: Peer) -> None:
        while head := peer.head():
            name = head.split(b" ")[1].rpartition(b"/")[2]
            body = b'{"name":"%s"}' % name
            peer.say(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body), body)

    def ask(name: str) -> None:
        for i in range(50):
            path = f"{name}-{i}"
            got.append(client.optimizer(path) == {"name": path})

    got: list[bool] = []
    with Server(script) as server, Client(server.url, retries=0) as client:
        threads = [threading.Thread(target=ask, args=(str(i),)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(server.peers) <= 6
    assert got == [True] * 300


def test_no_more_connections_are_kept_than_the_limit() -> None:
    everybody = threading.Barrier(MOST_IDLE + 5)

    def script(peer: Peer) -> None:
        while peer.request()[0]:
            everybody.wait(20)
            peer.say(OK + b'{"a":1}')

    with Server(script) as server, Client(server.url) as client:
        threads = [threading.Thread(target=client.healthz) for _ in range(MOST_IDLE + 5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert isinstance(client._transport, Blocking)
        assert len(client._transport._pool._idle) == MOST_IDLE


@contextlib.contextmanager
def interrupted_by(asked: threading.Event) -> Iterator[None]:
    """Raise KeyboardInterrupt in the main thread once ``asked`` is set."""

    def interrupt() -> None:
        assert asked.wait(10)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job may ignore it
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        thread.join()
        signal.signal(signal.SIGINT, before)


def test_an_interrupted_request_closes_its_connection() -> None:
    asked, ended = threading.Event(), threading.Event()

    def script(peer: Peer) -> None:
        peer.request()
        if peer.number:
            peer.say(OK + b'{"a":1}')
            return
        asked.set()
        assert peer.head() == b""
        ended.set()

    with Server(script) as server, Client(server.url) as client:
        with interrupted_by(asked):
            client.healthz()
        assert ended.wait(10)
        assert client.healthz() == {"a": 1}


def test_a_cancelled_request_closes_its_connection() -> None:
    ended = threading.Event()

    def script(peer: Peer) -> None:
        peer.request()
        if peer.number:
            peer.say(OK + b'{"a":1}')
            return
        assert peer.head() == b""
        ended.set()

    async def run() -> None:
        async with AsyncClient(server.url) as client:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(client.healthz(), 0.05)
            assert await asyncio.to_thread(ended.wait, 10)
            assert await client.healthz() == {"a": 1}

    with Server(script) as server:
        asyncio.run(run())


def test_a_client_that_is_awaited_goes_from_one_event_loop_to_the_next() -> None:
    with Server(answering(OK + b'{"a":1}')) as server:
        client = AsyncClient(server.url, retries=0)
        assert asyncio.run(client.healthz()) == {"a": 1}
        assert asyncio.run(client.healthz()) == {"a": 1}
        asyncio.run(client.close())
        assert len(server.peers) == 1


def test_a_child_process_does_not_share_the_sockets_of_its_parent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with Server(answering(OK + b'{"a":1}')) as server, Client(server.url) as client:
        client.healthz()
        pid = os.getpid()
        monkeypatch.setattr(os, "getpid", lambda: pid + 1)
        client.healthz()
        assert len(server.peers) == 2


def test_a_closed_client_sends_nothing(kind: Kind) -> None:
    with Server(answering(OK + b'{"a":1}')) as server:
        with pytest.raises(RuntimeError, match="the client has been closed"):
            kind.run(server.url, health, lambda c: c.close(), health)
        assert len(server.peers) == 1


# Which way ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url, environment, plain",
    [
        ("http://127.0.0.1:8000", {}, True),
        ("http://host/prefix", {}, True),
        ("unix:/run/o.sock", {"HTTP_PROXY": "http://proxy:1"}, True),
        ("https://host", {}, False),
        ("http://me:secret@host", {}, False),
        ("http://host", {"HTTP_PROXY": "http://proxy:1"}, False),
        ("http://host", {"ALL_PROXY": "http://proxy:1"}, False),
        ("http://host", {"HTTPS_PROXY": "http://proxy:1"}, True),
        ("http://host:8", {"HTTP_PROXY": "http://proxy:1", "NO_PROXY": "x,host"}, True),
        ("http://[::1]:8", {"HTTP_PROXY": "http://proxy:1", "NO_PROXY": "::1"}, True),
    ],
)
def test_plain_sockets_are_taken_where_they_reach(
    url: str, environment: dict[str, str], plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        for spelling in (name, name.lower()):
            monkeypatch.delenv(spelling, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name.lower(), value)
    with Client(url) as client:
        assert isinstance(client._transport, Blocking) is plain
    assert isinstance(AsyncClient(url)._transport, Awaited) is plain


def test_a_login_in_the_url_is_not_shown() -> None:
    assert "secret" not in repr(Client("http://me:secret@host", worker="w"))
    assert repr(Client("unix:/run/o.sock", worker="w")) == "Client('unix:/run/o.sock', worker='w')"
