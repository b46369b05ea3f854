"""Pulls that wait for a version, over real sockets: what ends the waiting, and what is answered."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import httpx
import numpy as np
import orjson
import pytest

from optserve.api.app import create_app
from optserve.api.connection import Connection
from optserve.api.pulling import Shared
from optserve.sessions.registry import Registry
from optserve.sessions.session import Session
from optserve.sessions.watching import Watching
from optserve.settings import Settings
from optserve.store.memory import MemoryStore
from optserve.store.opening import open_store
from optserve_client.wire import SAFETENSORS
from tests import local
from tests.integration.api_client import CREATE, GRADS, asking
from tests.integration.api_uvicorn import Wire, served
from tests.waiting import wait_until

S = "/v1/sessions/s"
NEW = {"w": np.zeros((2, 2), "f4"), "b": np.zeros((), "f4")}
JSON = "Content-Type: application/json"
#: Whoever waits for so long was not told.
LONG_S = 3600
#: name -> what uvicorn is told: our protocol, which tells who goes away, and others.
TWINS: dict[str, dict[str, Any]] = {
    "ours on uvloop": {"http": Connection, "loop": "uvloop"},
    "ours on asyncio": {"http": Connection, "loop": "asyncio"},
    "httptools": {"http": "httptools", "loop": "uvloop"},
    "h11": {"http": "h11", "loop": "asyncio"},
}


class Server:
    """A server, and its sessions as this process sees them."""

    def __init__(self, registry: Registry, address: tuple[str, int]) -> None:
        self.registry = registry
        self.address = address

    def session(self) -> Session:
        return self.registry.get("default", "s")

    def ask(self, target: str, body: Any = None, *lines: str) -> tuple[int, dict[str, str], Any]:
        """Send one request and return status, headers and JSON."""
        content = b"" if body is None else orjson.dumps(body)
        told = [f"{target} HTTP/1.1", JSON, f"Content-Length: {len(content)}", *lines]
        with Wire(self.address) as wire:
            status, headers, answer = wire.request("\n".join(told), content)
        return status, headers, orjson.loads(answer) if answer else None

    def create(self, **fields: Any) -> None:
        assert self.ask(f"PUT {S}", {**CREATE, **fields})[0] == 201

    def step(self) -> None:
        assert self.ask(f"POST {S}/step", {"grads": GRADS, "return": "none"})[0] == 200

    def waiting(self, *lines: str, method: str = "GET", **query: Any) -> Wire:
        """Return a connection on which a pull waits by now."""
        wire = Wire(self.address)
        watching = self.session().watching
        before = len(watching)
        wire.send(pull(*lines, method=method, **{"wait_s": LONG_S, **query}))
        wait_until(lambda: len(watching) > before, "the waiting")
        return wire


def pull(*lines: str, method: str = "GET", **query: Any) -> bytes:
    target = f"{method} {S}/params?{urlencode(query, doseq=True)} HTTP/1.1"
    return "\r\n".join([target, "Host: x", *lines, "", ""]).encode()


def version_of(answer: tuple[int, dict[str, str], bytes]) -> int:
    status, _, body = answer
    assert status == 200, body
    version: int = orjson.loads(body)["version"]
    return version


@pytest.fixture(params=TWINS)
def server(request: Any) -> Iterator[Server]:
    registry = Registry(MemoryStore())
    try:
        with served(create_app(registry, Settings()), **TWINS[request.param]) as address:
            made = Server(registry, address)
            made.create(ema={})
            yield made
    finally:
        registry.close()


ours = pytest.mark.parametrize("server", ["ours on uvloop"], indirect=True)


def test_a_pull_waits_for_the_version_and_gets_it(server: Server) -> None:
    with server.waiting(min_version=2) as wire:
        server.step()
        assert server.session().watching
        server.step()
        assert version_of(wire.answer()) == 2
        assert not server.session().watching
        # The connection is as good as new.
        wire.send(pull(min_version=1, wait_s=LONG_S))
        assert version_of(wire.answer()) == 2


@ours
def test_whatever_makes_a_version_is_waited_for(server: Server) -> None:
    changes = [
        (f"PUT {S}/params", {"params": CREATE["params"]}),
        (f"POST {S}/rollback", {"version": 0}),
        (f"POST {S}/groups", {"params": {"more": [1.0]}}),
    ]
    for target, body in changes:
        before = server.session().version
        with server.waiting(min_version=before + 1) as wire:
            assert server.ask(target, body)[0] == 200
            assert version_of(wire.answer()) == before + 1


def test_a_version_that_is_there_is_not_waited_for(server: Server) -> None:
    server.step()
    for query in ({}, {"wait_s": 0}, {"wait_s": LONG_S}):
        with Wire(server.address) as wire:
            wire.send(pull(min_version=1, **query))
            assert version_of(wire.answer()) == 1


@ours
@pytest.mark.parametrize(
    ("query", "lines"),
    [
        ({}, []),
        ({"names": "w", "dtype": "float16", "encoding": "base64"}, []),
        ({"weights": "ema"}, [f"Accept: {SAFETENSORS}"]),
        ({"names": ["w", "b"], "encoding": "base64"}, [f"Accept: {SAFETENSORS}"]),
    ],
)
def test_at_the_end_of_the_wait_it_is_304_with_the_etag_of_what_there_is(
    server: Server, query: dict[str, Any], lines: list[str]
) -> None:
    server.step()
    with Wire(server.address) as wire:
        wire.send(pull(*lines, **query))
        current = wire.answer()[1]["etag"]
        for wait in ({"wait_s": 0.05}, {"wait_s": 0}, {}):
            wire.send(pull(*lines, min_version=2, **wait, **query))
            status, headers, body = wire.answer()
            assert (status, headers["etag"], body) == (304, current, b"")
    assert not server.session().watching


@ours
def test_the_etag_decides_once_the_version_is_reached(server: Server) -> None:
    server.step()
    with Wire(server.address) as wire:
        wire.send(pull())
        etag = wire.answer()[1]["etag"]
        wire.send(pull(f"If-None-Match: {etag}", min_version=1, wait_s=LONG_S))
        assert wire.answer()[0] == 304
    with server.waiting(f"If-None-Match: {etag}", min_version=2) as wire:
        server.step()
        assert version_of(wire.answer()) == 2


@ours
def test_a_head_request_waits_as_well(server: Server) -> None:
    with server.waiting(method="HEAD", min_version=1) as wire:
        server.step()
        wire.socket.settimeout(10)
        assert wire.socket.recv(65536).startswith(b"HTTP/1.1 200")


@ours
def test_one_version_and_no_other(server: Server) -> None:
    server.step()
    assert server.ask(f"GET {S}/params?version=1")[2]["version"] == 1
    for query in ("version=0", "version=2", "version=0&min_version=1"):
        status, _, problem = server.ask(f"GET {S}/params?{query}")
        asked = query[len("version=")]
        assert (status, problem["code"], problem["version"]) == (409, "version_conflict", 1)
        assert problem["detail"] == f"version {asked} is asked for, the session's version is 1"
    with server.waiting(min_version=2, version=2) as wire:
        server.step()
        assert version_of(wire.answer()) == 2


@ours
@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ("wait_s=1", "wait_s needs min_version, the version to wait for"),
        ("wait_s=0", "wait_s needs min_version, the version to wait for"),
        (
            "min_version=5&wait_s=3601",
            "query parameter wait_s: input should be less than or equal to 3600, got '3601'",
        ),
        (
            "min_version=5&wait_s=-1",
            "query parameter wait_s: input should be greater than or equal to 0, got '-1'",
        ),
        (
            "min_version=5&wait_s=nan",
            "query parameter wait_s: input should be less than or equal to 3600, got 'nan'",
        ),
        (
            "min_version=-1",
            "query parameter min_version: input should be greater than or equal to 0, got '-1'",
        ),
        (
            "min_version=9&wait_s=3600&weights=best",
            "weights=best: the session keeps no best; create it with best",
        ),
        ("min_version=9&wait_s=3600&names=z", "names: the session has no parameter 'z'"),
    ],
)
def test_what_cannot_be_waited_for_is_refused_at_once(
    server: Server, query: str, sentence: str
) -> None:
    status, _, problem = server.ask(f"GET {S}/params?{query}")
    assert (status, problem["code"], problem["detail"]) == (422, "invalid", sentence)


def test_a_deletion_ends_the_waiting_with_404(server: Server) -> None:
    with server.waiting(min_version=1) as wire:
        assert server.ask(f"DELETE {S}")[0] == 200
        server.create()  # another session, which nobody waited for
        status, _, body = wire.answer()
        assert (status, orjson.loads(body)["code"]) == (404, "session_not_found")


def test_a_client_that_goes_away_is_forgotten(server: Server) -> None:
    with server.waiting(min_version=1) as stays:
        for wire in (server.waiting(min_version=1), server.waiting(min_version=2)):
            wire.socket.close()
        wait_until(lambda: len(server.session().watching) == 1, "the forgetting")
        server.step()
        assert version_of(stays.answer()) == 1


@ours
def test_many_who_wait_together_are_more_than_a_session_has_room_for(server: Server) -> None:
    """Jobs of a session that wait are limited; who waits for a version is no such job."""
    session = server.session()
    session._turn._limit = 3
    waiting = [server.waiting(min_version=1) for _ in range(30)]
    server.step()
    assert [version_of(wire.answer()) for wire in waiting] == [1] * 30
    for wire in waiting:
        wire.socket.close()


@ours
def test_who_waits_uses_the_session(server: Server) -> None:
    status, *_ = server.ask(f"PATCH {S}", {"ttl_s": 1.0})
    assert status == 200
    with server.waiting(min_version=1) as wire:
        session = server.session()
        wait_until(lambda: time.monotonic() > session.used_at + 1.5)
        server.registry._expiry._sweep()
        server.step()
        assert version_of(wire.answer()) == 1
    wait_until(lambda: session.closed, "the end of its time")


def test_a_session_is_read_back_before_somebody_waits_for_it(tmp_path: Path) -> None:
    def registry() -> Registry:
        return Registry(open_store(url=None, data_dir=tmp_path, files=None))

    first = registry()
    with asking(create_app(first, Settings())) as api:
        assert api.put(S, json=CREATE).status_code == 201
    first.close()
    second = registry()
    try:
        with served(create_app(second, Settings())) as address:
            server = Server(second, address)
            assert server.session().cold
            with server.waiting(min_version=1) as wire:
                assert not server.session().cold
                server.step()
                assert version_of(wire.answer()) == 1
    finally:
        second.close()


# --- the server stops ----------------------------------------------------------------------------


def test_a_stop_answers_who_waits_and_lets_nobody_wait_any_more(app: Any, registry: Any) -> None:
    async def ask(client: httpx.AsyncClient, query: str = "min_version=1&wait_s=3600") -> Any:
        return await client.get(f"{S}/params?{query}")

    async def whole() -> None:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            assert (await client.put(S, json=CREATE)).status_code == 201
            current = (await client.get(f"{S}/params")).headers["etag"]
            waiting = [asyncio.create_task(ask(client)) for _ in range(3)]
            session = registry.get("default", "s")
            while len(session.watching) < 3:
                await asyncio.sleep(0)
            app.state.drain.begin()
            assert app.state.drain.busy
            for answer in await asyncio.wait_for(asyncio.gather(*waiting), 10):
                assert (answer.status_code, answer.headers["etag"]) == (304, current)
            assert not app.state.drain.busy
            late = await ask(client)
            assert (late.status_code, late.json()["code"]) == (503, "unavailable")
            assert late.headers["retry-after"] == "1"
            # Who does not wait is answered to the end.
            assert (await ask(client, "min_version=0&wait_s=3600")).status_code == 200
            assert (await ask(client, "min_version=1")).status_code == 304

    asyncio.run(whole())


def test_a_version_that_is_made_while_a_pull_begins_to_wait_is_not_missed(
    app: Any, registry: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = Watching.add

    def too_late(self: Watching, version: int, tell: Any, back: Any) -> Any:
        local.put_params(registry.get("default", "s"), NEW).result(10)
        return add(self, version, tell, back)

    monkeypatch.setattr(Watching, "add", too_late)

    async def whole() -> None:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            assert (await client.put(S, json=CREATE)).status_code == 201
            pull = client.get(f"{S}/params?min_version=1&wait_s=3600")
            assert (await asyncio.wait_for(pull, 10)).json()["version"] == 1

    asyncio.run(whole())


# --- what is shared ------------------------------------------------------------------------------


def test_a_job_that_has_ended_is_nobodys_any_more(registry: Any) -> None:
    """Also while the event loop has not heard of its end: who asks now may know more."""
    session = local.create(registry, {"optimizer": "SGD"}, NEW)

    async def whole() -> None:
        shared = Shared()
        first, second = Future[str](), Future[str]()
        asks = [asyncio.create_task(shared.job(session, "x", lambda: first)) for _ in range(2)]
        await asyncio.sleep(0)
        later = asyncio.create_task(shared.job(session, "x", lambda: second))
        first.set_result("first")  # the loop hears of it after ``later`` has asked
        assert await asyncio.gather(*asks) == ["first", "first"]
        second.set_result("second")
        assert await later == "second"

    asyncio.run(whole())


def test_pulls_that_come_together_are_one_job_and_miss_nothing_that_was_answered(
    app: Any, registry: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: list[Future[Any]] = []
    asked: list[str] = []
    published, shared = Session.published, Shared.job

    def counted(self: Session, weights: str = "live") -> Future[Any]:
        jobs.append(published(self, weights))
        return jobs[-1]

    def noted(self: Shared, session: Session, name: str, begin: Any) -> Any:
        asked.append(name)
        return shared(self, session, name, begin)

    monkeypatch.setattr(Session, "published", counted)
    monkeypatch.setattr(Shared, "job", noted)

    async def whole() -> None:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            assert (await client.put(S, json=CREATE)).status_code == 201
            session = registry.get("default", "s")
            let_go: Future[None] = Future()
            session.in_turn(let_go.result)  # the pulls queue behind it
            pulls = [asyncio.create_task(client.get(f"{S}/params")) for _ in range(20)]
            while len(asked) < len(pulls):
                await asyncio.sleep(0)
            pulls[3].cancel()
            let_go.set_result(None)
            answers = await asyncio.gather(*pulls)
            assert answers.pop(3).status_code == 503
            assert {answer.json()["version"] for answer in answers} == {0}
            assert len(jobs) == 1
            for version in range(1, 20):
                step = client.post(f"{S}/step", json={"grads": GRADS})
                others = [client.get(f"{S}/params") for _ in range(3)]
                reply = (await asyncio.gather(step, *others))[0]
                assert reply.json()["version"] == version
                assert (await client.get(f"{S}/params")).json()["version"] == version
            assert not app.state.shared._under_way

    asyncio.run(whole())
