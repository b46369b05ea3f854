"""A client that compresses: what goes out, what comes in, and what that changes of a repeat."""

from __future__ import annotations

import asyncio
import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest

from optserve.api.codings import zstd
from optserve_client import AsyncClient, Client, Retry, errors, wire
from optserve_client._codings import LEAST_BYTES, Coding
from optserve_client._messages import Answer, Request
from tests.unit.test_protocol_clients import STEP, Wire, frame

QUICK = Retry(retries=2, first_s=0.0, longest_s=0.0)
both = pytest.mark.parametrize("coding", ["gzip", "zstd"])
LARGE = np.zeros(LEAST_BYTES, np.float32)


def compressed(coding: str, data: bytes) -> bytes:
    return gzip.compress(data) if coding == "gzip" else zstd.compress(data)


def plain(coding: str, data: bytes) -> bytes:
    read: Any = gzip.decompress if coding == "gzip" else zstd.decompress
    return read(data)


def client(net: Callable[..., Any], coding: Any, **options: Any) -> Client:
    transport = httpx.MockTransport(net)
    return Client("http://test", transport=transport, encoding=coding, retries=QUICK, **options)


def coded(response: httpx.Response, coding: str, body: bytes | None = None) -> httpx.Response:
    """Return ``response`` as a server sends it in a coding; httpx is not to look into it."""
    content = compressed(coding, response.content) if body is None else body
    headers = {**response.headers, "content-encoding": coding, "content-length": str(len(content))}
    return httpx.Response(response.status_code, headers=headers, stream=httpx.ByteStream(content))


# --- what goes out -------------------------------------------------------------------------------


@both
def test_large_bodies_are_compressed_and_small_ones_are_not(coding: str) -> None:
    net = Wire(frame(STEP), frame(STEP))
    with client(net, coding) as c:
        c.session("s").step({"w": np.ones(3, np.float32)}, returns="none")
        c.session("s").step({"w": LARGE}, returns="none")
    small, large = net.requests
    assert "content-encoding" not in small.headers
    assert large.headers["content-encoding"] == coding
    assert len(large.content) == int(large.headers["content-length"]) < LARGE.nbytes // 10
    tensors, metadata = wire.decode(plain(coding, large.content))
    np.testing.assert_array_equal(tensors["grad/w"], LARGE)
    assert json.loads(metadata[wire.META_KEY])["seq"] == 2
    assert [r.headers["accept-encoding"] for r in net.requests] == [coding, coding]


def test_without_an_encoding_nothing_is_compressed() -> None:
    net = Wire(frame(STEP))
    with client(net, None) as c:
        c.session("s").step({"w": LARGE}, returns="none")
    assert "content-encoding" not in net.requests[0].headers
    assert net.requests[0].headers["accept-encoding"] == "identity"


@both
def test_what_does_not_shrink_is_sent_as_it_is(coding: str) -> None:
    noise = np.frombuffer(np.random.default_rng(0).bytes(4 * LEAST_BYTES), np.uint8)
    request = Request(method="PUT", target="/", headers={}, pieces=(noise.data,))
    assert Coding(coding).coded(request) is request


@both
def test_a_body_in_many_pieces_is_one_stream(coding: str) -> None:
    pieces = (b"head", bytes(3_000_000), b"middle" * 20_000, b"", b"end")
    request = Request(method="PUT", target="/", headers={"A": "b"}, pieces=pieces)
    made = Coding(coding).coded(request)
    assert plain(coding, b"".join(made.pieces)) == b"".join(pieces)
    length = str(sum(map(len, made.pieces)))
    assert made.headers == {"A": "b", "Content-Encoding": coding, "Content-Length": length}


@both
def test_a_repeat_has_the_same_bytes(coding: str) -> None:
    net = Wire(httpx.ReadError("lost"), httpx.ReadError("lost"), frame(STEP))
    with client(net, coding) as c:
        c.session("s").step({"w": LARGE}, returns="none")
    assert len({request.content for request in net.requests}) == 1


@both
def test_a_call_again_after_no_answer_is_the_same_request(coding: str) -> None:
    net = Wire(*[httpx.ReadError("lost")] * 3, frame({**STEP, "duplicate": True}))
    with client(net, coding) as c:
        with pytest.raises(errors.TransportError):
            c.session("s").step({"w": LARGE}, returns="none")
        assert c.session("s").step({"w": LARGE.copy()}, returns="none").duplicate
    assert len({request.content for request in net.requests}) == 1


