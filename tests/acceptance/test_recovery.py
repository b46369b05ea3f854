"""Everything of a session comes back after kill -9, and goes on bit for bit."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from optserve.store.schema import FORMAT
from optserve_client import Client, errors
from tests import oracle
from tests.data import make_format
from tests.oracle import Story, Tree
from tests.serving import ServerProcess, free_port
from tests.specs import SPECS, Spec
from tests.training import Owned

NAMES = [spec.name for spec in SPECS]
PARAMS = {"w": [1.0, 2.0, 3.0]}
#: Payloads of it are files.
BIG: oracle.Shapes = {"w": (150, 150)}
DATA = Path(make_format.__file__).parent


@dataclass
class Past:
    """What was known before the last kill, and the server that came after it."""

    directory: Path
    port: int
    client: Client
    owned: dict[str, Owned] = field(default_factory=dict)
    before: dict[str, Any] = field(default_factory=dict)
    url: str = ""

    def http(self, method: str, path: str, **more: Any) -> httpx.Response:
        return httpx.request(method, f"{self.url}/v1/sessions{path}", timeout=30, **more)

    def serve(self, directory: Path | None = None) -> ServerProcess:
        return ServerProcess("--port", str(self.port), data_dir=directory or self.directory)


def owned(client: Client, spec: Spec, rng: random.Random) -> Owned:
    params = oracle.tensors(rng.getrandbits(32), spec.shapes, spec.dtype)
    body = dict(spec.body)
    session = client.create(
        body.pop("optimizer"), params, id=spec.name, tags={"kind": spec.name}, **body
    )
    tree = Tree(spec.body, params, session.status()["impl"])
    return Owned(spec, session, Story(tree), rng, lambda call: call(), past=False, lossy=False)


def act(story: Past, times: int) -> None:
    for one in story.owned.values():
        for _ in range(times):
            one.act()


def numbered(story: Past, seq: int) -> httpx.Response:
    body = {"grads": PARAMS, "worker": "old", "seq": seq}
    return story.http("POST", "/numbered/step", json=body)


def keyed(story: Past, key: str) -> httpx.Response:
    body = {"grads": PARAMS}
    return story.http("POST", "/numbered/step", json=body, headers={"Idempotency-Key": key})


def begin(story: Past) -> None:
    """The first life; it ends in order, so that every session has a snapshot."""
    rng = random.Random(7)
    for spec in SPECS:
        story.owned[spec.name] = owned(story.client, spec, rng)
    for name in ("spoilt", "stale"):
        story.client.create("Adam", oracle.tensors(1, BIG), id=name).step(oracle.tensors(2, BIG))
    created = story.http(
        "PUT", "/numbered", json={"optimizer": {"name": "SGD", "lr": 0.1}, "params": PARAMS}
    )
    assert created.status_code in (200, 201), created.text
    assert numbered(story, 1).json()["applied_version"] == 1
    assert keyed(story, "k1").json()["applied_version"] == 2
    act(story, 5)


def go_on(story: Past) -> None:
    """The second life; what it does is not in a snapshot when it is killed."""
    for seq in (2, 3):
        assert numbered(story, seq).json()["duplicate"] is False
    assert keyed(story, "k2").json()["duplicate"] is False
    act(story, 4)
    search = story.owned["lbfgs"]
    while not search.searching:
        search.act()
    window = story.owned["accumulate"]
    while not window.session.status()["accumulated"]:
        window.step()
    for name in ("spoilt", "stale"):
        for seed in (3, 4):
            story.client.session(name).step(oracle.tensors(seed, BIG))
    for name in (*NAMES, "numbered", "spoilt", "stale"):
        session = story.client.session(name)
        story.before[name] = {
            "state": bytes(session.export_state()),
            "status": session.status(),
            "history": list(session.history()),
            "versions": list(session.versions()),
        }


@pytest.fixture(scope="module")
def recovered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Past]:
    """Sessions after an orderly end and, later, a kill; ``before`` is how they were at the kill."""
    directory, port = tmp_path_factory.mktemp("recovery") / "data", free_port()
    with Client(f"http://127.0.0.1:{port}") as client:
        story = Past(directory, port, client, url=f"http://127.0.0.1:{port}")
        with story.serve():
            begin(story)
        with story.serve() as second:
            go_on(story)
            second.stop(signal.SIGKILL)
        shutil.copytree(directory, directory.with_name("damaged"))
        shutil.copytree(directory, directory.with_name("threads"))
        with story.serve():
            yield story


@pytest.mark.parametrize("name", NAMES)
def test_state_status_and_history_are_those_before_the_kill(recovered: Past, name: str) -> None:
    session, before = recovered.client.session(name), recovered.before[name]
    status = session.status()
    assert bytes(session.export_state()) == before["state"]
    assert status["recovery"] == {"bit_exact": True, "reason": None}
    assert status == before["status"]
    assert status["tags"] == {"kind": name}
    assert list(session.history()) == before["history"]
    assert list(session.versions()) == before["versions"]


@pytest.mark.parametrize("name", NAMES)
def test_training_goes_on_as_torch_does(recovered: Past, name: str) -> None:
    """With an LBFGS line search and an accumulation window that the kill found open."""
    one = recovered.owned[name]
    one.export()
    for _ in range(4):
        one.act()
    one.export()
    assert one.story.tree.check() >= 2


def test_old_requests_are_duplicates(recovered: Past) -> None:
    answers = {seq: numbered(recovered, seq).json() for seq in (1, 2, 3)}
    assert {seq: a["applied_version"] for seq, a in answers.items()} == {1: 1, 2: 3, 3: 4}
    assert all(a["duplicate"] for a in answers.values())
    for key, version in (("k1", 2), ("k2", 5)):
        again = keyed(recovered, key).json()
        assert (again["duplicate"], again["applied_version"]) == (True, version)
    ahead = numbered(recovered, 5)
    assert (ahead.status_code, ahead.json()["code"]) == (409, "out_of_sequence")
    assert ahead.json()["last_seq"] == 3
    assert numbered(recovered, 4).json()["applied_version"] == 6


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def newest_file(directory: Path, table: str, session: str) -> Path:
    """Return the payload file of a session's newest event or snapshot that has one."""
    with sqlite3.connect(directory / "optserve.db") as database:
        [[name]] = database.execute(
            f"SELECT payload_file FROM {table} WHERE session = ? AND payload_file IS NOT NULL "
            "ORDER BY lsn DESC LIMIT 1",
            [session],
        )
    database.close()
    return directory / "payloads" / str(name)


