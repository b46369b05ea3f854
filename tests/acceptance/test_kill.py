"""``kill -9`` at random times while clients train: nothing is lost, nothing is applied twice.

Eight clients train sessions of many kinds; a server is killed at a random moment, also while it
starts and reads sessions back, and another takes its place on the same data directory and port.
The clients get over it by themselves. In the end every session must be, bit for bit, what torch
makes of the changes that were acknowledged, and its journal must hold exactly those.

Most servers are forked from a process that has imported torch already, and run the real program
from ``optserve.cli.main`` on (see ``tests/forked.py``); some are executed as people do.
"""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from optserve_client import Client
from tests import oracle
from tests.oracle import Story, Tree
from tests.serving import Launch, ServerProcess, execute, free_port
from tests.training import SPECS, Spec, Trainer
from tests.forked import Forkery

CLIENTS = 8
SHARED = Spec(name="shared", body={"optimizer": {"name": "SGD", "lr": 0.01, "momentum": 0.9}})


@pytest.fixture(scope="module")
def forkery() -> Iterator[Forkery]:
    with Forkery() as started:
        yield started


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Let torch compute here as on the servers, which have ``--threads 1``."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Place:
    """Where one server after the other serves the same sessions."""

    def __init__(self, forkery: Forkery, data_dir: Path, *flags: str, seed: int = 0) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.kills = 0
        self._forkery, self._data_dir = forkery, data_dir
        self._flags = ("--port", str(self.port), "--threads", "1", *flags)
        self._rng = random.Random(seed)

    def start(self, launch: Launch | None = None) -> ServerProcess:
        return ServerProcess(
            *self._flags, data_dir=self._data_dir, launch=launch or self._forkery.launch
        )

    def kill_one(self, *, executed: bool = False) -> None:
        """Start a server, and kill it at a random moment: while it starts, or some time later."""
        server = self.start(execute() if executed else None)
        try:
            if self._rng.random() < 0.25:
                time.sleep(self._rng.uniform(0, 5 if executed else 0.15))
            else:
                server.wait_ready()
                time.sleep(min(self._rng.expovariate(1 / 0.4), 3.0))
            assert server.process.poll() is None, server.stderr()
            assert server.stop(signal.SIGKILL) == -signal.SIGKILL
            self.kills += 1
        finally:
            server.close()


def train(url: str, durability: str | None, **options: Any) -> list[Trainer]:
    """Start the clients; two of them share one session beside their own."""
    dealt: list[dict[str, Spec]] = [{} for _ in range(CLIENTS)]
    for i, spec in enumerate(SPECS):
        dealt[i % CLIENTS][spec.name] = spec
    trainers = [
        Trainer(Client(url), specs, seed, durability=durability, **options)
        for seed, specs in enumerate(dealt)
    ]
    params = oracle.tensors(0, SHARED.shapes)
    body = dict(SHARED.body)
    for trainer in trainers[:2]:
        optimizer = body["optimizer"]
        trainer.shared = (SHARED.name, SHARED)
        trainer.again(
            lambda c=trainer.client: c.create(
                optimizer, params, id=SHARED.name, durability=durability
            )
        )
    for trainer in trainers:
        trainer.start()
    return trainers


def finish(trainers: list[Trainer]) -> None:
    for trainer in trainers:
        trainer.enough.set()
    for trainer in trainers:
        trainer.join(120)
        if trainer.failure is not None:
            raise trainer.failure
        assert not trainer.is_alive(), f"{trainer.name} hangs"


def check_shared(trainers: list[Trainer], client: Client) -> int:
    """Replay what two clients stepped in the order that the replies gave; return the steps."""
    steps = sorted(pair for trainer in trainers for pair in trainer.shared_steps)
    assert [version for version, _ in steps] == list(range(1, len(steps) + 1))
    tree = Tree(SHARED.body, oracle.tensors(0, SHARED.shapes), client.session("shared").status()["impl"])
    story = Story(tree)
    for _, seed in steps:
        story.note(oracle.Step(seed), moves=True, updates=1)
    story.head.exports.append(bytes(client.session(SHARED.name).export_state()))
    tree.check()
    return len(steps)


def check_versions(client: Client, trainers: list[Trainer]) -> None:
    """Every version of every session is in its history, once."""
    for trainer in trainers:
        for one in trainer.owned:
            after, seen = 0, 0
            while rows := client.session(one.session.id).history(after):
                assert [row["version"] for row in rows] == list(
                    range(after + 1, after + 1 + len(rows))
                )
                after, seen = rows[-1]["version"], seen + len(rows)
            assert seen == one.story.version


def test_training(forkery: Forkery, tmp_path: Path) -> None:
    place = Place(forkery, tmp_path)
    with place.start():
        trainers = train(place.url, None, past=False, least=300)
        finish(trainers)
        with Client(place.url) as client:
            check_versions(client, trainers)
            n = check_shared(trainers, client)
    print("shared", n, "changes", sum(t.changes for t in trainers))
    for t in trainers:
        for o in t.owned:
            t0=time.time()
            print(o.session.id, len(o.story.log), o.story.tree.check(), time.time()-t0)
