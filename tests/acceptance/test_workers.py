"""Four worker processes train one model: what comes out is what one process would have made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

import optserve.optim.fedopt
from optserve_client import Client, Session
from tests import nets
from tests.crew import Hand, Job, computed, finish
from tests.nets import Arrays, Shard
from tests.record import Figure
from tests.serving import ServerProcess
from tests.zygote import Zygote

Spec = dict[str, Any]

#: In the order in which they combine.
NAMES = ("w1", "w10", "w2", "w3")
ADAMW = {"name": "AdamW", "lr": 3e-3}
SYNC = {"mode": "sync", "count": len(NAMES), "reduce": "mean"}
ASYNC = {"mode": "async", "max_staleness": 8}
#: Scans in a push, and pushes of each worker in the trainings that are compared by accuracy.
SIZE, PUSHES = 16, 400
#: What workers do by themselves between two pushes of deltas, how often, and who takes them.
DESCENT = {"steps": 5, "lr": 0.3}
LOCAL_ROUNDS = 160
SERVERS = ({"name": "SGD", "lr": 1.0}, {"name": "FedAdam", "lr": 0.01})
#: Below the accuracy of one process.
POINT = 0.01


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with Zygote("tests.crew") as made:
        yield made


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with ServerProcess("--threads", "1") as server:
        yield server.url


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    with Client(url) as made:
        yield made


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the server and the workers compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def jobs(url: str, session: Session, net: str, **fields: Any) -> list[Job]:
    """Return what each worker does; together they have all scans."""
    return [
        Job(
            url=url,
            session=session.id,
            name=name,
            net=net,
            index=index,
            of=len(NAMES),
            size=SIZE,
            **fields,
        )
        for index, name in enumerate(NAMES)
    ]


def train(zygote: Zygote, todo: list[Job]) -> list[Hand]:
    hands = [Hand(zygote, job) for job in todo]
    finish(hands)
    return hands


def alone(todo: list[Job], torch_line: str, rounds: int) -> Arrays:
    """Return the params after so many rounds, all in this process: what the four compute, one after
    the other, is added up in the order of their names and divided by four, then torch steps.

    ``torch_line``: what the server says that it stands for, ``torch.optim.AdamW(params, lr=...)``.
    """
    net = todo[0].net
    leaves = {name: torch.tensor(value) for name, value in nets.initial(net).items()}
    known = {"torch": torch, "optserve": optserve, "params": list(leaves.values())}
    optimizer = eval(torch_line, known)
    params = {name: leaf.numpy() for name, leaf in leaves.items()}  # views: they move along
    shards = [Shard(job.index, job.of, job.size) for job in todo]
    for number in range(rounds):
        made = [computed(j, s, params, number)[1] for j, s in zip(todo, shards, strict=True)]
        for name, leaf in leaves.items():
            total = made[0][name].copy()
            for one in made[1:]:
                total += one[name]
            total /= np.float32(len(made))
            leaf.grad = torch.from_numpy(-total if todo[0].steps else total)
        optimizer.step()
    return params


@cache
def single(net: str) -> float:
    """Return the accuracy of one process that has all scans, in batches as large as a round."""
    shard = Shard(0, 1, SIZE * len(NAMES))
    leaves = {name: torch.tensor(value) for name, value in nets.initial(net).items()}
    optimizer = torch.optim.AdamW(leaves.values(), lr=ADAMW["lr"])
    params = {name: leaf.numpy() for name, leaf in leaves.items()}
    for number in range(PUSHES):
        for name, grad in nets.gradient(net, params, shard.batch(number))[1].items():
            leaves[name].grad = torch.from_numpy(grad)
        optimizer.step()
    return nets.accuracy(net, params)


def assert_same_bits(served: Mapping[str, Any], local: Arrays) -> None:
    for name, value in local.items():
        assert np.asarray(served[name]).tobytes() == value.tobytes(), f"{name} differs"


@pytest.mark.parametrize("net", nets.SHAPES)
def test_rounds_of_four_processes_are_bit_equal_to_one_process(
    net: str, zygote: Zygote, url: str, client: Client, long_form: bool, figure: Figure
) -> None:
    rounds = 200 if long_form else 60
    session = client.create(ADAMW, nets.initial(net), workers=SYNC)
    todo = jobs(url, session, net, until=rounds)
    hands = train(zygote, todo)
    served = session.params()
    assert served.version == rounds
    assert_same_bits(served, alone(todo, session.info["torch"], rounds))
    assert [len(hand.pushed) for hand in hands] == [rounds] * len(NAMES)
    figure(f"4 workers, sync, {net}: bit-equal to one process", rounds, "rounds")


def nets_of(long_form: bool) -> list[str]:
    return [*nets.SHAPES] if long_form else ["mlp"]


def test_asynchronous_pushes_reach_the_accuracy_of_one_process(
    zygote: Zygote, url: str, client: Client, long_form: bool, figure: Figure
) -> None:
    for net in nets_of(long_form):
        session = client.create(ADAMW, nets.initial(net), workers=ASYNC)
        hands = train(zygote, jobs(url, session, net, pushes=PUSHES))
        served, told = session.params(), [one for hand in hands for one in hand.told]
        refused = sum("refused" in one for one in told)
        assert served.version == len(NAMES) * PUSHES - refused
        stale = [one["staleness"] for one in told if "made" in one]
        assert 0 < max(stale) <= ASYNC["max_staleness"]

        reached, wanted = nets.accuracy(net, served), single(net)
        assert reached >= wanted - POINT
        figure(f"4 workers, async, {net}: test accuracy", 100 * reached, f"% (one: {wanted:.2%})")
        figure(f"4 workers, async, {net}: mean staleness", sum(stale) / len(stale), "versions")


@pytest.mark.parametrize("optimizer", SERVERS, ids=lambda spec: spec["name"])
def test_deltas_of_local_steps_reach_the_accuracy_of_one_process(
    optimizer: Spec, zygote: Zygote, url: str, client: Client, long_form: bool, figure: Figure
) -> None:
    for net in nets_of(long_form):
        workers = {**SYNC, "push": "deltas"}
        session = client.create(optimizer, nets.initial(net), workers=workers)
        todo = jobs(url, session, net, until=LOCAL_ROUNDS, **DESCENT)
        train(zygote, todo)
        served = session.params()
        assert served.version == LOCAL_ROUNDS
        assert_same_bits(served, alone(todo, session.info["torch"], LOCAL_ROUNDS))

        reached, wanted = nets.accuracy(net, served), single(net)
        assert reached >= wanted - POINT
        what = f"4 workers, {DESCENT['steps']} local steps, {optimizer['name']}, {net}"
        figure(f"{what}: test accuracy", 100 * reached, f"% (one: {wanted:.2%})")