@pytest.fixture(scope="module")
def damaged(recovered: Past) -> Iterator[tuple[Client, ServerProcess]]:
    """A server whose disk changed a byte of a payload and one of a snapshot."""
    directory = recovered.directory.with_name("damaged")
    flip(newest_file(directory, "events", "spoilt"))
    # A second snapshot, so that there is an older one.
    with ServerProcess(data_dir=directory) as server, Client(server.url) as client:
        client.session("stale").step(oracle.tensors(5, BIG))
    flip(newest_file(directory, "snapshots", "stale"))
    with ServerProcess(data_dir=directory) as server, Client(server.url, retries=0) as client:
        yield client, server


def test_a_damaged_session_is_refused_by_name_with_a_cure(
    damaged: tuple[Client, ServerProcess],
) -> None:
    client, _ = damaged
    session = client.session("spoilt")
    for ask in (session.params, session.status, lambda: session.step(oracle.tensors(9, BIG))):
        with pytest.raises(errors.Damaged, match="spoilt") as caught:
            ask()
        assert (caught.value.status, caught.value.code) == (500, "damaged")
        assert "fsck --salvage spoilt" in caught.value.detail
        assert "payload file" in caught.value.detail


@pytest.mark.parametrize("name", [*NAMES, "numbered"])
def test_the_others_work_beside_a_damaged_one(
    recovered: Past, damaged: tuple[Client, ServerProcess], name: str
) -> None:
    client, _ = damaged
    assert bytes(client.session(name).export_state()) == recovered.before[name]["state"]
    assert name in {row["id"] for row in client.list().sessions}


