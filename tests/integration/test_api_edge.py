"""Refusals over real sockets: the answer arrives, and a kept connection stays usable."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import httpx
import orjson
import pytest
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response

from optserve.api import edge
from optserve.api.bodies import Announced, Body, body_kind
from optserve.api.edge import Edge
from optserve.settings import Settings
from optserve_client import errors
from tests.integration.api_uvicorn import Wire, served

LIMIT = 1_000_000


async def _to_edge(request: Request, exc: Exception) -> NoReturn:
    raise exc


def tiny(**settings: Any) -> FastAPI:
    """An app with one route that reads its body and one for each way to fail."""
    app = FastAPI(
        openapi_url=None,
        middleware=[Middleware(Edge)],
        exception_handlers={HTTPException: _to_edge},
    )
    app.state.settings = Settings(max_body_bytes=LIMIT, max_json_bytes=LIMIT, **settings)

    async def read(request: Request) -> Response:
        body_kind(request)
        return Response(str(len(await Body(request, LIMIT).read())))

    async def refuse(request: Request) -> Response:
        raise errors.Invalid("lr must be > 0, got -1", field="lr")

    async def crash(request: Request) -> Response:
        raise ZeroDivisionError("a secret of the server")

    async def no_memory(request: Request) -> Response:
        raise MemoryError

    async def later(request: Request) -> Response:
        raise errors.Unavailable("1000 requests wait", retry_after=7)

    async def surrogate(request: Request) -> Response:
        raise errors.Invalid("name '\ud800' is not UTF-8")

    async def ignore(request: Request) -> Response:
        return Response()

    for function in (read, ignore, refuse, crash, no_memory, later, surrogate):
        app.add_api_route(
            f"/{function.__name__}", function, methods=["GET", "POST"], response_model=None
        )
    app.add_api_route("/read", read, methods=["PUT"], response_model=None)
    return app


@pytest.fixture(scope="module")
def address() -> Iterator[tuple[str, int]]:
    with served(tiny(body_timeout_s=0.3)) as where:
        yield where


@pytest.fixture
def wire(address: tuple[str, int]) -> Iterator[Wire]:
    with Wire(address) as connection:
        yield connection


def problem(body: bytes) -> dict[str, Any]:
    document = orjson.loads(body)
    assert isinstance(document, dict)
    return document


OCTETS = "Content-Type: application/vnd.safetensors"


def post_read(*headers: str) -> bytes:
    """Return the head of a POST whose body the app reads."""
    return "\r\n".join(["POST /read HTTP/1.1", "Host: x", OCTETS, *headers, "", ""]).encode()


def test_a_refusal_is_a_problem_document(wire: Wire) -> None:
    status, headers, body = wire.request("GET /refuse HTTP/1.1")
    assert (status, headers["content-type"]) == (422, "application/problem+json")
    assert problem(body) == {
        "type": "urn:optserve:error:invalid",
        "title": "A field has a value that cannot be used.",
        "status": 422,
        "code": "invalid",
        "detail": "lr must be > 0, got -1",
        "field": "lr",
    }


def test_an_unexpected_exception_is_500_and_tells_nothing(wire: Wire) -> None:
    status, headers, body = wire.request("GET /crash HTTP/1.1")
    assert (status, headers["content-type"]) == (500, "application/problem+json")
    assert problem(body)["code"] == "internal"
    assert problem(body)["incident"] in problem(body)["detail"]
    assert b"secret" not in body
    assert b"ZeroDivisionError" not in body
    assert wire.request("GET /refuse HTTP/1.1")[0] == 422


@pytest.mark.parametrize(("path", "wait"), [("/later", "7"), ("/no_memory", "1")])
def test_unavailable_says_when_to_come_again(wire: Wire, path: str, wait: str) -> None:
    status, headers, body = wire.request(f"GET {path} HTTP/1.1")
    assert (status, headers["retry-after"]) == (503, wait)
    assert problem(body)["code"] == "unavailable"


def test_what_cannot_be_utf8_is_quoted_with_an_escape(wire: Wire) -> None:
    status, _, body = wire.request("GET /surrogate HTTP/1.1")
    assert (status, b"\\ud800" in body) == (422, True)


def test_an_unknown_path_is_404_and_names_it(wire: Wire) -> None:
    status, _, body = wire.request("GET /nowhere HTTP/1.1")
    assert (status, problem(body)["code"]) == (404, "not_found")
    assert problem(body)["detail"] == "there is nothing at '/nowhere'"


def test_a_wrong_method_is_405_and_lists_those_of_all_routes_at_the_path(wire: Wire) -> None:
    status, headers, body = wire.request("DELETE /read HTTP/1.1")
    assert (status, headers["allow"]) == (405, "GET, HEAD, POST, PUT")
    assert problem(body)["detail"] == ("DELETE is not possible here; allowed: GET, HEAD, POST, PUT")


def test_head_has_the_headers_of_get_and_no_body(wire: Wire) -> None:
    wire.send(b"HEAD /read HTTP/1.1\r\nHost: x\r\n\r\n")
    assert b"content-length: 1\r\n" in wire.socket.recv(65536).lower()
    status, _, body = wire.request("GET /read HTTP/1.1")
    assert (status, body) == (200, b"0")


@pytest.mark.parametrize("head", ["Content-Length: 5", "Content-Length: 3"])
def test_a_body_is_read_whole(wire: Wire, head: str) -> None:
    body = b"x" * int(head.split()[-1])
    assert (
        wire.request(f"POST /read HTTP/1.1\n{OCTETS}\n{head}", body)[2] == str(len(body)).encode()
    )


def test_a_body_in_chunks_is_read_whole(wire: Wire) -> None:
    head = f"POST /read HTTP/1.1\n{OCTETS}\nTransfer-Encoding: chunked"
    assert wire.request(head, b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n")[2] == b"5"


def test_a_body_that_trickles_is_read_whole(wire: Wire) -> None:
    wire.send(post_read("Content-Length: 6"))
    for _ in range(3):
        time.sleep(0.05)
        wire.send(b"ab")
    assert wire.answer()[2] == b"6"


def test_too_large_is_refused_before_the_body_is_sent(wire: Wire) -> None:
    head = f"POST /read HTTP/1.1\n{OCTETS}\nContent-Length: 5000000\nExpect: 100-continue"
    status, headers, body = wire.request(head)
    assert (status, headers["connection"]) == (413, "close")
    assert problem(body)["detail"] == "the body has 5000000 bytes, the limit is 1000000"
    assert wire.closed()


def test_an_expected_continue_is_sent_when_the_body_is_wanted(wire: Wire) -> None:
    wire.send(post_read("Content-Length: 2", "Expect: 100-continue"))
    assert wire.socket.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
    wire.send(b"ab")
    assert wire.answer()[2] == b"2"


def test_a_client_that_sends_it_all_anyway_still_reads_the_refusal(wire: Wire) -> None:
    size = 20_000_000
    wire.send(
        f"POST /read HTTP/1.1\r\nHost: x\r\n{OCTETS}\r\nContent-Length: {size}\r\n\r\n".encode()
    )
    wire.send(bytes(size))
    status, headers, _ = wire.answer()
    assert (status, headers["connection"]) == (413, "close")
    assert wire.closed()


def test_an_announced_body_takes_up_memory_as_it_arrives() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = resident()
    sinks = [Announced(2**28) for _ in range(4)]
    for sink in sinks:
        sink.room()[:3] = b"abc"
        sink.filled(3)
        sink.feed(b"de")
    assert resident() - before < 2**26
    assert all(bytes(sink.whole[:5]) == b"abcde" and sink.nbytes == 5 for sink in sinks)


def test_a_chunked_body_is_refused_when_it_passes_the_limit(wire: Wire) -> None:
    wire.send(post_read("Transfer-Encoding: chunked"))
    for _ in range(3):
        wire.send(b"%x\r\n" % 400_000 + bytes(400_000) + b"\r\n")
    status, headers, body = wire.answer()  # before the end of the body, which never comes
    assert (status, headers["connection"]) == (413, "close")
    assert problem(body)["detail"] == "the body has more than 1000000 bytes, which is the limit"


def test_after_a_refusal_with_a_small_unread_body_the_connection_is_kept(wire: Wire) -> None:
    for _ in range(3):
        status, headers, _ = wire.request("POST /refuse HTTP/1.1\nContent-Length: 9", b"GET / HTT")
        assert (status, "connection" in headers) == (422, False)
    assert wire.request("GET /read HTTP/1.1")[2] == b"0"


def test_after_a_refusal_with_a_large_unread_body_the_connection_is_closed(wire: Wire) -> None:
    size = 300_000
    status, headers, _ = wire.request(f"POST /refuse HTTP/1.1\nContent-Length: {size}", bytes(size))
    assert (status, headers["connection"]) == (422, "close")
    assert wire.closed()


def test_an_answer_to_an_unread_body_closes_the_connection(wire: Wire) -> None:
    wire.send(b"POST /ignore HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nabc")
    status, headers, _ = wire.answer()
    assert (status, headers["connection"]) == (200, "close")
    assert wire.closed()


def test_without_a_body_nothing_is_closed(wire: Wire) -> None:
    for _ in range(2):
        status, headers, _ = wire.request("POST /ignore HTTP/1.1\nContent-Length: 0")
        assert (status, "connection" in headers) == (200, False)


def test_silence_inside_a_body_ends_in_408(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge, "LINGER_S", 0.2)
    monkeypatch.setattr(edge, "DRAIN_S", 0.1)
    wire.send(
        f"POST /read HTTP/1.1\r\nHost: x\r\n{OCTETS}\r\nContent-Length: 9\r\n\r\nabc".encode()
    )
    status, headers, body = wire.answer()
    assert (status, headers["connection"]) == (408, "close")
    assert problem(body)["detail"] == "nothing arrived for 0.3 s, after 3 bytes of 9"
    assert wire.closed()


def test_a_body_below_the_least_rate_ends_in_408(
    wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edge, "LINGER_S", 0.1)
    wire.send(post_read("Content-Length: 900000"))
    begun = time.monotonic()
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        while time.monotonic() < begun + 8:
            wire.send(b"x")
            time.sleep(0.1)
    assert time.monotonic() - begun < 5


def test_a_client_that_goes_away_is_no_error(
    address: tuple[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    with Wire(address) as gone:
        gone.send(
            f"POST /read HTTP/1.1\r\nHost: x\r\n{OCTETS}\r\nContent-Length: 9\r\n\r\nabc".encode()
        )
        time.sleep(0.05)
    with Wire(address) as wire:
        assert wire.request("GET /read HTTP/1.1")[2] == b"0"
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


@pytest.mark.parametrize(
    ("headers", "status", "sentence"),
    [
        ({}, 415, "Content-Type is missing; it must be application/json or application/vnd.safet"),
        (
            {"Content-Type": "text/plain"},
            415,
            "must be application/json or application/vnd.safetensors, got 'text/plain'",
        ),
        (
            {"Content-Type": "application/json; charset=latin-1"},
            415,
            "charset must be utf-8, got 'latin-1'",
        ),
        (
            {"Content-Type": "application/json", "Content-Encoding": "br"},
            415,
            "Content-Encoding must be zstd, gzip or identity, got 'br'",
        ),
        ({"Content-Type": 'application/JSON; charset="UTF-8"'}, 200, ""),
        ({"Content-Type": "application/json", "Content-Encoding": "identity"}, 200, ""),
    ],
)
def test_the_media_type_of_a_body_decides_whether_it_is_read(
    address: tuple[str, int], headers: dict[str, str], status: int, sentence: str
) -> None:
    host, port = address
    reply = httpx.post(f"http://{host}:{port}/read", content=b"{}", headers=headers)
    assert reply.status_code == status
    if sentence:
        assert reply.json()["code"] == "unsupported_media_type"
        assert sentence in reply.json()["detail"]
