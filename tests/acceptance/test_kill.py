"""``kill -9`` at random times while clients train: nothing is lost, nothing is applied twice.

Eight clients train sessions of many kinds; a server is killed at a random moment, also while it
starts and reads sessions back, and another takes its place on the same data directory and port.
The clients get over it by themselves. In the end every session must be, bit for bit, what torch
makes of the changes that were acknowledged, and its journal must hold exactly those.

Most servers are forked from a process that has imported torch already, and run the real program
from ``optserve.__main__.main`` on (see ``tests/forked.py``); some are executed as people do.
"""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from optserve.store import Key, Store
from optserve.store.base import Durability
from optserve.store.opening import open_store
from optserve_client import Client
from tests.forked import Forkery
from tests.oracle import Story
from tests.postgres import shared_cluster
from tests.record import Figure
from tests.serving import ServerProcess, free_port
from tests.specs import SPECS, Spec
from tests.training import Trainer, share, stories

# The long form takes half an hour.
pytestmark = pytest.mark.timeout(3 * 3600)

CLIENTS = 8


@pytest.fixture(scope="module")
def forkery() -> Iterator[Forkery]:
    with Forkery() as started:
        yield started


class Place:
    """Where one server after the other serves the same sessions."""

    def __init__(self, forkery: Forkery, data_dir: Path, *flags: str, seed: int = 0) -> None:
        self.data_dir = data_dir
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.kills = self.unready = 0
        self._forkery = forkery
        self._flags = ("--port", str(self.port), "--threads", "1", *flags)
        self._rng = random.Random(seed)

    def start(self, *, executed: bool = False) -> ServerProcess:
        launch = None if executed else self._forkery.launch
        return ServerProcess(*self._flags, data_dir=self.data_dir, launch=launch)

    def kill_one(self, *, executed: bool = False) -> None:
        """Start a server, and kill it at a random moment: while it starts, or some time later."""
        server = self.start(executed=executed)
        try:
            draw = self._rng.random()
            if draw < 0.25:
                time.sleep(self._rng.uniform(0, 5 if executed else 0.15))
                self.unready += 1
            else:
                server.wait_ready()
                # Mostly short; now and then long enough to read all sessions back.
                mean_s = 0.2 if draw < 0.9 else 2.0
                time.sleep(min(self._rng.expovariate(1 / mean_s), 3 * mean_s))
            kill(server)
            self.kills += 1
        finally:
            server.close()


def kill(server: ServerProcess) -> None:
    assert server.process.poll() is None, f"it ended by itself:\n{server.stderr()}"
    assert server.stop(signal.SIGKILL) == -signal.SIGKILL


def train(url: str, specs: Sequence[Spec], durability: Durability | None) -> list[Trainer]:
    """Return the clients, which have not started, with the specs dealt out to them."""
    return [
        Trainer(Client(url), {s.name: s for s in specs[i::CLIENTS]}, i, durability=durability)
        for i in range(CLIENTS)
    ]


def survive(place: Place, trainers: list[Trainer], kills: int) -> None:
    """Let them train while one server after the other is killed; the last one stays."""
    for trainer in trainers:
        trainer.start()
    for i in range(kills):
        place.kill_one(executed=i % 33 == 16)
        for trainer in trainers:
            if trainer.failure is not None:
                raise trainer.failure


def look(client: Client, found: Mapping[str, Story]) -> None:
    """Compare what the server says of each session, and note its state file for the oracle."""
    assert {row["id"] for row in client.list(limit=1000).sessions} == set(found)
    for name, story in found.items():
        session = client.session(name)
        status = session.status()
        assert (status["version"], status["updates"]) == (story.version, story.updates)
        assert status["recovery"]["bit_exact"], status["recovery"]
        story.head.exports.append(bytes(session.export_state()))


def look_at_history(client: Client, found: Mapping[str, Story]) -> None:
    """Every version of every session is there once."""
    for name, story in found.items():
        versions: list[int] = []
        while rows := client.session(name).history(versions[-1] if versions else 0):
            versions += [row["version"] for row in rows]
        assert versions == list(range(1, story.version + 1)), name


