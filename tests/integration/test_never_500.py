"""No request of any kind gives a 500: valid requests to every route, spoilt at random."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import hypothesis
import pytest
from hypothesis import strategies as st

from tests.integration import fuzzing
from tests.integration.fuzzing import SESSIONS, Sent
from tests.serving import ServerProcess

TIMEOUT_S = 20


class Talk:
    """One connection that is used for as long as the server keeps it."""

    def __init__(self, server: ServerProcess) -> None:
        where = urlsplit(server.url)
        self._address = (where.hostname, where.port)
        self._socket: socket.socket | None = None
        self.reconnects = 0

    def exchange(self, sent: Sent) -> tuple[int, bytes]:
        """Send one request and read its whole answer."""
        if self._socket is None:
            self._socket = socket.create_connection(self._address, TIMEOUT_S)
            self.reconnects += 1
        self._socket.sendall(sent.raw())
        answer = http.client.HTTPResponse(self._socket, method=sent.method)
        try:
            answer.begin()
            body = answer.read()
        finally:
            answer.close()
        if answer.will_close:
            self.close()
        return answer.status, body

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
        return self.exchange(Sent(method=method, path=path, body=body))

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


class Target:
    """Sessions of every kind on a real server, made anew when a spoilt request changed one."""

    def __init__(self, server: ServerProcess, prefix: str) -> None:
        self.talk = Talk(server)
        self.prefix = prefix
        states = {}
        for name in SESSIONS:
            self.make(name)
            status, states[name] = self.talk.ask("GET", f"{self.url(name)}/state")
            assert status == 200
        self.seeds = fuzzing.seeds(prefix, states)
        self._ids = {name: self._states(name) for name in SESSIONS}

    def url(self, name: str) -> str:
        return f"/v1/sessions/{self.prefix}{name}"

    def make(self, name: str) -> None:
        """Create a session and step it once, so that there is state to spoil."""
        create, step = SESSIONS[name]
        self.talk.ask("DELETE", f"{self.url(name)}?abandon=true")
        status, body = self.talk.ask("PUT", self.url(name), create)
        assert status == 201, body
        status, body = self.talk.ask("POST", f"{self.url(name)}/step", step)
        assert status == 200, body

    def _states(self, name: str) -> tuple[int, Any]:
        status, body = self.talk.ask("GET", self.url(name))
        return status, json.loads(body).get("updated_at")

    def check(self, sent: Sent) -> None:
        """Send a request; neither it nor any that follows it may be answered with 500."""
        status, body = self.talk.exchange(sent)
        assert status < 500, (status, body)
        status, body = self.talk.ask("GET", "/v1/sessions?limit=1000")
        assert status == 200, body
        for row in json.loads(body)["sessions"]:
            self._check_session(row)
        for name in SESSIONS:
            if self._ids[name][1] is None:
                self.make(name)
                self._ids[name] = self._states(name)

    def _check_session(self, row: dict[str, Any]) -> None:
        """Use a session that a spoilt request made or changed, then put the usual one back."""
        if not row["id"].startswith(self.prefix):
            return
        name = row["id"].removeprefix(self.prefix)
        if name in SESSIONS and self._ids[name][1] == row["changed"]:
            return
        for sent in self.uses(row["id"], SESSIONS.get(name.partition("-")[0], SESSIONS["plain"])[1]):
            status, body = self.talk.exchange(sent)
            assert status < 500, (sent, status, body)
        status, body = self.talk.ask("DELETE", f"/v1/sessions/{row['id']}?abandon=true")
        assert status == 200, body
        if name in SESSIONS:
            self._ids[name] = (0, None)

    def uses(self, session_id: str, step: dict[str, Any]) -> Iterator[Sent]:
        """Yield ordinary requests to a session that may not be what it was."""
        url = f"/v1/sessions/{session_id}"
        for _ in range(3):
            yield Sent(method="POST", path=f"{url}/step", body=step)
        yield Sent(method="POST", path=f"{url}/step", body={**step, "dry_run": True, "loss": 0.25})
        yield Sent(method="POST", path=f"{url}/scheduler/step", body={"worker": "a", "seq": 1})
        yield Sent(method="PATCH", path=f"{url}/groups/0", body={"lr": 0.5, "abandon": True})
        for view in ("", "/scheduler", "/scheduler/preview", "/history", "/state"):
            yield Sent(method="GET", path=url + view)
        for weights in ("live", "ema", "best", "eval"):
            yield Sent(method="GET", path=f"{url}/params", query=f"weights={weights}")
        yield Sent(method="POST", path=f"{url}/fork", body={})


@pytest.fixture(scope="module")
def target(server: ServerProcess) -> Iterator[Target]:
    target = Target(server, "fuzz-")
    yield target
    target.talk.close()


@st.composite
def spoilt_requests(draw: Any, seeds: list[Sent]) -> Sent:
    return fuzzing.spoilt(draw, draw(st.sampled_from(seeds)))


def send_spoilt_requests(target: Target, examples: int, seed: int = 2026) -> None:
    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=examples,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
    )
    @hypothesis.given(sent=spoilt_requests(target.seeds))
    def run(sent: Sent) -> None:
        target.check(sent)

    run()


def test_the_requests_that_are_spoilt_are_right_before(target: Target) -> None:
    for sent in target.seeds:
        status, body = target.talk.exchange(sent)
        print(sent.method, sent.path, sent.query, status, body[:200])


def test_no_spoilt_request_is_answered_with_500(target: Target) -> None:
    send_spoilt_requests(target, examples=200)


@pytest.mark.long
def test_none_of_many_spoilt_requests_is_answered_with_500(target: Target) -> None:
    send_spoilt_requests(target, examples=10_000)
