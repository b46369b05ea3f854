"""Steps over real sockets: bodies in pieces, bodies cut off, callers that do not wait."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import orjson
import pytest

from optserve_client.wire import SAFETENSORS
from tests.integration.api_client import CREATE, GRADS, frame, prefixed, unframe
from tests.integration.api_uvicorn import Wire, served
from tests.waiting import wait_until

STEP = "/v1/sessions/s/step"


@pytest.fixture
def address(app: Any) -> Iterator[tuple[str, int]]:
    with served(app) as where:
        reply = httpx.put(f"http://{where[0]}:{where[1]}/v1/sessions/s", json=CREATE)
        assert reply.status_code == 201
        yield where


def version(address: tuple[str, int]) -> int:
    with Wire(address) as wire:
        document = orjson.loads(wire.request("GET /v1/sessions/s HTTP/1.1")[2])
        return int(document["version"])


def step_head(kind: str, length: int) -> bytes:
    lines = [f"POST {STEP} HTTP/1.1", "Host: x", f"Content-Type: {kind}"]
    return "\r\n".join([*lines, f"Content-Length: {length}", "", ""]).encode()


BODIES = {
    "application/json": orjson.dumps({"grads": GRADS}),
    SAFETENSORS: frame(prefixed("grad", GRADS), {}),
}


@pytest.mark.parametrize("kind", BODIES)
def test_a_body_may_come_byte_by_byte(address: tuple[str, int], kind: str) -> None:
    body = BODIES[kind]
    with Wire(address) as wire:
        wire.send(step_head(kind, len(body)))
        for i in range(len(body)):
            wire.send(body[i : i + 1])
        assert wire.answer()[0] == 200


@pytest.mark.parametrize("kind", BODIES)
def test_a_step_that_arrived_whole_is_applied_although_nobody_waits(
    address: tuple[str, int], kind: str
) -> None:
    with Wire(address) as wire:
        wire.send(step_head(kind, len(BODIES[kind])) + BODIES[kind])
    wait_until(lambda: version(address) == 1)


@pytest.mark.parametrize("kind", BODIES)
def test_a_body_that_is_cut_off_changes_nothing_and_holds_nothing(
    address: tuple[str, int], kind: str
) -> None:
    body = BODIES[kind]
    for _ in range(20):
        with Wire(address) as wire:
            wire.send(step_head(kind, len(body)) + body[:-1])
    time.sleep(0.1)
    assert version(address) == 0
    with Wire(address) as wire:
        wire.send(step_head(kind, len(body)) + body)
        assert wire.answer()[0] == 200


def test_one_connection_takes_many_requests_good_and_bad(address: tuple[str, int]) -> None:
    with Wire(address) as wire:
        for i in range(5):
            wire.send(step_head("application/json", 2) + b"[]")
            assert wire.answer()[0] == 400
            wire.send(step_head(SAFETENSORS, len(BODIES[SAFETENSORS])) + BODIES[SAFETENSORS])
            status, _, body = wire.answer()
            assert (status, orjson.loads(body)["version"]) == (200, i + 1)


def test_many_callers_at_once_each_get_the_params_of_a_version(address: tuple[str, int]) -> None:
    rng = np.random.default_rng(3)
    grads = {"w": rng.standard_normal((2, 2)), "b": np.float64(1.0)}
    content = frame(prefixed("grad", grads), {})
    seen: list[int] = []

    def call() -> None:
        with httpx.Client(base_url=f"http://{address[0]}:{address[1]}") as client:
            for _ in range(10):
                reply = client.post(
                    STEP,
                    content=content,
                    headers={"content-type": SAFETENSORS, "accept": SAFETENSORS},
                )
                assert reply.status_code == 200
                seen.append(unframe(reply.content)[1]["applied_version"])

    threads = [threading.Thread(target=call) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(seen) == list(range(1, 61))


def test_a_large_reply_arrives_whole_over_a_slow_connection(address: tuple[str, int]) -> None:
    rng = np.random.default_rng(4)
    big = rng.standard_normal(500_000).astype("<f4")
    url = f"http://{address[0]}:{address[1]}/v1/sessions/big"
    content = frame({"param/w": big}, {"optimizer": "SGD"})
    assert httpx.put(url, content=content, headers={"content-type": SAFETENSORS}).status_code == 201
    with Wire(address) as wire:
        head = ["GET /v1/sessions/big/params HTTP/1.1", "Host: x", f"Accept: {SAFETENSORS}", "", ""]
        wire.send("\r\n".join(head).encode())
        time.sleep(0.2)
        status, _, body = wire.answer()
    assert status == 200
    np.testing.assert_array_equal(unframe(body)[0]["param/w"], big)
