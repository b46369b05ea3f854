"""Compressed bodies and answers on every route that has some, over ASGI and over real sockets."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import orjson
import pytest

from optserve.api import bodies, coded
from optserve.api.app import create_app
from optserve.api.codings import CODINGS, Decoding, zstd
from optserve.api.connection import Connection, Exchange
from optserve.sessions.intake import StepIntake
from optserve.sessions.registry import Registry
from optserve.settings import Settings
from optserve.store.memory import MemoryStore
from optserve_client import wire
from optserve_client.wire import SAFETENSORS
from tests.integration.api_client import (
    BINARY,
    CREATE,
    GRADS,
    JSON,
    Api,
    asking,
    frame,
    prefixed,
    unframe,
)
from tests.integration.api_uvicorn import Wire, served

N = 400_000
both = pytest.mark.parametrize("coding", CODINGS)


def compressed(coding: str, data: bytes) -> bytes:
    return gzip.compress(data, 1) if coding == "gzip" else zstd.compress(data, 1)


def plain(coding: str, data: bytes) -> bytes:
    read: Any = gzip.decompress if coding == "gzip" else zstd.decompress
    return read(data)


@pytest.fixture
def api(app: Any) -> Iterator[Api]:
    with asking(app) as api:
        yield api


def send(api: Api, method: str, url: str, content: bytes, coding: str, **headers: str) -> Any:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return api.request(
        method,
        url,
        content=compressed(coding, content),
        headers={**named, "content-encoding": coding},
    )


def as_json(api: Api, method: str, url: str, body: Any, coding: str) -> Any:
    return send(api, method, url, orjson.dumps(body), coding, **JSON)


# --- bodies --------------------------------------------------------------------------------------


@both
def test_every_route_that_takes_a_body_takes_a_compressed_one(api: Api, coding: str) -> None:
    url = "/v1/sessions/s"
    grads = prefixed("grad", GRADS)
    replies = [
        as_json(api, "PUT", url, CREATE, coding),
        as_json(api, "POST", f"{url}/step", {"grads": GRADS}, coding),
        send(api, "POST", f"{url}/step", frame(grads, {}), coding, **BINARY),
        as_json(api, "POST", "/v1/step", {"id": "s", "grads": GRADS}, coding),
        send(api, "POST", "/step", frame(grads, {"id": "s"}), coding, **BINARY),
        as_json(api, "PATCH", url, {"notes": "n"}, coding),
        as_json(api, "PATCH", f"{url}/groups/0", {"lr": 0.5}, coding),
        as_json(api, "PUT", f"{url}/params", {"params": CREATE["params"]}, coding),
        as_json(api, "POST", f"{url}/groups", {"params": {"n": [1]}}, coding),
        as_json(api, "PUT", f"{url}/scheduler", {"name": "StepLR", "step_size": 1}, coding),
        as_json(api, "PUT", f"{url}/metrics", {"version": 1, "metrics": {"a": 1}}, coding),
        as_json(api, "POST", f"{url}/fork", {"id": "t"}, coding),
        send(api, "PUT", f"{url}/state", api.get(f"{url}/state").content, coding, **BINARY),
    ]
    assert [reply.status_code for reply in replies] == [201, *[200] * 10, 201, 200]
    assert api.get(f"{url}/params").json()["params"] == {**CREATE["params"], "n": [1]}


@both
@pytest.mark.parametrize("binary", [False, True])
def test_a_repeat_in_another_coding_is_a_duplicate(api: Api, coding: str, binary: bool) -> None:
    api.put("/v1/sessions/s", json=CREATE)
    fields = {"worker": "w", "seq": 1}
    if binary:
        content, headers = frame(prefixed("grad", GRADS), fields), BINARY
    else:
        content, headers = orjson.dumps({"grads": GRADS, **fields}), JSON
    step = "/v1/sessions/s/step"
    first = send(api, "POST", step, content, coding, **headers).json()
    again = api.post(step, content=content, headers=headers).json()
    other = send(api, "POST", step, content, "gzip", **headers).json()
    assert [r["duplicate"] for r in (first, again, other)] == [False, True, True]
    assert [r["applied_version"] for r in (first, again, other)] == [1, 1, 1]


@both
def test_a_change_repeated_in_another_coding_is_a_duplicate(api: Api, coding: str) -> None:
    api.put("/v1/sessions/s", json=CREATE)
    content = orjson.dumps({"lr": 0.25, "worker": "w", "seq": 1})
    first = api.patch("/v1/sessions/s/groups/0", content=content, headers=JSON)
    again = send(api, "PATCH", "/v1/sessions/s/groups/0", content, coding, **JSON)
    assert [first.json()["duplicate"], again.json()["duplicate"]] == [False, True]


@pytest.mark.parametrize("said", ["br", "deflate", "gzip, zstd"])
def test_an_unknown_coding_is_told_with_those_that_there_are(api: Api, said: str) -> None:
    headers = {**JSON, "content-encoding": said}
    reply = api.post("/v1/sessions", content=b"{}", headers=headers)
    assert reply.status_code == 415
    assert reply.headers["accept-encoding"] == "zstd, gzip, identity"
    other = api.post("/v1/sessions", content=b"{}", headers={"content-type": "text/plain"})
    assert other.status_code == 415
    assert "accept-encoding" not in other.headers


@pytest.fixture
def small(registry: Registry) -> Iterator[Api]:
    """An app that takes JSON of 1,000 bytes and frames of 3,000."""
    with asking(create_app(registry, Settings(max_json_bytes=1000, max_body_bytes=3000))) as api:
        assert api.put("/v1/sessions/s", json=CREATE).status_code == 201
        yield api


def patch(size: int) -> bytes:
    empty = orjson.dumps({"notes": ""})
    return orjson.dumps({"notes": "x" * (size - len(empty))})


@both
def test_the_limit_on_what_is_decompressed_is_exact(small: Api, coding: str) -> None:
    assert len(patch(1000)) == 1000
    assert as_is(send(small, "PATCH", "/v1/sessions/s", patch(1000), coding, **JSON)) == (200, "")
    code, detail = as_is(send(small, "PATCH", "/v1/sessions/s", patch(1001), coding, **JSON))
    assert code == 413
    assert detail == "the body, decompressed, has more than 1000 bytes, which is the limit"


@both
@pytest.mark.parametrize("more", [0, 1])
@pytest.mark.parametrize("url", ["/v1/sessions/s/step", "/step", "/v1/sessions/s/state"])
def test_the_limit_is_as_exact_where_bodies_are_read_as_they_arrive(
    registry: Registry, coding: str, url: str, more: int
) -> None:
    with asking(create_app(registry, Settings())) as api:
        assert api.put("/v1/sessions/s", json=CREATE).status_code == 201
        state = api.get("/v1/sessions/s/state").content
    body = state if url.endswith("state") else frame(prefixed("grad", GRADS), {"id": "s"})
    if url == "/v1/sessions/s/step":
        body = frame(prefixed("grad", GRADS), {})
    method = "PUT" if url.endswith("state") else "POST"
    with asking(create_app(registry, Settings(max_body_bytes=len(body) - more))) as api:
        code, _ = as_is(send(api, method, url, body, coding, **BINARY))
        assert code == (413 if more else 200)
        assert (api.get("/v1/sessions/s").json()["version"] == 0) is bool(more)


def as_is(reply: Any) -> tuple[int, str]:
    return reply.status_code, reply.json().get("detail", "")


@both
def test_a_bomb_is_not_unpacked_beyond_the_limit(
    small: Api, coding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    growing = bodies.Growing.feed

    def feed(self: bodies.Growing, chunk: Any) -> None:
        taken.append(len(chunk))
        growing(self, chunk)

    monkeypatch.setattr(bodies.Growing, "feed", feed)
    bomb = b'{"notes": "' + b"x" * 100_000_000 + b'"}'
    assert as_is(send(small, "PATCH", "/v1/sessions/s", bomb, coding, **JSON))[0] == 413
    assert sum(taken) <= 1000


@both
def test_an_incompressible_body_at_the_limit_is_taken(small: Api, coding: str) -> None:
    noise = np.random.default_rng(0).integers(0x20, 0x7F, 2000, dtype="u1").tobytes()
    body = b'{"notes":"' + noise.replace(b"\\", b"_").replace(b'"', b"_")[:988] + b'"}'
    assert len(body) == 1000
    assert as_is(send(small, "PATCH", "/v1/sessions/s", body, coding, **JSON)) == (200, "")


@both
def test_an_endless_stream_of_nothing_comes_to_an_end(small: Api, coding: str) -> None:
    nothing = compressed(coding, b"")
    endless = nothing * (bodies.SLACK_BYTES // len(nothing) + 200)
    headers = {**JSON, "content-encoding": coding}
    for content in (endless, iter([endless[:50_000], endless[50_000:]])):
        sent: Any = content if isinstance(content, bytes) else _each(content)
        reply = small.patch("/v1/sessions/s", content=sent, headers=headers)
        code, detail = as_is(reply)
        assert (code, detail[:24]) == (413, "the compressed body has ")


async def _each(pieces: Any) -> Any:
    for piece in pieces:
        yield piece


@both
def test_no_more_than_a_piece_is_unpacked_on_the_event_loop(
    api: Api, coding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    main = threading.main_thread()
    here: list[int] = []
    step = Decoding.step

    def watched(self: Decoding, most: int) -> bytes:
        piece = step(self, most)
        if threading.current_thread() is main:
            here.append(len(piece))
        return piece

    monkeypatch.setattr(Decoding, "step", watched)
    tensor = wire.tensor_to_json(np.zeros(N, "<f4"), "base64")
    create = {"optimizer": "SGD", "params": {"w": tensor}}
    assert as_json(api, "PUT", "/v1/sessions/s", create, coding).status_code == 201
    assert len(here) == 1
    assert here[0] <= bodies.AT_ONCE_BYTES


# --- answers -------------------------------------------------------------------------------------


def big(api: Api, name: str = "s", size: int = 20_000) -> str:
    params = {"param/w": np.zeros(size, "<f4"), "param/v": np.arange(size, dtype="<f4")}
    body = frame(params, {"optimizer": {"name": "SGD", "lr": 0.5}})
    reply = api.put(f"/v1/sessions/{name}", content=body, headers=BINARY)
    assert reply.status_code == 201
    return f"/v1/sessions/{name}"


def raw(api: Api, method: str, url: str, **options: Any) -> tuple[Any, bytes]:
    """Return the answer and its bytes as they came, which httpx would decompress."""

    async def run() -> tuple[Any, bytes]:
        async with api._client.stream(method, url, **options) as reply:
            return reply, b"".join([chunk async for chunk in reply.aiter_raw()])

    return api._loop.run_until_complete(run())


@both
@pytest.mark.parametrize("accept", ["application/json", SAFETENSORS])
@pytest.mark.parametrize("size", [2_000, 20_000, N])
def test_what_shrinks_is_answered_in_the_coding_that_is_asked_for(
    api: Api, coding: str, accept: str, size: int
) -> None:
    url = f"{big(api, size=size)}/params"
    whole, want = raw(api, "GET", url, headers={"accept": accept, "accept-encoding": "identity"})
    reply, body = raw(api, "GET", url, headers={"accept": accept, "accept-encoding": coding})
    assert reply.headers["content-encoding"] == coding
    assert reply.headers["content-type"] == whole.headers["content-type"]
    assert reply.headers["vary"] == whole.headers["vary"] == "accept, accept-encoding"
    assert len(body) < 0.75 * len(want)
    assert plain(coding, body) == want
    assert int(reply.headers.get("content-length", len(body))) == len(body)
    assert "content-encoding" not in whole.headers


@pytest.mark.parametrize(
    "said", ["", "identity", "br", "gzip;q=0", "identity, gzip;q=0.5", "gzip;q=nan"]
)
def test_nothing_is_compressed_that_nobody_asked_for(api: Api, said: str) -> None:
    url = big(api)
    reply, body = raw(api, "GET", f"{url}/params", headers={"accept-encoding": said})
    assert "content-encoding" not in reply.headers
    assert int(reply.headers["content-length"]) == len(body)


@both
def test_a_step_is_answered_in_a_coding_too(api: Api, coding: str) -> None:
    url = big(api)
    grads = {"grad/w": np.zeros(20_000, "<f4"), "grad/v": np.ones(20_000, "<f4")}
    headers = {**BINARY, "accept": SAFETENSORS, "accept-encoding": coding}
    reply, body = raw(api, "POST", f"{url}/step", content=frame(grads, {}), headers=headers)
    assert reply.headers["content-encoding"] == coding
    tensors, fields = unframe(plain(coding, body))
    assert fields["version"] == 1
    np.testing.assert_array_equal(tensors["param/v"], np.arange(20_000) - np.float32(0.5))


@pytest.mark.parametrize("path", ["/history", "/history?format=csv", "/history?format=ndjson"])
def test_history_is_compressed_in_every_form(api: Api, path: str) -> None:
    api.put("/v1/sessions/s", json=CREATE)
    for _ in range(250):
        api.post("/v1/sessions/s/step", json={"grads": GRADS, "loss": 0.5, "return": "none"})
    url = f"/v1/sessions/s{path}"
    whole, want = raw(api, "GET", url, headers={"accept-encoding": "identity"})
    reply, body = raw(api, "GET", url, headers={"accept-encoding": "gzip, zstd;q=0.1"})
    assert reply.headers["content-encoding"] == "gzip"
    assert reply.headers["content-type"] == whole.headers["content-type"]
    assert plain("gzip", body) == want


@both
@pytest.mark.parametrize("size", [4_000, N])
def test_what_would_hardly_shrink_is_sent_as_it_is(api: Api, coding: str, size: int) -> None:
    params = {"param/w": np.random.default_rng(0).normal(size=size).astype("<f4")}
    body = frame(params, {"optimizer": "SGD"})
    assert api.put("/v1/sessions/s", content=body, headers=BINARY).status_code == 201
    headers = {"accept": SAFETENSORS, "accept-encoding": coding}
    reply, got = raw(api, "GET", "/v1/sessions/s/params", headers=headers)
    assert "content-encoding" not in reply.headers
    assert int(reply.headers["content-length"]) == len(got)
    np.testing.assert_array_equal(unframe(got)[0]["param/w"], params["param/w"])


def test_small_answers_are_sent_as_they_are(api: Api) -> None:
    api.put("/v1/sessions/s", json=CREATE)
    reply, body = raw(api, "GET", "/v1/sessions/s", headers={"accept-encoding": "gzip"})
    assert len(body) < coded.LEAST_BYTES
    assert "content-encoding" not in reply.headers
    assert "vary" not in reply.headers


@both
@pytest.mark.parametrize("size", [2_000, N])
def test_an_etag_is_of_one_coding_and_each_is_known_again(api: Api, coding: str, size: int) -> None:
    url = big(api, size=size)
    identity = {"accept": SAFETENSORS, "accept-encoding": "identity"}
    squeezed = {"accept": SAFETENSORS, "accept-encoding": coding}
    one = raw(api, "GET", f"{url}/params", headers=identity)[0].headers["etag"]
    two = raw(api, "GET", f"{url}/params", headers=squeezed)[0].headers["etag"]
    assert one != two
    assert not two.startswith("W/")
    for etag in (one, two):
        for headers in (identity, squeezed):
            again = api.get(f"{url}/params", headers={**headers, "if-none-match": etag})
            assert (again.status_code, again.headers["etag"]) == (304, etag)
            assert again.headers["vary"] == "accept, accept-encoding"
    other = api.get(f"{url}/params", headers={"accept": "application/json", "if-none-match": two})
    assert other.status_code == 200
    body = frame({"param/w": np.ones(size, "<f4"), "param/v": np.ones(size, "<f4")}, {})
    changed = api.put(f"{url}/params", content=body, headers={**BINARY, "if-match": two})
    assert changed.status_code == 200, changed.text
    stale = api.put(f"{url}/params", content=body, headers={**BINARY, "if-match": two})
    assert stale.status_code == 412


@both
@pytest.mark.parametrize("size", [2_000, N])
def test_head_has_the_headers_of_get_and_no_body(api: Api, coding: str, size: int) -> None:
    url = f"{big(api, size=size)}/params"
    got = raw(api, "GET", url, headers={"accept-encoding": coding})[0].headers
    reply, body = raw(api, "HEAD", url, headers={"accept-encoding": coding})
    assert body == b""
    assert dict(reply.headers) == dict(got)


# --- over real sockets ---------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["connection", "h11"])
def address(request: pytest.FixtureRequest) -> Iterator[tuple[str, int]]:
    registry = Registry(MemoryStore())
    settings = Settings(reply_timeout_s=0.5, body_timeout_s=0.5, body_min_rate_bytes_s=0)
    http: Any = Connection if request.param == "connection" else "h11"
    try:
        with served(create_app(registry, settings), http=http) as address:
            for name, size in (("s", 5 * N), ("slow", 40 * N)):
                params = {"param/w": np.zeros(size, "<f4")}
                body = frame(params, {"optimizer": {"name": "SGD", "lr": 1.0}})
                with Wire(address) as talk:
                    assert talk.request(head("PUT", f"/v1/sessions/{name}", body), body)[0] == 201
            yield address
    finally:
        registry.close()


def head(method: str, target: str, body: bytes = b"", **headers: str) -> str:
    named = {"Content-Type": SAFETENSORS, "Content-Length": str(len(body))} if body else {}
    named |= {name.replace("_", "-"): value for name, value in headers.items()}
    return "\n".join([f"{method} {target} HTTP/1.1", *(f"{k}: {v}" for k, v in named.items())])


def chunks(talk: Wire) -> bytes:
    """Read the body of an answer that comes in chunks."""
    body = b""
    while True:
        while b"\r\n" not in talk._left:
            talk._more()
        line, _, talk._left = talk._left.partition(b"\r\n")
        length = int(line, 16)
        while len(talk._left) < length + 2:
            talk._more()
        body, talk._left = body + talk._left[:length], talk._left[length + 2 :]
        if not length:
            return body


@both
def test_large_bodies_and_answers_go_through_a_connection_that_stays(
    address: tuple[str, int], coding: str
) -> None:
    grad = np.random.default_rng(0).integers(-3, 4, 5 * N).astype("<f4")
    body = compressed(coding, frame({"grad/w": grad}, {"worker": coding, "seq": 1}))
    assert len(body) > 2 * bodies.LENT_BYTES
    headers = {"accept": SAFETENSORS, "content_encoding": coding, "accept_encoding": coding}
    with Wire(address) as talk:
        pulled = talk.request(head("GET", "/v1/sessions/s/params", accept=SAFETENSORS))
        before, _ = unframe(pulled[2])
        for duplicate in (False, True):
            got = talk.request(head("POST", "/v1/sessions/s/step", body, **headers), body)[1]
            assert (got["content-encoding"], got["transfer-encoding"]) == (coding, "chunked")
            tensors, fields = unframe(plain(coding, chunks(talk)))
            assert fields["duplicate"] is duplicate
            np.testing.assert_array_equal(tensors["param/w"], before["param/w"] - grad)
        assert talk.request("GET /healthz HTTP/1.1")[0] == 200


@both
def test_a_compressed_body_must_keep_coming(address: tuple[str, int], coding: str) -> None:
    grad = np.random.default_rng(0).normal(size=5 * N).astype("<f4")
    body = compressed(coding, frame({"grad/w": grad}, {}))
    with Wire(address) as talk:
        status, _, answered = talk.request(
            head("POST", "/v1/sessions/s/step", body, content_encoding=coding), body[:300_000]
        )
    assert status == 408, answered
    assert b"nothing arrived for 0.5 s, after 300000 bytes of" in answered


@pytest.mark.parametrize("address", ["connection"], indirect=True)
def test_an_answer_that_nobody_takes_is_given_up(
    address: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    given_up = threading.Event()
    give_up = Exchange.give_up
    monkeypatch.setattr(Exchange, "give_up", lambda self, why: give_up(self, why) or given_up.set())
    noise = np.random.default_rng(0).integers(0, 2**16, 40 * N, dtype="<u4").astype("<f4")
    body = frame({"param/w": noise}, {})
    with Wire(address) as talk:
        assert talk.request(head("PUT", "/v1/sessions/slow/params", body), body)[0] == 200
        talk.send(
            f"GET /v1/sessions/slow/params HTTP/1.1\r\nHost: x\r\nAccept: {SAFETENSORS}\r\n"
            "Accept-Encoding: zstd\r\n\r\n".encode()
        )
        assert given_up.wait(20)
    with Wire(address) as talk:
        assert talk.request("GET /healthz HTTP/1.1")[0] == 200


def test_who_knows_only_http_1_0_gets_no_coding(address: tuple[str, int]) -> None:
    with Wire(address) as talk:
        status, headers, body = talk.request(
            "GET /v1/sessions/s/params HTTP/1.0\nAccept-Encoding: gzip\nAccept: " + SAFETENSORS
        )
    assert status == 200
    assert "content-encoding" not in headers
    assert int(headers["content-length"]) == len(body)


def test_an_intake_that_refuses_ends_a_compressed_body(
    address: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    aborted: list[StepIntake] = []
    abort = StepIntake.abort
    monkeypatch.setattr(StepIntake, "abort", lambda self: aborted.append(self) or abort(self))
    body = gzip.compress(frame({"grad/x": np.zeros(5 * N, "<f4")}, {}), 1)
    with Wire(address) as talk:
        status, _, answered = talk.request(
            head("POST", "/v1/sessions/s/step", body, content_encoding="gzip"), body
        )
        assert (status, b"unknown parameter 'x'" in answered) == (422, True)
        assert talk.request("GET /healthz HTTP/1.1")[0] == 200
    assert aborted