# --- what comes in -------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("size", [3, LEAST_BYTES])
def test_an_answer_is_decompressed_into_arrays_that_can_be_written(coding: str, size: int) -> None:
    params = np.arange(size, dtype=np.float32)
    net = Wire(coded(frame(STEP, w=params), coding))
    with client(net, coding) as c:
        got: Any = c.session("s").step({"w": np.ones(size, np.float32)}).params
    np.testing.assert_array_equal(got["w"], params)
    got["w"][0] = 7


@both
def test_an_answer_in_several_streams_is_whole(coding: str) -> None:
    body = frame(STEP, w=LARGE).content
    several = compressed(coding, body[:999]) + compressed(coding, body[999:])
    net = Wire(coded(frame(STEP), coding, several))
    with client(net, coding) as c:
        assert c.session("s").step({"w": LARGE}).params is not None


@both
def test_an_answer_that_is_not_compressed_is_taken_as_it_is(coding: str) -> None:
    with client(Wire(frame(STEP, w=LARGE)), coding) as c:
        assert c.session("s").step({"w": LARGE}).params is not None


@both
def test_an_error_may_be_compressed_too(coding: str) -> None:
    problem = httpx.Response(409, json=errors.VersionConflict("too late", version=7).problem())
    with (
        client(Wire(coded(problem, coding)), coding) as c,
        pytest.raises(errors.VersionConflict, match="too late") as refused,
    ):
        c.session("s").step({"w": LARGE})
    assert refused.value.extra == {"version": 7}


@both
@pytest.mark.parametrize("spoil", ["cut", "changed", "followed"])
def test_an_answer_that_cannot_be_read_is_asked_for_again(coding: str, spoil: str) -> None:
    whole = compressed(coding, frame(STEP, w=LARGE).content)
    bad = {"cut": whole[:-3], "changed": b"x" + whole[1:], "followed": whole + b"xyz"}[spoil]
    net = Wire(coded(frame(STEP), coding, bad), frame({**STEP, "duplicate": True}))
    with client(net, coding) as c:
        assert c.session("s").step({"w": LARGE}, returns="none").duplicate
    net = Wire(*[coded(frame(STEP), coding, bad) for _ in range(3)])
    sentence = f"the answer is no {coding} stream"
    with client(net, coding) as c, pytest.raises(errors.TransportError, match=sentence):
        c.session("s").step({"w": LARGE})


def test_an_empty_answer_is_empty() -> None:
    headers = {"content-encoding": "gzip"}
    answer = Answer(status=204, headers=headers, body=memoryview(b""))
    assert bytes(Coding("gzip").plain(answer).body) == b""


@both
def test_the_asynchronous_client_does_the_same(coding: str) -> None:
    async def run() -> Any:
        net = Wire(coded(frame(STEP, w=LARGE), coding), coded(frame(STEP, w=LARGE[:3]), coding))
        transport = httpx.MockTransport(net)
        async with AsyncClient("http://test", transport=transport, encoding=coding) as c:  # type: ignore[arg-type]
            session = c.session("s")
            got = [(await session.step({"w": w})).params for w in (LARGE, LARGE[:3])]
        assert net.requests[0].headers["content-encoding"] == coding
        return got

    one, two = asyncio.run(run())
    assert (one["w"].shape, two["w"].shape) == (LARGE.shape, (3,))


# --- arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize("coding", ["br", "", "identity", 3])
def test_an_unknown_encoding_is_refused(coding: Any) -> None:
    with pytest.raises(errors.Invalid, match="encoding must be 'gzip', 'zstd' or None, got"):
        Client("http://test", encoding=coding)


def test_the_callers_own_header_wins() -> None:
    net = Wire(frame(STEP))
    with client(net, "gzip", headers={"Accept-Encoding": "identity"}) as c:
        c.session("s").step({"w": LARGE})
    assert net.requests[0].headers["accept-encoding"] == "identity"


def test_without_its_package_zstd_is_refused_with_the_cure() -> None:
    program = """
import sys
sys.modules["backports"] = sys.modules["compression"] = None
from optserve_client import Client
Client("http://test", encoding="gzip").close()
try:
    Client("http://test", encoding="zstd")
except ModuleNotFoundError as exc:
    print(exc)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    sentence = "encoding='zstd' needs a package: pip install 'optserve-client[zstd]'"
    assert done.stdout.strip() == sentence, done.stderr
