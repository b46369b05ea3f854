"""A body that lies nowhere but on its way to the journal is not read faster than that takes it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from optserve.api.app import create_app
from optserve.api.connection import Connection
from optserve.sessions import passing
from optserve.sessions.journaling import MOST_BEHIND_BYTES, JournalingBehind
from optserve.sessions.registry import Registry
from optserve.settings import Settings
from optserve.store.memory import MemoryStore
from tests.integration.api_client import frame
from tests.integration.api_uvicorn import Wire, served
from tests.waiting import wait_until

N = 15_000_000
STEP = "POST /v1/sessions/s/step HTTP/1.1\nContent-Type: application/vnd.safetensors\n"
ACCEPT = "Accept: application/vnd.safetensors\n"


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    gate, write = threading.Event(), passing.Passing.write

    def held_up(self: Any, chunk: Any) -> None:
        assert gate.wait(30)
        write(self, chunk)

    monkeypatch.setattr(passing.Passing, "write", held_up)
    yield gate
    gate.set()


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(
    "twin",
    [
        {"http": Connection, "loop": "uvloop"},
        {"http": Connection, "loop": "asyncio"},
        {"http": "h11", "loop": "asyncio"},
    ],
)
def test_a_slow_disk_holds_the_sender_up(
    gate: threading.Event, twin: dict[str, Any], chunked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    most, add = [0], JournalingBehind.add

    def counted(self: Any, piece: memoryview) -> None:
        add(self, piece)
        most[0] = max(most[0], self._waiting + self._in_hand)

    monkeypatch.setattr(JournalingBehind, "add", counted)
    registry = Registry(MemoryStore(), threads=1)
    settings = Settings(body_timeout_s=0.5, reply_timeout_s=5)
    with served(create_app(registry, settings), **twin) as address:
        create = frame(
            {"param/w": np.zeros(N, "<f4")},
            {"optimizer": {"name": "SGD", "lr": 1}, "workers": {"mode": "sync", "count": 1}},
        )
        wire = Wire(address, 60)
        told = "Content-Type: application/vnd.safetensors\n"
        head = f"PUT /v1/sessions/s HTTP/1.1\n{told}Content-Length: {len(create)}"
        assert wire.request(head, create)[0] == 201
        body = frame(
            {"grad/w": np.arange(N, dtype="<f4")},
            {"worker": "a", "seq": 1, "base_version": 0, "return": "none"},
        )
        how = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {len(body)}"
        sent = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if chunked else body
        answers: list[Any] = []
        head = f"{STEP}{ACCEPT}{how}"
        sender = threading.Thread(target=lambda: answers.append(wire.request(head, sent)))
        sender.start()
        wait_until(lambda: most[0] >= MOST_BEHIND_BYTES, "a backlog")
        time.sleep(1.2)  # more than a sender may be silent
        assert not answers
        gate.set()
        sender.join(60)
        wire.socket.close()
        assert answers[0][0] == 200
    found = registry.get("default", "s").published().result(30).arrays()["w"]
    np.testing.assert_array_equal(found, -np.arange(N, dtype="<f4"))
    registry.close()
    assert most[0] < 1.5 * MOST_BEHIND_BYTES