def test_a_damaged_snapshot_is_passed_over_for_the_older_one(
    recovered: Past, damaged: tuple[Client, ServerProcess]
) -> None:
    client, server = damaged
    session = client.session("stale")
    status = session.status()
    assert status["recovery"] == {"bit_exact": True, "reason": None}
    assert status["version"] == recovered.before["stale"]["status"]["version"] + 1
    twin = oracle.Twin({"optimizer": {"name": "Adam"}}, oracle.tensors(1, BIG), status["impl"])
    for version, seed in enumerate((2, 3, 4, 5)):
        twin.push(oracle.tensors(seed, BIG), None, version)
    twin.check(session.export_state(), 4, 4)
    assert "a snapshot is passed over" in server.stderr()
    session.step(oracle.tensors(6, BIG))
    twin.push(oracle.tensors(6, BIG), None, 4)
    twin.check(session.export_state(), 5, 5)


def test_a_damaged_session_can_be_deleted(damaged: tuple[Client, ServerProcess]) -> None:
    client, _ = damaged
    client.session("spoilt").delete()
    with pytest.raises(errors.SessionNotFound):
        client.session("spoilt").params()
    made = client.create("SGD", {"w": np.zeros(3, "f4")}, id="spoilt")
    assert made.step({"w": np.ones(3, "f4")}).version == 1


def test_a_replay_on_another_machine_says_so(recovered: Past) -> None:
    """Here: with another number of threads. A session that is not replayed has nothing to say."""
    directory = recovered.directory.with_name("threads")
    flags = ("--threads", "1")
    with ServerProcess(*flags, data_dir=directory) as server, Client(server.url) as client:
        assert server.threads == 1
        said = client.session("adamw").status()["recovery"]
        assert said["bit_exact"] is False
        assert "threads 2" in said["reason"] or "threads" in said["reason"]
        fresh = client.create("SGD", {"w": np.zeros(3, "f4")})
        assert fresh.status()["recovery"] == {"bit_exact": True, "reason": None}


# --- a directory that a release wrote ------------------------------------------------------------

FORMATS = sorted(
    path for path in DATA.iterdir() if path.is_dir() and path.name.startswith("format")
)


@pytest.mark.parametrize("kept", FORMATS, ids=lambda path: path.name)
def test_a_directory_of_that_format_opens_and_has_its_numbers(kept: Path, tmp_path: Path) -> None:
    """And its sessions go on. Where the last bits cannot be the same, the status says so."""
    directory = tmp_path / "data"
    shutil.copytree(kept, directory)
    known = json.loads(kept.with_suffix(".json").read_text())
    with (
        ServerProcess(*known["flags"], data_dir=directory) as server,
        Client(server.url) as client,
    ):
        assert {row["id"] for row in client.list().sessions} == set(known["sessions"])
        for name, want in known["sessions"].items():
            session = client.session(name)
            status = session.status()
            told = {key: status[key] for key in ("version", "updates", "generation")}
            assert told == {key: want[key] for key in told}
            assert [row["version"] for row in session.history()] == want["history"]
            found = make_format.digests(session.export_state())
            assert found.keys() == want["tensors"].keys()
            if status["recovery"]["bit_exact"]:
                assert found == want["tensors"], f"{name} says that it is bit-exact"
            else:
                assert status["recovery"]["reason"]
        make_format.train(client, 5, 1)
        client.session("sparse").step({"rows": make_format.rows(2)})


def test_the_format_of_this_release_is_kept() -> None:
    names = {path.name for path in FORMATS}
    assert names == {f"format-{number}" for number in range(1, FORMAT + 1)}
    assert all(
        sum(f.stat().st_size for f in p.rglob("*") if f.is_file()) < 200_000 for p in FORMATS
    )
