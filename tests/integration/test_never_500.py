"""No request of any kind gives a 500: valid requests to every route, spoilt at random."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
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
        #: Sessions of other tests.
        self._others: set[str] = set()
        self._others = set(self._listed())
        states = {}
        for name in SESSIONS:
            self.make(name)
            status, states[name] = self.talk.ask("GET", f"{self.url(name)}/state")
            assert status == 200
        self.seeds = fuzzing.seeds(prefix, states)
        #: When each session was last changed, as far as this knows of; None: it is not there.
        self._updated: dict[str, Any] = {name: self._when(name) for name in SESSIONS}

    def url(self, name: str) -> str:
        return f"/v1/sessions/{self.prefix}{name}"

    def make(self, name: str) -> None:
        """Create a session and step it once, so that there is state to spoil."""
        create, step = SESSIONS[name]
        self.talk.ask("DELETE", self.url(name))
        status, body = self.talk.ask("PUT", self.url(name), create)
        assert status == 201, body
        status, body = self.talk.ask("POST", f"{self.url(name)}/step", step)
        assert status == 200, body

    def close(self) -> None:
        """Delete the sessions that this made, and the connection."""
        for session_id in self._listed():
            self.talk.ask("DELETE", f"/v1/sessions/{session_id}")
        self.talk.close()

    def _listed(self) -> dict[str, Any]:
        """Return when each session of this was last changed."""
        status, body = self.talk.ask("GET", "/v1/sessions?limit=1000")
        assert status == 200, body
        rows = {row["id"]: row["updated_at"] for row in json.loads(body)["sessions"]}
        return {name: when for name, when in rows.items() if name not in self._others}

    def _when(self, name: str) -> Any:
        status, body = self.talk.ask("GET", self.url(name))
        assert status == 200, body
        return json.loads(body)["updated_at"]

    def send(self, sent: Sent) -> tuple[int, bytes]:
        """Send a request, to a push that has all of its gradients if it wants one, and give up
        what it opened: not many may be open."""
        session = sent.path.partition("/pushes/")[0]
        filled = self._filled(session) if fuzzing.PUSH in sent.path else ""
        if filled:
            sent = replace(sent, path=sent.path.replace(fuzzing.PUSH, filled))
        status, body = self.talk.exchange(sent)
        opened = json.loads(body)["push"] if status == 201 and sent.path.endswith("/pushes") else ""
        for push in filter(None, (filled, opened)):
            self.talk.ask("DELETE", f"{session.removesuffix('/pushes')}/pushes/{push}")
        return status, body

    def _filled(self, session: str) -> str:
        """Return the id of a push, or nothing if there is no such session."""
        status, body = self.talk.ask("POST", f"{session}/pushes", {})
        if status != 201:
            return ""
        push: str = json.loads(body)["push"]
        name = session.rpartition("/")[2].removeprefix(self.prefix)
        step = SESSIONS.get(name, SESSIONS["plain"])[1]
        for name, grad in step["grads"].items():
            self.talk.ask("PUT", f"{session}/pushes/{push}/{name}", {"grad": grad})
        return push

    def check(self, sent: Sent) -> None:
        """Send a request; neither it nor any that follows it may be answered with 500."""
        status, body = self.send(sent)
        assert status < 500, (status, body)
        found = self._listed()
        for session_id, updated in found.items():
            self._check_session(session_id, updated)
        for name, updated in self._updated.items():
            if updated is None or self.prefix + name not in found:
                self.make(name)
                self._updated[name] = self._when(name)

    def _check_session(self, session_id: str, updated: Any) -> None:
        """Use a session that a spoilt request made or changed, and delete it."""
        name = session_id.removeprefix(self.prefix)
        if self._updated.get(name) == updated:
            return
        step = SESSIONS.get(name.partition("-")[0], SESSIONS["plain"])[1]
        for sent in uses(session_id, step):
            status, body = self.talk.exchange(sent)
            assert status < 500, (sent, status, body)
        status, body = self.talk.ask("DELETE", f"/v1/sessions/{session_id}")
        assert status == 200, body
        if name in SESSIONS:
            self._updated[name] = None


def uses(session_id: str, step: dict[str, Any]) -> Iterator[Sent]:
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
    yield Sent(method="POST", path=f"{url}/fork", body={"id": "fuzz-fork"})
    yield Sent(method="DELETE", path="/v1/sessions/fuzz-fork")


@pytest.fixture(scope="module")
def target(server: ServerProcess) -> Iterator[Target]:
    with closing(Target(server, "fuzz-")) as target:
        yield target


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


def test_each_route_has_a_request_that_is_right_before_it_is_spoilt(server: ServerProcess) -> None:
    answered = set()
    with closing(Target(server, "right-")) as target:
        for sent in target.seeds:
            if b"-new" in sent.raw():
                for name in SESSIONS:
                    target.talk.ask("DELETE", f"{target.url(name)}-new")
            status, body = target.send(sent)
            assert status < 500, body
            if status < 400:
                answered.add((sent.method, sent.path.replace(target.prefix, "")))
        _, body = target.talk.ask("GET", "/openapi.json")
    for name in SESSIONS:
        url = f"/v1/sessions/{name}"
        assert {("GET", url), ("POST", f"{url}/step"), ("PUT", f"{url}/state")} <= answered
    for path, methods in json.loads(body)["paths"].items():
        named = path.replace("{session_id}", "plain").replace("{index}", "0")
        named = named.replace("{version}", "1").replace("{push_id}", fuzzing.PUSH)
        for kind, name in (("optimizers", "adamw"), ("schedulers", "step_lr"), ("pushes", "w")):
            named = named.replace("{name}", name) if f"/{kind}/" in path else named
        close = {named, named.replace("plain", "rich"), f"{named}-new", f"{named}-imported"}
        for method in methods:
            assert {(method.upper(), one) for one in close} & answered, (method, path)


def test_no_spoilt_request_is_answered_with_500(target: Target) -> None:
    send_spoilt_requests(target, examples=200)


@pytest.mark.long
def test_none_of_many_spoilt_requests_is_answered_with_500(target: Target) -> None:
    send_spoilt_requests(target, examples=10_000)
