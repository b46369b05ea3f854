"""SIGTERM: what has begun is finished and kept, nothing new begins, and the next server goes on."""

from __future__ import annotations

import http.client
import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from optserve.store import Key
from optserve.store.opening import open_store
from optserve_client import Client
from tests.forked import Forkery
from tests.serving import ServerProcess, free_port
from tests.specs import SPECS
from tests.training import Trainer
from tests.waiting import wait_until

CREATE = {"optimizer": {"name": "SGD", "lr": 0.5}, "params": {"w": [1.0]}}
STEP = b'{"grads": {"w": [1.0]}}'
JSON = {"Content-Type": "application/json"}
#: A limit for what is asked for at once; what takes it, hangs.
LIMIT_S = 10


@contextmanager
def half_a_step(server: ServerProcess, session_id: str) -> Iterator[http.client.HTTPConnection]:
    """Send the first half of a step; the server is reading it."""
    url = httpx.URL(server.url)
    connection = http.client.HTTPConnection(url.host, url.port, timeout=30)
    connection.putrequest("POST", f"/v1/sessions/{session_id}/step")
    for name, value in JSON.items():
        connection.putheader(name, value)
    connection.putheader("Content-Length", str(len(STEP)))
    connection.putheader("Expect", "100-continue")
    connection.endheaders()
    assert connection.sock.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
    connection.send(STEP[:10])
    try:
        yield connection
    finally:
        connection.close()


def create(server: ServerProcess, session_id: str, **fields: Any) -> None:
    answer = httpx.put(f"{server.url}/v1/sessions/{session_id}", json={**CREATE, **fields})
    assert answer.status_code == 201, answer.text


def step(server: ServerProcess, session_id: str) -> httpx.Response:
    url = f"{server.url}/v1/sessions/{session_id}/step"
    return httpx.post(url, content=STEP, headers=JSON)


def until_refused(server: ServerProcess, session_id: str) -> httpx.Response:
    """Send steps until one is refused."""
    answers: list[httpx.Response] = []

    def refused() -> bool:
        answers.append(step(server, session_id))
        return answers[-1].status_code != 200

    wait_until(refused, "the stop", LIMIT_S)
    return answers[-1]


def test_what_has_begun_is_finished_and_new_changes_are_refused(tmp_path: Path) -> None:
    with ServerProcess(data_dir=tmp_path) as server:
        create(server, "slow")
        create(server, "other")
        with half_a_step(server, "slow") as connection:
            server.process.send_signal(signal.SIGTERM)
            refused = until_refused(server, "other")
            assert refused.status_code == 503
            assert refused.json()["code"] == "unavailable"
            assert int(refused.headers["retry-after"]) >= 1
            assert httpx.put(f"{server.url}/v1/sessions/new", json=CREATE).status_code == 503
            assert httpx.get(f"{server.url}/readyz").status_code == 503
            assert httpx.get(f"{server.url}/v1/sessions/slow/params").status_code == 200
            connection.send(STEP[10:])
            reply = connection.getresponse()
            assert reply.status == 200
            assert json.loads(reply.read())["params"] == {"w": [0.5]}
        assert server.process.wait(LIMIT_S) == 0, server.stderr()
        assert "Traceback" not in server.stderr()
    _check_snapshots(tmp_path, {"slow", "other"})
    with ServerProcess(data_dir=tmp_path) as server:
        answer = httpx.get(f"{server.url}/v1/sessions/slow/params").json()
        assert (answer["version"], answer["params"]) == (1, {"w": [0.5]})


def _check_snapshots(data_dir: Path, expected: set[str]) -> None:
    """Each session has a snapshot of its last event, so that the next start replays nothing."""
    store = open_store(url=None, data_dir=data_dir, files=None)
    try:
        rows = store.sessions()
        assert {row.key.session for row in rows} == expected
        for row in rows:
            # One that nothing happened to comes back from its creation as fast.
            if row.last_lsn > 1:
                kept = store.snapshots(Key("default", row.key.session))
                assert kept[-1].lsn == row.last_lsn
    finally:
        store.close()


def test_a_body_that_stops_coming_does_not_keep_the_server(tmp_path: Path) -> None:
    with ServerProcess(data_dir=tmp_path, env={"OPTSERVE_DRAIN_S": "1"}) as server:
        create(server, "stuck")
        with half_a_step(server, "stuck"):
            assert server.stop(timeout_s=LIMIT_S) == 0, server.stderr()
    with ServerProcess(data_dir=tmp_path) as server:
        assert httpx.get(f"{server.url}/v1/sessions/stuck").json()["version"] == 0


def test_a_second_sigterm_ends_it_at_once_and_loses_nothing(tmp_path: Path) -> None:
    with ServerProcess(data_dir=tmp_path, env={"OPTSERVE_DRAIN_S": "600"}) as server:
        create(server, "a")
        create(server, "stuck")
        assert step(server, "a").status_code == 200
        with half_a_step(server, "stuck"):
            server.process.send_signal(signal.SIGTERM)
            until_refused(server, "stuck")
            assert server.stop(timeout_s=LIMIT_S) == 128 + signal.SIGTERM
    with ServerProcess(data_dir=tmp_path) as server:
        assert httpx.get(f"{server.url}/v1/sessions/a").json()["updates"] > 0


def test_an_orderly_stop_keeps_what_durability_memory_had(tmp_path: Path) -> None:
    with ServerProcess(data_dir=tmp_path) as server:
        create(server, "a", durability="memory")
        before = step(server, "a").json()
        assert server.stop() == 0
    with ServerProcess(data_dir=tmp_path) as server:
        after = httpx.get(f"{server.url}/v1/sessions/a").json()
        assert (after["generation"], after["version"]) == (before["generation"], 1)


def wait_for_changes(trainers: list[Trainer], count: int) -> None:
    def made() -> int:
        return sum(trainer.changes for trainer in trainers)

    before = made()
    wait_until(lambda: made() >= before + count, f"{count} changes", LIMIT_S)


def test_clients_train_on_through_orderly_restarts(tmp_path: Path) -> None:
    port = free_port()
    flags = ("--port", str(port), "--threads", "1")
    trainers = [
        Trainer(Client(f"http://127.0.0.1:{port}"), {spec.name: spec}, seed)
        for seed, spec in enumerate(SPECS[:6])
    ]
    with Forkery() as forkery:
        for trainer in trainers:
            trainer.start()
        for _ in range(6):
            with ServerProcess(*flags, data_dir=tmp_path, launch=forkery.launch) as server:
                wait_for_changes(trainers, 10)
                assert server.stop() == 0, server.stderr()
                assert '"level": "error"' not in server.stderr()
        with ServerProcess(*flags, data_dir=tmp_path, launch=forkery.launch):
            for trainer in trainers:
                trainer.finish()
    for trainer in trainers:
        assert trainer.given_up == 0
        for one in trainer.owned:
            assert one.story.tree.check() > 0