def check_journals(store: Store, found: Mapping[str, Story]) -> None:
    """The journals hold what was acknowledged and nothing else, each request once."""
    try:
        for name, story in found.items():
            events = list(store.events(Key("default", name), payloads=False))
            assert [event.lsn for event in events] == list(range(1, len(events) + 1))
            seqs: dict[str, list[int]] = {}
            for event in events[1:]:
                assert event.worker is not None
                assert event.seq is not None
                seqs.setdefault(event.worker, []).append(event.seq)
            for worker, sent in seqs.items():
                assert sent == list(range(1, len(sent) + 1)), f"{name}: {worker}"
            made = [(event.version, event.updates) for event in events[1:]]
            assert made == [(node.version, node.updates) for node in story.log], name
    finally:
        store.close()


def check_all(place: Place, trainers: list[Trainer], open_it: Callable[[], Store]) -> int:
    """Compare everything with the oracle, as three servers read it back; return the changes."""
    with place.start() as server:
        for trainer in trainers:
            trainer.finish()
        with Client(place.url) as client:
            found = stories(trainers, client)
            look(client, found)
        kill(server)
    with place.start() as server, Client(place.url) as client:
        look(client, found)
        look_at_history(client, found)
        assert server.stop() == 0, server.stderr()
    check_journals(open_it(), found)
    with place.start(), Client(place.url) as client:
        look(client, found)
    for name, story in found.items():
        assert story.tree.check() >= 3, name
    return sum(trainer.changes for trainer in trainers)


@pytest.fixture(params=["SQLite", "PostgreSQL"])
def database(request: pytest.FixtureRequest) -> Iterator[tuple[str, str | None]]:
    """Which database, and its URL if it is not the default one."""
    if request.param == "SQLite":
        yield request.param, None
        return
    cluster = shared_cluster()
    with cluster.database() as name:
        yield request.param, cluster.url(name)


def test_nothing_is_lost_or_applied_twice(
    database: tuple[str, str | None],
    forkery: Forkery,
    tmp_path: Path,
    long_form: bool,
    figure: Figure,
) -> None:
    label, url = database
    kills = (2_000 if long_form else 100) if url is None else (400 if long_form else 20)
    place = Place(forkery, tmp_path, *(() if url is None else ("--store", url)), seed=1)
    trainers = train(place.url, SPECS, None)
    with place.start():
        share(trainers[:2], None)
    survive(place, trainers, kills)
    changes = check_all(place, trainers, lambda: open_store(url=url, data_dir=tmp_path, files=None))
    repeated = sum(one.duplicates for trainer in trainers for one in trainer.owned)
    assert place.kills == kills
    assert repeated > 0
    told = f"kill -9, {label}"
    figure(f"{told}: kills", place.kills, f"kills, {place.unready} of them before it was ready")
    figure(f"{told}: acknowledged, 0 lost, 0 applied twice", changes, "changes")
    figure(f"{told}: steps whose first answer a kill took", repeated, "steps")
    given_up = sum(trainer.given_up for trainer in trainers)
    figure(f"{told}: calls that the client had to give up", given_up, "calls")


def test_a_process_that_dies_loses_nothing_with_durability_os(
    forkery: Forkery, tmp_path: Path, long_form: bool, figure: Figure
) -> None:
    kills = 200 if long_form else 15
    # Few sessions fit into memory at once: they are put away and read back all the time.
    place = Place(forkery, tmp_path, "--memory-budget", "4MiB", seed=2)
    trainers = train(place.url, SPECS, "os")
    with place.start():
        share(trainers[:2], "os")
    survive(place, trainers, kills)
    changes = check_all(
        place, trainers, lambda: open_store(url=None, data_dir=tmp_path, files=None)
    )
    figure("kill -9, durability os: changes acknowledged, 0 lost", changes, "changes")


def test_a_session_kept_in_memory_says_what_it_lost(
    forkery: Forkery, tmp_path: Path, long_form: bool, figure: Figure
) -> None:
    kills = 200 if long_form else 12
    place = Place(forkery, tmp_path, seed=3)
    specs = [spec for spec in SPECS if spec.name != "lbfgs"]
    trainers = train(place.url, specs, "memory")
    survive(place, trainers, kills)
    with place.start() as server:
        for trainer in trainers:
            trainer.finish()
        assert server.stop() == 0, server.stderr()
    with place.start(), Client(place.url) as client:
        look(client, stories(trainers, client))
    owned = [one for trainer in trainers for one in trainer.owned]
    for one in owned:
        assert one.story.tree.check() > 0
    assert sum(one.rewinds for one in owned) > 0
    assert sum(one.lost for one in owned) > 0
    figure("kill -9, durability memory: rewinds told", sum(one.rewinds for one in owned), "rewinds")
    figure("kill -9, durability memory: lost and told", sum(one.lost for one in owned), "changes")
